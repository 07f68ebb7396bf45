"""Loads a tokenizer of others: exact if it can be, else refused.

tokenizer = load_pretrained(TokenizerConfig(kind="pretrained", path="bigcode/starcoder2-3b"))
rewrites(tokenizer)     # None, or what it does to a text: "'e\\u0301' comes back as '\\xe9'"
"""

from __future__ import annotations

from pathlib import Path

from config import TokenizerConfig
from kindling import hub
from kindling.errors import TokenizerError, difference, one_line
from kindling.paths import expand_home
from kindling.public_paths import is_hub_tokenizer
from kindling.tokenization.added_space import WAYS_OUT, without_added_space
from kindling.tokenization.tokenizer import RewrittenError, SentencePieceTokenizer, Tokenizer, from_json, load_json

# Each probe is the parts of a text, which are encoded on their own.
PROBES: tuple[tuple[str, ...], ...] = (
    ("x = 1\n",),
    (" x",),
    ("x ",),
    ("\nx\n",),
    ("a  b",),
    ("if x:\n        y\n\tz",),
    ("a\r\nb",),
    ("Ab",),
    ("x != y, it 's",),  # some decoders remove the space before punctuation
    ("x:\n", "    y", " z"),
    ("\xe9",),
    ("e\u0301",),  # NFC composes it
    ("\xb2\ufb01\u2026",),  # NFKC replaces these
    ("\u4e2d\u2603\U0001f600",),
)


def load_pretrained(cfg: TokenizerConfig) -> Tokenizer:
    """Load the tokenizer that `cfg.path` names: a tokenizer.json, a folder that holds one, or a hub name.

    One that adds a space to a text is changed so that it does not. Raises TokenizerError for one that rewrites text in another
    way, unless `cfg.lossy`.
    """
    tokenizer = _load_pretrained(cfg)
    if isinstance(tokenizer, SentencePieceTokenizer):  # one of ours
        return tokenizer
    theirs = tokenizer.to_json()
    if (exact := without_added_space(theirs)) != theirs:
        tokenizer = from_json(exact, cfg, f"the tokenizer of {cfg.path!r} without the space that it adds")
    if not cfg.lossy and (said := rewrites(tokenizer)) is not None:
        raise TokenizerError(
            f"the tokenizer of tokenizer.path must give a text back as it was, but that of {cfg.path!r} rewrites text: {said}; "
            f"{WAYS_OUT}"
        )
    return tokenizer


def _load_pretrained(cfg: TokenizerConfig) -> Tokenizer:
    assert cfg.path is not None
    path = expand_home(cfg.path, "tokenizer.path")
    if not is_hub_tokenizer(cfg):
        return load_json(path / "tokenizer.json" if path.is_dir() else path, cfg)
    from huggingface_hub import hf_hub_download

    with hub.cache_if_unreachable() as why:
        try:
            path = Path(hf_hub_download(cfg.path, "tokenizer.json"))
        except Exception as e:  # errors of connection, authorisation and name share no base class
            raise TokenizerError(
                f"tokenizer.path must be a file, a folder or a name on the hub that can be reached, but {cfg.path!r} gave "
                f"{why or one_line(e)}; check the network and the name (a gated one needs its terms accepted on its page, "
                f"and `hf auth login`), or set --tokenizer.path to a local tokenizer.json"
            ) from None
    return load_json(path, cfg)


def rewrites(tokenizer: Tokenizer) -> str | None:
    """Return an example of a text that a tokenizer changes, or None if it keeps the probes and its own added tokens."""
    for parts in (*PROBES, *((token,) for token in tokenizer.added_tokens)):
        try:
            back = tokenizer.decode([i for part in parts for i in tokenizer.encode(part)])
        except RewrittenError as e:
            return e.change
        except TokenizerError:  # it refuses such a text in a document too, with the reason
            continue
        if back != "".join(parts):
            return difference("".join(parts), back)
    return None
