"""A folder in the Hugging Face layout, of anybody, in the place of a run: to be asked, evaluated, exported and fine-tuned.

    run = find_model(Path("models/Qwen2.5-0.5B-Instruct"))      # or a run of ours, as `find_run` finds it
    model, _ = load_model(run, device)

Nothing is copied or written: config, tokenizer, chat template and weights are read where they are. What is fine-tuned from it is
a run of ours. Limit: of a longer context, CONTEXT tokens are used, as keys and values of all of it would fill the memory.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import Config, DataConfig, ModelConfig, TokenizerConfig
from kindling.data.jinja_chat import TemplateError, end_of_answers
from kindling.errors import KindlingError, one_line
from kindling.paths import holds_hub_model, places_of_run
from kindling.runs.checkpoint import RunDirectory
from kindling.runs.loading import PretrainedFolder, find_run
from kindling.tokenization.pretrained import load_pretrained, rewrites
from kindling.tokenization.tokenizer import Tokenizer, from_json

if TYPE_CHECKING:
    from torch import Tensor

    from model import LanguageModel

CONTEXT = 2048  # tokens of a longer context that are used
PRESET = "pretrained"  # stands for the preset in what is printed
CONFIG, TOKENIZER_CONFIG, GENERATION_CONFIG = "config.json", "tokenizer_config.json", "generation_config.json"
TEMPLATE = "chat_template.jinja"


class PretrainedError(KindlingError):
    """A folder of a model of others that cannot be used."""


def find_model(path: Path | None, pretrained: bool = False) -> RunDirectory:
    """Return the run at `path` as `find_run` does, or the folder of a model of others that is there."""
    if path is not None:
        found = next((p for p in places_of_run(path) if (p / "config.yaml").is_file() or holds_hub_model(p)), None)
        if found is not None and holds_hub_model(found):
            return PretrainedModel(found)
    return find_run(path, pretrained)


class PretrainedModel(PretrainedFolder):
    """The folder of a model that others trained; its files are read when they are needed."""

    def exists(self) -> bool:
        return True

    def checkpoints(self) -> list[Path]:
        return [self.path]

    def newest(self, before: int | None = None) -> Path:
        """Return the folder itself."""
        return self.path

    def weights_sha256(self) -> str:
        from kindling.formats.hf_format import weights_sha256

        return weights_sha256(self.path)

    def read_weights(self) -> Mapping[str, Tensor]:
        """Return the folder's weights. Raises HubFormatError unless they are all there, finite, and of the config's shape."""
        from kindling.formats.hf_format import read

        return read(self.path)[1]

    def load_weights(self, model: LanguageModel, weights: Mapping[str, Tensor]) -> None:
        """Load what `read_weights` returned into a model of the folder's shape."""
        from kindling.formats.hf_layout import load_into

        load_into(model, weights)

    def heldout(self, split: str) -> Any:
        """Raise PretrainedError: nobody knows what the model has not seen."""
        raise PretrainedError(
            f"{self.path} must have held-out documents for this, but is a model of others; fine-tune it with "
            f"`python sft_train.py {self.path}`, or measure the loss of your own files with `python evaluate.py {self.path} "
            f"--text FILE`"
        )

    @cached_property
    def shape(self) -> ModelConfig:
        """The model's shape with its whole context."""
        from kindling.formats.hf_format import read_config

        return read_config(self.path)

    def config(self) -> Config:
        """Return the config of a run with this model."""
        return self._config

    @cached_property
    def _config(self) -> Config:
        model = self.shape
        if model.position == "rope" and model.block_size > CONTEXT:
            print(
                f"note: of the context of {model.block_size:,} tokens of {self.path}, {CONTEXT:,} are used; for fine-tuning, "
                f"--model.block-size sets it",
                file=sys.stderr,
            )
            model = replace(model, block_size=CONTEXT)
        data = DataConfig() if self.template is None else DataConfig(template=self.template)
        return Config(
            preset=PRESET, name=self.path.resolve().name, model=model, tokenizer=self._own_tokenizer.cfg, data=data
        )

    @cached_property
    def _own_tokenizer(self) -> Tokenizer:
        """The folder's tokenizer, which is lossy if it rewrites text; a note says so."""
        cfg = self._tokenizer_config()
        tokenizer = load_pretrained(replace(cfg, lossy=True))
        if (said := rewrites(tokenizer)) is None:
            return from_json(tokenizer.to_json(), cfg)
        print(f"note: the tokenizer of {self.path} rewrites text: {said}", file=sys.stderr)
        return tokenizer

    def tokenizer(self) -> Tokenizer:
        """Return the folder's tokenizer. Raises KindlingError if it is missing, unreadable or larger than the model."""
        rows, tokenizer = self.config().model.vocab_size, self._own_tokenizer
        if tokenizer.vocab_size > rows:
            raise PretrainedError(
                f"the tokenizer of {self.path} must have at most vocab_size={rows} ids, but has {tokenizer.vocab_size}; fetch "
                f"config, weights and tokenizer of the same model"
            )
        return tokenizer

    def require_context(self, block_size: int) -> None:
        most, learned = self.shape.block_size, self.shape.position == "learned"
        if block_size > most or (learned and block_size < most):
            raise PretrainedError(
                f"model.block_size must be {'' if learned else 'at most '}the {most} tokens of {self.path}, but is {block_size}; "
                f"set --model.block-size {most}"
            )

    # -- what the folder's files say ----------------------------------------------------------------------------------

    @cached_property
    def template(self) -> str | None:
        """The folder's own chat template, which begins with the special tokens that it may name; None if it has none."""
        own, path = self._told.get("chat_template"), self.path / TOKENIZER_CONFIG
        try:
            if (self.path / TEMPLATE).is_file():
                path = self.path / TEMPLATE
                own = path.read_text(encoding="utf-8")
            if isinstance(own, list):  # several, each with a name
                own = next((one["template"] for one in own if one["name"] == "default"), None)
            if not isinstance(own, str | None):
                raise ValueError(f"it is a {type(own).__name__}")
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise PretrainedError(
                f"the chat template in {path} must be a text, or a list of texts with names, but is not ({one_line(e)}); "
                f"fetch it again"
            ) from None
        if not own:
            return None
        named = {name: _text_of(self._told.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        used = {name: token for name, token in named.items() if token is not None and name in own}
        return "".join(f"{{%- set {name} = {json.dumps(token)} -%}}" for name, token in used.items()) + own

    @cached_property
    def _told(self) -> dict[str, Any]:
        """The content of tokenizer_config.json, or nothing."""
        path = self.path / TOKENIZER_CONFIG
        return _read_json(path) if path.is_file() else {}

    @cached_property
    def _backend(self) -> dict[str, Any]:
        """The content of tokenizer.json."""
        path = self.path / "tokenizer.json"
        if not path.is_file():
            raise PretrainedError(
                f"{self.path} must hold a tokenizer.json, but does not; have transformers load its tokenizer and call "
                f"save_pretrained, which writes one"
            )
        return _read_json(path)

    @cached_property
    def _added(self) -> dict[str, int]:
        """The added tokens and their ids, which the end tokens are among."""
        try:
            return {token["content"]: token["id"] for token in self._backend.get("added_tokens") or ()}
        except (KeyError, TypeError):
            raise PretrainedError(
                f"{self.path / 'tokenizer.json'} must list its added tokens, but does not; fetch it again"
            ) from None

    @cached_property
    def _special_tokens(self) -> tuple[str, ...]:
        return tuple(t["content"] for t in self._backend.get("added_tokens") or () if t.get("special"))

    def _tokenizer_config(self) -> TokenizerConfig:
        """Return the settings of the folder's tokenizer. Raises PretrainedError if no token ends a text."""
        first, ends = self._first_token(), self._end_tokens()
        if self.template is not None:
            # in training and chat, a text ends where an answer does; `require_trainable` says if none can be told
            with contextlib.suppress(TemplateError):
                ends = [end_of_answers(self.template, self._special_tokens), *ends]
        if not ends:
            raise PretrainedError(
                f"{self.path} must name the token that ends a text, but neither {GENERATION_CONFIG}, config.json nor "
                f"{TOKENIZER_CONFIG} does; set eos_token in {TOKENIZER_CONFIG}"
            )
        eos, *others = dict.fromkeys(ends)
        taken = {eos}
        named: dict[str, str | None] = {"bos_token": first}
        named |= {name: _text_of(self._told.get(name)) for name in ("pad_token", "unk_token")}
        for name, token in named.items():
            named[name] = None if token in taken or token not in self._added else token
            taken.add(token or eos)
        path = str(self.path.resolve())
        first, pad, unk = (named[name] for name in ("bos_token", "pad_token", "unk_token"))
        return TokenizerConfig(
            kind="pretrained", path=path, eos_token=eos, end_tokens=tuple(others), bos_token=first, pad_token=pad, unk_token=unk
        )  # fmt: skip

    def _end_tokens(self) -> list[str]:
        """Return the tokens that end a text: by their ids, or by the name that the tokenizer's config gives."""
        found: list[str] = []
        names = {i: token for token, i in self._added.items()}
        for name in (GENERATION_CONFIG, CONFIG):
            if (self.path / name).is_file() and not found:
                ids = _read_json(self.path / name).get("eos_token_id")
                found = [names[i] for i in (ids if isinstance(ids, list) else [ids]) if i in names]
        own = _text_of(self._told.get("eos_token"))
        return found + ([own] if own in self._added else [])

    def _first_token(self) -> str | None:
        """Return the token that the tokenizer puts before each text, as its post-processor says; None: none."""
        from tokenizers import Tokenizer as Backend

        try:
            backend = Backend.from_str(json.dumps(self._backend))
        except Exception as e:  # the library raises plain Exception
            raise PretrainedError(
                f"{self.path / 'tokenizer.json'} must be of the `tokenizers` library, but is not ({one_line(e)}); fetch it again"
            ) from None
        try:
            plain, whole = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
        except Exception:  # it cannot encode "a"
            return None
        return backend.id_to_token(whole[0]) if whole[-len(plain) :] == plain and len(whole) == len(plain) + 1 else None


def _text_of(token: Any) -> str | None:
    """Return a special token of a config, which is a text or an object with one."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises HubFormatError if there is none."""
    from kindling.formats.hf_format import read_json  # imports torch, which a run of ours must not wait for

    return read_json(path)
