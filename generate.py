"""Continue prompts or files with a trained run, or chat with a fine-tuned one.

    python generate.py runs/demo --prompt "def fib(n):"
    python generate.py runs/demo --complete FILE            # the text to append, for an editor; - is stdin
    python generate.py runs/demo --prompts FILE --n 4       # many prompts together, as JSON lines
    python generate.py runs/demo-sft --chat

Text is printed while it is sampled, up to end of text, a limit or a stop string. A prompt that is longer than the context is
cropped from the left. A conversation loses its oldest exchanges instead, and an answer ends at the end of the context. Limit:
with --prompt, each token beyond the context costs a pass over the whole context; otherwise, text ends there.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from kindling.cli import parse_cli, run_script, utf8
from kindling.data.jinja_chat import is_jinja
from kindling.data.prompts import Exchange
from kindling.errors import one_line
from kindling.generation.sampling import GenerationError, Sampling
from kindling.json_rows import DAMAGE, Broken, is_rows, read_rows
from kindling.output import TextPrinter
from kindling.paths import require_runs

if TYPE_CHECKING:
    from kindling.generation.completion import Completion
    from kindling.runs.checkpoint import RunDirectory
    from kindling.tokenization.tokenizer import Tokenizer
    from model import LanguageModel

Mode = Literal["autocomplete", "creative"]
MODES: dict[Mode, Sampling] = {
    "autocomplete": Sampling(temperature=0.2, top_k=10),
    "creative": Sampling(temperature=0.8, top_k=50),
}
COMPLETE_TOKENS = 64  # a few lines, as many as one reads before accepting them

# any text, also "None", which tyro would otherwise take as no text
Text = Annotated[
    Optional[str],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="STR",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: value is None or isinstance(value, str),
        str_from_instance=lambda value: [str(value)],
    ),
]


@dataclass
class Flags:
    """The script's command line."""

    run: tyro.conf.Positional[Optional[Path]] = (
        None  # not `Path | None`, for which tyro imports typeguard, which takes 0.1 s
    )
    """The run's folder, or its name under runs/, or the folder of a model of others. The newest run if left out."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA, else Apple's MPS, else the CPU."""
    precision: Literal["fp32", "bf16", "int8"] = "fp32"
    """The precision of the weights. bf16 and int8 (CPU only) are faster, but round the weights, so some texts differ."""
    prompt: Text = None
    """The text to continue. Without this and the next three flags, a new document is started."""
    prompts: Optional[Path] = None
    """A file of prompts to continue together: one a line, or rows (.jsonl, .json) with a field `prompt`. Prints JSON lines."""
    complete: Optional[Path] = None
    """A file to continue at its end; - is stdin. Prints only the new text, by default at most 64 tokens."""
    chat: bool = False
    """Chat with a fine-tuned run: questions come from the terminal or a pipe, answers are printed while they are sampled."""
    mode: Optional[Mode] = None
    """autocomplete: temperature 0.2, top-k 10. creative: 0.8 and 50. None: autocomplete for --complete, otherwise creative."""
    n: int = 1
    """The number of samples of each prompt. The first has --seed, the others the seeds after it."""
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = MODES["creative"]


def parse(argv: list[str] | None = None) -> Flags:
    """Parse the command line; the mode gives the defaults of the sampling. Raises GenerationError."""
    flags = parse_cli(Flags, __doc__ or "", argv)
    mode: Mode = flags.mode or ("creative" if flags.complete is None else "autocomplete")
    own = MODES[mode] if flags.complete is None else replace(MODES[mode], max_new_tokens=COMPLETE_TOKENS)
    if own != Flags.sampling:  # parse again with the mode's defaults, so that explicit values win
        flags = tyro.cli(Flags, default=Flags(sampling=own), args=argv)
    flags.prompt = None if flags.prompt is None else utf8(flags.prompt, "--prompt")
    flags.sampling = replace(flags.sampling, stop=tuple(utf8(text, "--stop") for text in flags.sampling.stop))
    flags.sampling.check()
    _check(flags)
    return flags


def _check(flags: Flags) -> None:
    """Raise GenerationError for impossible combinations of flags."""
    given = [
        name
        for name, is_given in (
            ("--prompt", flags.prompt is not None),
            ("--prompts", flags.prompts is not None),
            ("--complete", flags.complete is not None),
            ("--chat", flags.chat),
        )
        if is_given
    ]
    if len(given) > 1:
        raise GenerationError(
            f"at most one of --prompt, --prompts, --complete and --chat must be given, but {' and '.join(given)} are; "
            f"leave one out"
        )
    if flags.prompt == "":
        raise GenerationError(
            "--prompt must have at least one character, but is empty; leave it out for a new document"
        )
    if flags.n < 1 or flags.sampling.seed + flags.n > 2**63:
        raise GenerationError(f"--n must be at least 1, with its seeds below 2**63, but is {flags.n}; set --n 1")
    if flags.n > 1 and given and given[0] in ("--complete", "--chat"):
        raise GenerationError(f"--n must be 1 with {given[0]}, but is {flags.n}; sample several with --prompt")


def read_text(path: Path, flag: str) -> str:
    """Return the text of a file, or of stdin for -. Raises GenerationError if it is empty or not UTF-8."""
    name = "stdin" if str(path) == "-" else str(path)
    try:
        raw = sys.stdin.buffer.read() if name == "stdin" else path.read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as e:
        raise GenerationError(f"{flag} must be a readable file, but {name} is not ({e.strerror}); name one") from None
    except UnicodeDecodeError as e:
        raise GenerationError(
            f"{flag} must be text in UTF-8, but {name} is not at byte {e.start:,}; convert it"
        ) from None
    if not text:
        raise GenerationError(f"{flag} must have at least one character, but {name} is empty; write a beginning")
    return text


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file of lines, or of JSON rows. Raises GenerationError with the number of a bad line."""
    if is_rows(path):
        return _prompts_of_rows(path)
    prompts = []
    lines = read_text(path, "--prompts").removesuffix("\n").split("\n")
    for number, line in enumerate(lines, 1):
        prompt = line.removesuffix("\r")
        if not prompt.strip():
            raise GenerationError(
                f"line {number} of {path} must hold a prompt, but is empty; correct it or take it out"
            )
        prompts.append(prompt)
    return prompts


def _prompts_of_rows(path: Path) -> list[str]:
    """Return the column `prompt` of a file of JSON rows."""
    prompts = []
    try:
        for row in read_rows(path):
            prompt = row.content.get("prompt") if isinstance(row.content, dict) else None
            if not isinstance(prompt, str) or not prompt:
                what = row.content if isinstance(row.content, Broken) else repr(json.dumps(row.content)[:60])
                raise GenerationError(
                    f"line {row.line} of {path} must be a JSON object with a text `prompt` of at least one character, but is "
                    f"{what}; correct it or take it out"
                )
            prompts.append(prompt)
    except DAMAGE as e:
        raise GenerationError(
            f"--prompts must be a readable file, but {path} is not ({one_line(e)}); name one"
        ) from None
    if not prompts:
        raise GenerationError(f"--prompts must have at least one prompt, but {path} has none; write one")
    return prompts


def _print_streams(flags: Flags, model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Print the prompt and its continuation while it is sampled, `flags.n` times."""
    from kindling.generation.completion import complete

    prompt = flags.prompt or ""
    for number in range(flags.n):
        sampling = replace(flags.sampling, seed=flags.sampling.seed + number)
        if flags.n > 1:
            print(f"--- sample {number + 1}, seed {sampling.seed}")
        say = TextPrinter()
        say(prompt)
        started = time.perf_counter()
        try:
            new = complete(model, tokenizer, prompt, sampling, say)
        finally:
            say.end()  # also after Ctrl-C
        _report(new, time.perf_counter() - started, sampling)


def _report(new: Completion, seconds: float, sampling: Sampling) -> None:
    """Print the speed and why the text ended, if stderr is a terminal."""
    if sys.stderr.isatty():
        ended = {"limit": f"--max-new-tokens {sampling.max_new_tokens}", "stop": "a stop string"}
        print(
            f"{new.n_tokens} tokens in {seconds:.1f} s, {new.n_tokens / seconds:,.0f} tokens/s; "
            f"ended by {ended.get(new.ended_by, f'the {new.ended_by}')}",
            file=sys.stderr,
        )


def _print_end(text: str, model: LanguageModel, tokenizer: Tokenizer, sampling: Sampling) -> None:
    """Print only the new text, as it is to be appended to the file."""
    from kindling.generation.completion import complete_document

    _print_bytes()
    say, started = TextPrinter(), time.perf_counter()
    try:
        new = complete_document(model, tokenizer, text, sampling, say)
    finally:
        say.end()
    _report(new, time.perf_counter() - started, sampling)


def _print_bytes() -> None:
    """Print in UTF-8 with unchanged newlines on every system, because a program reads the output."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", newline="")


def _print_batch(prompts: list[str], flags: Flags, model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Print a JSON line for each sample of each prompt, in order, as soon as it and all earlier ones are done."""
    from tqdm import tqdm

    from kindling.errors import TokenizerError
    from kindling.generation.completion import complete_batch, encode_document
    from kindling.generation.healing import longest_prompt

    block_size, ids = model.cfg.block_size, []
    for number, prompt in enumerate(prompts, 1):
        try:
            ids.append(encode_document(tokenizer, prompt))
        except TokenizerError as e:
            raise GenerationError(f"line {number} of {flags.prompts}: {e}") from None
    longest = longest_prompt(block_size, flags.sampling.max_new_tokens)
    n_cropped = sum(len(one) >= block_size for one in ids)
    if n_cropped:
        print(
            f"note: {n_cropped} of {len(ids)} prompts are longer than the context of {block_size} tokens: of each the last "
            f"{longest} are read",
            file=sys.stderr,
        )
    order = [(i, flags.sampling.seed + k) for i in range(len(ids)) for k in range(flags.n)]
    cropped = [ids[i] if len(ids[i]) < block_size else ids[i][-longest:] for i, _ in order]
    seeds = [seed for _, seed in order]
    _print_bytes()
    done: dict[int, Completion] = {}
    printed = 0
    with tqdm(total=len(order), desc="generating", unit=" texts", leave=False, disable=None) as bar:
        for number, new in complete_batch(model, tokenizer, cropped, seeds, flags.sampling):
            done[number] = new
            while printed in done:
                i, seed = order[printed]
                new = done.pop(printed)
                row = {"prompt": prompts[i], "seed": seed, "completion": new.text, "ended_by": new.ended_by}
                with bar.external_write_mode(file=sys.stdout):
                    print(json.dumps(row, ensure_ascii=False), flush=True)
                printed += 1
            bar.update()


def _require_chat(run: RunDirectory) -> None:
    """Raise GenerationError unless the run was fine-tuned."""
    from kindling.runs.loading import PretrainedFolder, is_asked

    if not is_asked(run):
        has = "has no chat template" if isinstance(run, PretrainedFolder) else "has only seen documents"
        raise GenerationError(
            f"{run.path} must be a fine-tuned run to chat with, but {has}; fine-tune it with "
            f"`python sft_train.py {run.path}`, or continue a text with --prompt"
        )


def _chat(run: RunDirectory, model: LanguageModel, sampling: Sampling) -> None:
    """Chat with the user in the run's template. Earlier exchanges are kept if the run was fine-tuned on conversations."""
    from kindling.generation.chat import chat
    from kindling.generation.completion import answer
    from kindling.generation.decoding import stream
    from kindling.runs.loading import chat_of

    asked, tokenizer = chat_of(run), run.tokenizer()
    assert asked is not None  # as _require_chat said
    template = asked.template
    room = min(sampling.max_new_tokens, model.cfg.block_size // 4)  # earlier exchanges must leave room for the answer
    # torch imports more modules at the first token, for seconds, and Ctrl-C during these imports would make it unusable
    list(stream(model, [tokenizer.eos_id], replace(sampling, max_new_tokens=1), tokenizer.eos_id))

    def reply(exchanges: list[Exchange], number: int, say: Callable[[str], None]) -> str:
        its_own = replace(sampling, seed=sampling.seed + number)
        return answer(model, tokenizer, template, exchanges, its_own, say, room).cut_by

    chat(f"{run.path}, template {'of the model' if is_jinja(template) else template}", reply, remembers=asked.remembers)


def main(argv: list[str] | None = None) -> int:
    """Continue the prompt, the prompts or the file, or chat."""
    flags = parse(argv)
    text = None if flags.complete is None else read_text(flags.complete, "--complete")
    prompts = None if flags.prompts is None else read_prompts(flags.prompts)
    require_runs(flags.run)
    from kindling.formats.hf_import import find_model
    from kindling.runs.loading import load_model, require_checkpoint

    run = find_model(flags.run)
    if flags.chat:
        _require_chat(run)
    checkpoint = require_checkpoint(run)
    from kindling.device import resolve  # imports torch

    device = resolve(replace(run.config().train, device=flags.device), flag="--device").device
    from kindling.generation.inference import prepare_for_inference

    loaded, _ = load_model(run, device, checkpoint)
    model = prepare_for_inference(loaded, flags.precision)
    if flags.chat:
        _chat(run, model, flags.sampling)
    elif text is not None:
        _print_end(text, model, run.tokenizer(), flags.sampling)
    elif prompts is not None:
        _print_batch(prompts, flags, model, run.tokenizer())
    else:
        _print_streams(flags, model, run.tokenizer())
    return 0


if __name__ == "__main__":
    run_script(main)
