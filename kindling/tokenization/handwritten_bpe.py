"""Byte-level BPE by hand: train, encode, decode, save, load.

    bpe = ByteLevelBPE.train(texts, vocab_size=2048, special_tokens=["<|endoftext|>"])
    bpe.decode(bpe.encode("def f(): return 'naïve'\\n")) == "def f(): return 'naïve'\\n"

Vocabulary, merges and ids equal those of the `tokenizers` library, byte for byte, and `tokenizer.json` has its format.
Encoding is several times as fast, because each word is merged only once and then looked up. Sources: Gage 1994 (byte pair
encoding); Sennrich et al. 2016, algorithm 1 (BPE on words); Radford et al. 2019 (bytes, and the split into words). Limit:
text is text, so a special token that is written in a text is encoded as its characters.
"""

from __future__ import annotations

import heapq
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import regex

CACHED_WORDS = 2**18  # at about 200 bytes each, 50 MB
NO_TOKEN = -1  # the id of a byte that the vocabulary lacks, and the mark of a place that was merged away
NO_MERGE = (0, NO_TOKEN)
CACHED_LENGTH = 64  # longer words seldom repeat, and a minified file can be one word of megabytes

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHER = [b for b in range(256) if b not in _PRINTABLE]
SYMBOLS = [chr(b) if b in _PRINTABLE else chr(256 + _OTHER.index(b)) for b in range(256)]
"""The printable character that stands for each byte in `tokenizer.json` (GPT-2's bytes_to_unicode)."""
BYTES = {symbol: b for b, symbol in enumerate(SYMBOLS)}
"""The byte that each of these characters stands for."""

# Letters and numerals newer than Unicode 16: the `tokenizers` library does not know them. A test compares all of them.
_NEWER_LETTERS = (
    r"\u0558\u058b\u058c\u088f\u0c5c\u0cdc\u208f\u209d-\u209f\ua7ce\ua7cf\ua7d2\ua7d4\ua7dd\ua7e2\ua7f1\uab6c\uab6d"
    r"\U000107bb-\U000107bf\U00010940-\U00010959\U00010ec5-\U00010ec7\U00010ed9-\U00010eee\U00011b0a"
    r"\U00011db0-\U00011ddb\U00011df1\U00016ea0-\U00016eb8\U00016ebb-\U00016ed3\U00016ff2\U00016ff3"
    r"\U000187f8-\U000187ff\U00018cd6-\U00018cda\U00018d09-\U00018d20\U00018d80-\U00018df2\U00018e00-\U00019191"
    r"\U000191a0-\U000191d2\U0001b123-\U0001b128\U0001b168\U0001d6a6\U0001df1f-\U0001df24\U0001df2b-\U0001df81"
    r"\U0001df90-\U0001df96\U0001dfcd-\U0001dfff\U0001e6c0-\U0001e6de\U0001e6e0-\U0001e6e2\U0001e6e4\U0001e6e5"
    r"\U0001e6e7-\U0001e6ed\U0001e6f0-\U0001e6f4\U0001e6fe\U0001e6ff\U0002b73a-\U0002b73f\U0002b81e"
    r"\U0002cea2-\U0002cead\U000323b0-\U00033479\U0003d000-\U0003fc3f"
)
_NEWEST_NUMERALS = r"\U0001246f\U00012475-\U0001247f\U00012550-\U00012686"
# Unicode 17: the digit splitter of the library knows these, its regular expressions do not
_NEWER_NUMERALS = r"\U00011de0-\U00011de9\U00016ff4-\U00016ff6" + _NEWEST_NUMERALS


def _patterns(split_digits: bool) -> tuple[re.Pattern[str], regex.Pattern[str]]:
    """Return two patterns of words: for ASCII text, where the standard library is faster, and for any text.

    As in GPT-2, a word is a contraction; letters, numbers or other characters with at most one space before; or
    whitespace, whose last character is left to the next word. With `split_digits` (StarCoder2) each digit is a word of its
    own, and whitespace before a digit is taken whole.
    """
    numerals = _NEWEST_NUMERALS if split_digits else _NEWER_NUMERALS
    classes = [("A-Za-z", "0-9"), (rf"[\p{{L}}--[{_NEWER_LETTERS}]]", rf"[\p{{N}}--[{numerals}]]")]
    ascii_pattern, pattern = (
        rf"'(?:[stmd]|re|ve|ll)| ?[{letter}]+|[{number}]| ?[^\s{letter}{number}]+|\s+(?![^\s{number}])|\s+"
        if split_digits
        else rf"'(?:[stmd]|re|ve|ll)| ?[{letter}]+| ?[{number}]+| ?[^\s{letter}{number}]+|\s+(?!\S)|\s+"
        for letter, number in classes
    )
    return re.compile(ascii_pattern, re.ASCII), regex.compile(pattern, regex.V1)


# In both patterns, a word begins at a space or newline before one of these characters. So a text can be cut there, into
# ASCII stretches and short other ones. This keeps prose with a few curly quotes fast.
_STRETCH = re.compile(r"[\x00-\x7f]+(?=[ \n][!-/:-~]|\Z)|.+?(?=[ \n][!-/:-~]|\Z)", re.DOTALL)


class _Cache(dict[str, tuple[int, ...]]):
    """Maps a word to its token ids. A missing word is merged when it is looked up."""

    def __init__(self, bpe: ByteLevelBPE):
        self._bpe = bpe

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = self._bpe._merge(word)
        if len(word) <= CACHED_LENGTH:
            if len(self) >= CACHED_WORDS:
                self.clear()
            self[word] = ids
        return ids


class ByteLevelBPE:
    """A vocabulary of byte sequences and the merges that build them, first merge first."""

    def __init__(
        self,
        vocab: dict[str, int],
        merges: list[tuple[str, str]],
        special_tokens: dict[str, int] | None = None,
        split_digits: bool = False,
    ):
        """`vocab` maps tokens, written in `SYMBOLS`, to ids. Raises ValueError if a merge uses an unknown token.

        Bytes may be missing: published vocabularies leave out bytes that UTF-8 never has. Special tokens need not be in
        `vocab`, and ids may have gaps.
        """
        self.vocab, self.special_tokens, self.split_digits = vocab, dict(special_tokens or {}), split_digits
        self.merges: dict[tuple[int, int], tuple[int, int]] = {}  # pair of ids -> rank, id of the merged token
        for rank, pair in enumerate(merges):
            try:
                left, right = pair
                self.merges[vocab[left], vocab[right]] = rank, vocab[left + right]
            except (KeyError, ValueError):
                raise ValueError(
                    f"merge {rank} must join two tokens to a third, but is {pair}; correct the file"
                ) from None
        self._byte_ids = [vocab.get(symbol, NO_TOKEN) for symbol in SYMBOLS]
        self._spelt = {i: _spell(token) for token, i in vocab.items()}
        self._spelt |= {i: token.encode("utf-8") for token, i in self.special_tokens.items()}
        self._ascii_words, self._any_words = _patterns(split_digits)
        self._cache = _Cache(self)

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self._spelt) + 1

    def split(self, text: str) -> list[str]:
        """Split `text` into words; joined, they are `text`. A token never spans two words."""
        if text.isascii():
            return self._ascii_words.findall(text)
        findall = (self._any_words.findall, self._ascii_words.findall)
        return list(chain.from_iterable(findall[s.isascii()](s) for s in _STRETCH.findall(text)))

    def encode(self, text: str) -> list[int]:
        """Return the token ids of any str. Raises ValueError if a byte of it is not in the vocabulary."""
        return list(chain.from_iterable(map(self._cache.__getitem__, self.split(text))))

    def _merge(self, word: str) -> tuple[int, ...]:
        """Merge the bytes of a word: the pair of lowest rank first, leftmost first, until no pair has a merge.

        A heap of candidates over a linked list, so a word of n bytes takes O(n log n).
        """
        ids = [self._byte_ids[b] for b in word.encode("utf-8", "surrogatepass")]
        if NO_TOKEN in ids:
            raise ValueError(f"a text must consist of bytes in the vocabulary, but {word[:20]!r} does not")
        merges, last = self.merges, len(ids) - 1
        heap = [(found[0], i, found[1]) for i, pair in enumerate(pairwise(ids)) if (found := merges.get(pair))]
        heapq.heapify(heap)
        following, previous = list(range(1, last + 2)), list(range(-1, last))
        while heap:
            _, i, new = heapq.heappop(heap)
            j = following[i]
            # outdated: one side of the pair was merged since, so it no longer gives the token that it was queued for
            if ids[i] == NO_TOKEN or j > last or merges.get((ids[i], ids[j]), NO_MERGE)[1] != new:
                continue
            ids[i], ids[j] = new, NO_TOKEN
            following[i] = k = following[j]
            if k <= last:
                previous[k] = i
                if (found := merges.get((new, ids[k]))) is not None:
                    heapq.heappush(heap, (found[0], i, found[1]))
            if (h := previous[i]) >= 0 and (found := merges.get((ids[h], new))) is not None:
                heapq.heappush(heap, (found[0], h, found[1]))
        return tuple(i for i in ids if i != NO_TOKEN)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids, special tokens included. Incomplete characters give U+FFFD, unknown ids nothing."""
        raw = b"".join(self._spelt.get(i, b"") for i in ids)
        try:
            return raw.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return raw.decode("utf-8", "replace")

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, special_tokens: Iterable[str] = (), split_digits: bool = False
    ) -> ByteLevelBPE:
        """Learn at most `vocab_size` tokens: special tokens, the 256 bytes, then merges of the most frequent pairs.

        Raises ValueError, before any text is read, if these do not fit, or if merges could build a special token.
        """
        special = list(dict.fromkeys(special_tokens))
        if vocab_size < 256 + len(special):
            raise ValueError(f"vocab_size must be at least {256 + len(special)}, but is {vocab_size}")
        special_ids = {token: i for i, token in enumerate(special)}
        vocab = special_ids | {symbol: len(special) + i for i, symbol in enumerate(sorted(SYMBOLS))}
        blank = cls(vocab, [], special_ids, split_digits)
        for token in special:
            if len(blank.split(token)) < 2:  # then a merge could build it, and text would be encoded as its id
                raise ValueError(f"a special token must not be one word, but is {token!r}; add brackets: '<|{token}|>'")
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(blank.split(text))
        merges = _learn([list(blank._merge(w)) for w in counts], list(counts.values()), vocab, vocab_size)
        return cls(vocab, merges, special_ids, split_digits)

    def to_json(self) -> str:
        """Return the tokenizer in the format of `tokenizer.json`."""
        names = {i: token for token, i in self.vocab.items()}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        digits = {"type": "Digits", "individual_digits": True}
        sequence = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
        ranked = sorted(self.merges, key=lambda pair: self.merges[pair][0])
        content = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": i, "content": token, **flags, "special": True}
                for token, i in sorted(self.special_tokens.items(), key=lambda item: item[1])
            ],
            "normalizer": None,
            "pre_tokenizer": sequence if self.split_digits else byte_level,
            "post_processor": None,
            "decoder": {**byte_level, "add_prefix_space": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": self.vocab,
                "merges": [[names[left], names[right]] for left, right in ranked],
            },
        }
        return json.dumps(content, ensure_ascii=False, separators=(",", ":"))

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`, which the `tokenizers` library and what builds on it can read."""
        path.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> ByteLevelBPE:
        """Read a `tokenizer.json`; raises OSError, or ValueError as `from_json` does."""
        return cls.from_json(path.read_text(encoding="utf-8"))

    @classmethod
    def from_json(cls, text: str) -> ByteLevelBPE:
        """Read the `tokenizer.json` of plain byte-level BPE; for any other, raises ValueError that says what differs."""
        try:
            content = json.loads(text)
        except json.JSONDecodeError as e:
            raise ValueError(
                f"a tokenizer must be plain byte-level BPE, but has no JSON ({e}); check the file"
            ) from None
        return cls.from_dict(content)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> ByteLevelBPE:
        """Like `from_json`, with the parsed content."""
        try:
            if not (refused := _not_plain(content)):
                merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in content["model"]["merges"]]
                special = {t["content"]: t["id"] for t in content["added_tokens"]}
                return cls(content["model"]["vocab"], merges, special, content["pre_tokenizer"]["type"] == "Sequence")
        except (KeyError, TypeError, AttributeError) as e:
            refused = f"an unknown form ({type(e).__name__}: {e})"
        raise ValueError(
            f"a tokenizer must be plain byte-level BPE, but has {refused}; use the tokenizers library for it"
        )


def _spell(token: str) -> bytes:
    """Return the bytes of a token. A token that is not made of `SYMBOLS` stands for its own characters."""
    try:
        return bytes(BYTES[symbol] for symbol in token)
    except KeyError:
        return token.encode("utf-8")


def _not_plain(content: dict[str, Any]) -> str | None:
    """Return in what a tokenizer.json differs from plain byte-level BPE, or None."""
    model, before = content["model"], content["pre_tokenizer"]
    if model["type"] != "BPE":
        return f"a model of type {model['type']}"
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"):
        if model.get(key):
            return f"{key} {model[key]!r}"
    if content.get("normalizer") is not None:
        return f"a normalizer of type {content['normalizer']['type']}"
    if ordinary := [t["content"] for t in content["added_tokens"] if not t["special"]]:
        return f"the added token {ordinary[0]!r}, which is not special"
    parts = before["pretokenizers"] if before["type"] == "Sequence" else [before]
    if len(parts) == 2 and parts[0] == {"type": "Digits", "individual_digits": True}:
        parts = parts[1:]
    elif before["type"] == "Sequence":
        return "another sequence of pre-tokenizers than digits, bytes"
    if parts[0]["type"] != "ByteLevel" or parts[0]["add_prefix_space"] or not parts[0].get("use_regex", True):
        return f"the pre-tokenizer {parts[0]}"
    if content["decoder"]["type"] != "ByteLevel":
        return f"a decoder of type {content['decoder']['type']}"
    return None


def _count_pairs(
    words: list[list[int]], counts: list[int]
) -> tuple[defaultdict[tuple[int, int], int], defaultdict[tuple[int, int], set[int]]]:
    """Return how often each pair of ids occurs, and the numbers of the words that hold it."""
    pair_counts: defaultdict[tuple[int, int], int] = defaultdict(int)
    holders: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for i, word in enumerate(words):
        for pair in pairwise(word):
            pair_counts[pair] += counts[i]
            holders[pair].add(i)
    return pair_counts, holders


def _learn(words: list[list[int]], counts: list[int], vocab: dict[str, int], vocab_size: int) -> list[tuple[str, str]]:
    """Merge the most frequent pair, ties by the smaller ids, until `vocab` is full or no pair is left; fill `vocab`.

    `words` are distinct words as token ids, `counts` their frequencies. A merge changes only the words that contain its
    pair, and the counts of pairs are updated there. The heap is updated lazily: a count can only have fallen since its
    entry was pushed, and such an entry is pushed again when it is popped. All words are merged in the same way, so two
    merges never build the same token.
    """
    names = sorted(vocab, key=vocab.__getitem__)
    pair_counts, holders = _count_pairs(words, counts)
    heap = [(-total, pair) for pair, total in pair_counts.items()]
    heapq.heapify(heap)
    merges = []
    while heap and len(vocab) < vocab_size:
        negative, pair = heapq.heappop(heap)
        if -negative != pair_counts[pair]:
            heapq.heappush(heap, (-pair_counts[pair], pair))
            continue
        if negative >= 0:
            break
        left, right = pair
        new = len(names)
        names.append(names[left] + names[right])
        vocab[names[new]] = new
        merges.append((names[left], names[right]))
        grown: set[tuple[int, int]] = set()
        for i in holders.pop(pair):
            word, times, j = words[i], counts[i], 0
            while True:
                try:
                    j = word.index(left, j)
                except ValueError:
                    break
                if j + 1 < len(word) and word[j + 1] == right:
                    word[j : j + 2] = [new]
                    neighbours = []
                    if j > 0:
                        neighbours.append(((word[j - 1], left), (word[j - 1], new)))
                    if j + 1 < len(word):
                        neighbours.append(((right, word[j + 1]), (new, word[j + 1])))
                    for gone, come in neighbours:
                        pair_counts[gone] -= times
                        pair_counts[come] += times
                        holders[come].add(i)
                        grown.add(come)
                j += 1
        for come in grown:
            if pair_counts[come] > 0:
                heapq.heappush(heap, (-pair_counts[come], come))
    return merges
