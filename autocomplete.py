"""Complete code on the CPU with a run that was exported to int8; needs only NumPy and `tokenizers`.

    python export.py runs/demo --to int8
    python autocomplete.py runs/demo --file main.c          # completes at the end of the file; - reads stdin
    python autocomplete.py runs/demo --prompt "def add(a, b):" --mode creative

The weights stay int8, so it needs little more memory than the file has bytes. The prompt is cropped from the left, so that the
new text fits the context. Completion stops at end-of-text.
"""

# of the project, it needs the folder kindling/int8; healing.py, text_stream.py and numpy_sampling.py of kindling/generation/; and
# errors.py, help.py, output.py, paths.py and rope.py of kindling/

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

if __name__ == "__main__":  # one thread: the products of one token are too small to divide
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from kindling.errors import KindlingError
from kindling.generation import numpy_sampling
from kindling.generation.healing import Healing, longest_prompt, newest_text, split_for_healing
from kindling.generation.numpy_sampling import distribution
from kindling.generation.text_stream import EndIds, TextStream, all_ends
from kindling.help import unknown_word, wrapped
from kindling.int8.exports import find_export
from kindling.int8.model import CompletionError, Model
from kindling.int8.tokenizer import ExportTokenizer
from kindling.output import TextPrinter, silent_if_reader_ends
from kindling.paths import expand_home

CHARACTERS = 64  # of the text's end, for each token of the context, are encoded: far more than any text needs
MODES = {"autocomplete": (0.2, 10), "creative": (0.8, 50)}  # temperature and top-k, as Code-AutoComplete-LLM has them


class Sampling(NamedTuple):
    """How the next token is chosen."""

    temperature: float
    """0 is greedy."""
    top_k: int
    """Draw from this many most likely tokens. 0: all."""
    max_new_tokens: int
    """Stop after this many new tokens."""
    seed: int
    """The same seed gives the same text."""


def draw(logits: np.ndarray, sampling: Sampling, rng: np.random.Generator) -> int:
    """Return the next token, drawn from logits (V,)."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    if not np.isfinite(logits.max()):
        raise CompletionError("a model's logits must be numbers, but are not; export another checkpoint")
    return numpy_sampling.draw(*distribution(logits, sampling.temperature, sampling.top_k or None), rng)


def stream(
    model: Model, ids: list[int], sampling: Sampling, eos_id: EndIds, healing: Healing | None = None
) -> Iterator[int]:
    """Yield new tokens after the prompt `ids`, until end-of-text, the limit, or a full context."""
    cache, ends = model.new_cache(), all_ends(eos_id)
    rng = np.random.default_rng(sampling.seed)
    logits = model.forward_cached(ids, cache)
    out: list[int] = []
    for left in range(min(sampling.max_new_tokens, model.block_size - len(ids)), 0, -1):
        mask = None if healing is None else healing.allowed(out)
        token = draw(logits if mask is None else np.where(mask, logits, -np.inf), sampling, rng)
        if token in ends:
            return
        out.append(token)
        yield token
        if left > 1:
            logits = model.forward_cached([token], cache)


class Completer:
    """A model with its tokenizer: text in, text out."""

    def __init__(self, folder: Path):
        """Open an export. Raises CompletionError if it is incomplete or damaged."""
        self.model = Model(folder)
        self.tokenizer = ExportTokenizer(folder, self.model)
        self.n_written = 0

    def prompt_ids(self, text: str, max_new_tokens: int) -> tuple[list[int], bool]:
        """Return the tokens of the end of `text`, with room for the new tokens, and whether the beginning is cropped.

        Raises CompletionError for text that the tokenizer cannot encode.
        """
        end = newest_text(text, CHARACTERS * self.model.block_size)
        ids = self.tokenizer.encode(end)
        if len(end) == len(text) and self.tokenizer.bos_id is not None:
            ids = [self.tokenizer.bos_id, *ids]
        room = longest_prompt(self.model.block_size, max_new_tokens)
        cropped = len(end) < len(text) or len(ids) > room
        return ids[-room:] or [self.tokenizer.eos_id], cropped  # in training, a document begins after an end-of-text

    def complete(self, ids: list[int], sampling: Sampling) -> Iterator[str]:
        """Yield the text that the model writes after the prompt, in pieces of whole characters."""
        kept, healing = split_for_healing(ids, self.tokenizer.spellings)
        # tokens taken back from the prompt are generated again, and are not part of the result
        limit = min(sampling.max_new_tokens, self.model.block_size - len(ids)) + len(ids) - len(kept)
        text = TextStream(self.tokenizer, after=kept[-1:], skip=len(healing.text))
        tokens = stream(self.model, kept, sampling._replace(max_new_tokens=limit), self.tokenizer.end_ids, healing)
        self.n_written = 0
        for token in tokens:
            self.n_written += 1
            if piece := text.add(token):
                yield piece
        yield text.finish(cut=self.n_written == limit)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and whose --help raises BrokenPipeError; argparse would hide it."""

    def error(self, message: str) -> NoReturn:
        """Print an error, and exit with code 2."""
        self.exit(2, f"error: {message}; see --help\n")

    def print_help(self, file: object = None) -> None:
        """Print the help."""
        print(self.format_help(), end="")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    argv = sys.argv[1:] if argv is None else argv
    width = max(40, shutil.get_terminal_size().columns)
    parser = Parser(
        prog=None if __name__ == "__main__" else "autocomplete.py",
        usage="%(prog)s DIR [flags]",
        description="\n".join(wrapped(__doc__, width)),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=24, width=width),
        add_help=False,
    )
    parser.add_argument("--help", "--help-all", "-h", action="help", help="show this, then stop")
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="an export to int8, or the run's folder or its name under runs/"
    )
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", metavar="TEXT", help="complete this text")
    text.add_argument("--file", help="complete at the end of this file; -: stdin")
    parser.add_argument(
        "--mode",
        choices=MODES,
        metavar="MODE",
        default="autocomplete",
        help=f"{' or '.join(MODES)} (default: %(default)s)",
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="0: greedy (default: the mode's, 0.2 or 0.8)")
    parser.add_argument(
        "--top-k", type=int, metavar="K", help="draw from the K most likely, 0: all (default: the mode's, 10 or 50)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", default=64, help="stop after N tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", default=0, help="the same seed gives the same text (default: %(default)s)"
    )
    parser.add_argument("--kernel", choices=("numpy", "c"), default="numpy", help="c: compile a faster kernel first")
    parser.add_argument("--stats", action="store_true", help="print speed and memory to stderr")
    known = [flag.strip("-") for action in parser._actions for flag in action.option_strings]
    for word in argv:  # argparse would first ask for what is missing
        is_short = any(name.startswith(word.partition("=")[0][2:]) for name in known)  # which argparse takes
        if word.startswith("--") and not is_short and (error := unknown_word(word, known)):
            parser.exit(2, f"error: {error}\n")
    return parser.parse_args(argv)


def sampling_of(args: argparse.Namespace) -> Sampling:
    """Return the sampling of the flags; raises CompletionError for a value that cannot be used."""
    temperature, top_k = MODES[args.mode]
    temperature = temperature if args.temperature is None else args.temperature
    top_k = top_k if args.top_k is None else args.top_k
    for flag, holds, must, given in (
        (
            "--temperature",
            temperature == 0 or 0.01 <= temperature <= 100,
            "from 0.01 to 100, or 0 for greedy",
            temperature,
        ),
        ("--top-k", top_k >= 0, "at least 1, or 0 for all", top_k),
        ("--max-new-tokens", args.max_new_tokens >= 1, "at least 1", args.max_new_tokens),
        ("--seed", args.seed >= 0, "at least 0", args.seed),
    ):
        if not holds:
            raise CompletionError(f"{flag} must be {must}, but is {given}")
    return Sampling(temperature, top_k, args.max_new_tokens, args.seed)


def read_text(args: argparse.Namespace) -> str:
    """Return the text to complete; raises CompletionError if there is none or it cannot be read."""
    where = "--prompt" if args.file is None else "stdin" if args.file == "-" else args.file
    try:
        if args.file is None:
            text = os.fsencode(args.prompt).decode("utf-8")
        else:
            text = (
                sys.stdin.buffer.read() if args.file == "-" else expand_home(args.file, "file").read_bytes()
            ).decode("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "it is not UTF-8"
        raise CompletionError(f"{where} must be readable text in UTF-8, but is not ({why}); name another") from None
    if not text:
        raise CompletionError(f"{where} must hold at least one character, but is empty")
    return text


def main(argv: list[str] | None = None) -> int:
    """Print what the model writes after the text."""
    args = parse_arguments(argv)
    sampling, text = sampling_of(args), read_text(args)
    started = time.perf_counter()
    completer = Completer(find_export(args.folder))
    if args.kernel == "c":
        completer.model.compile()
    ids, cropped = completer.prompt_ids(text, sampling.max_new_tokens)
    if cropped:
        context = completer.model.block_size
        print(
            f"note: only the last {len(ids)} tokens of the text are read, because the context has {context}",
            file=sys.stderr,
        )
    first_s, n_first = 0.0, 0
    say = TextPrinter()
    try:
        for piece in completer.complete(ids, sampling):
            if not first_s:
                first_s, n_first = time.perf_counter() - started, completer.n_written
            say(piece)
    finally:
        say.end()
    if args.stats:
        seconds = time.perf_counter() - started
        print(f"{stats(completer.n_written - n_first, first_s, seconds - first_s)}", file=sys.stderr)
    return 0


def stats(n_more: int, first_s: float, more_s: float) -> str:
    """Return one line about speed and memory."""
    speed = f", then {n_more / more_s:,.0f} tokens/s" if n_more else ""
    peak = peak_memory_bytes()
    return f"first token after {first_s:.2f} s{speed}" + (f"; {peak / 1e6:,.0f} MB of memory at most" if peak else "")


def peak_memory_bytes() -> int:
    """Return the peak of resident memory of this process; 0 if unknown."""
    try:  # Linux, where getrusage would count the process that started this one
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", newline="")  # so that the output can be appended to a file as it is
    with silent_if_reader_ends():
        try:
            sys.exit(main())
        except KindlingError as e:
            sys.exit(f"error: {e}")
        except KeyboardInterrupt:
            sys.exit(130)
        except BrokenPipeError:
            raise  # to silent_if_reader_ends
        except OSError as e:
            sys.exit(f"error: the output must be writable, but is not ({e})")
