"""The audit before fine-tuning: checks every row, counts what the rows hold, and shows one of them.

The check decodes the rows as the model gets them, and compares the texts with the hashes of the texts that the rows were
made from. So it finds a mask that is off by one, an end-of-text token that is lost or masked, examples that see each
other, and padding that is supervised, wherever the fault was made.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable

import numpy as np
from tqdm import tqdm

from config import IGNORE, Config
from kindling.data.conversations import CUT, PROMPT, PROMPT_HASH, RESPONSE, RESPONSE_HASH, text_hash
from kindling.data.examples import ExampleRows, Examples, require_template, training_rows
from kindling.data.jinja_chat import is_jinja
from kindling.data.ledger import Ledger
from kindling.data.shards import TrainingRows
from kindling.errors import KindlingError
from kindling.output import wants_color
from kindling.tokenization.tokenizer import Tokenizer

DIM, GREEN, PLAIN = "\x1b[2m", "\x1b[1;32m", "\x1b[0m"


class AuditError(KindlingError):
    """A row whose targets are not exactly its responses."""


def audit(splits: dict[str, ExampleRows], tokenizer: Tokenizer) -> None:
    """Check every row of every split; raises AuditError for the first that is wrong."""
    for split, rows in splits.items():
        with tqdm(total=rows.examples.n_examples, desc=f"auditing {split}", unit=" examples", leave=False) as bar:
            for number in range(rows.n_rows):
                bar.update(_check_row(rows, number, tokenizer))


def _check_row(rows: ExampleRows, number: int, tokenizer: Tokenizer) -> int:
    """Check one row; return the number of its examples."""
    batch = rows.batch_of_bins([number], 1)
    idx, targets = batch.idx[0], batch.targets[0]
    at = 0
    for item in rows.bins[number]:
        segments = rows.examples.segments_of(item)
        stop = at + int(segments[:, [PROMPT, RESPONSE]].sum()) - 1
        places = None if batch.position_ids is None else batch.position_ids[0, at:stop]
        own_template = is_jinja(rows.examples.manifest.get("template", ""))
        if wrong := _wrong_with(idx[at:stop], targets[at:stop], places, segments, tokenizer, own_template):
            raise AuditError(_violation(rows, f"example {item}", wrong))
        at = stop
    if (targets[at:] != IGNORE).any() or (idx[at:] == tokenizer.eos_id).any():
        raise AuditError(_violation(rows, f"row {number}", "the padding must be neither supervised nor end-of-text"))
    return len(rows.bins[number])


def _violation(rows: ExampleRows, what: str, wrong: str) -> str:
    folder = rows.examples.folder
    return f"{what} of the {rows.examples.split} split in {folder} is not fit to train on: {wrong}; delete {folder} and run again"


def _wrong_with(
    idx: np.ndarray,
    targets: np.ndarray,
    position_ids: np.ndarray | None,
    segments: np.ndarray,
    tokenizer: Tokenizer,
    own_template: bool,
) -> str | None:
    """Return what is wrong with an example in a row, or None. idx, targets and positions are (n,).

    `own_template`: the template is a model's own, which may end questions as it ends answers.
    """
    if position_ids is not None and not np.array_equal(position_ids, np.arange(len(idx))):
        return "its positions must count from 0"
    if not (targets != IGNORE).any():
        return "it must have at least one supervised token"
    ids = np.append(idx, targets[-1])  # the last token is only a target
    aims = np.concatenate(([IGNORE], targets))  # the target for the position of each id
    at = 0
    for segment in segments:
        middle, stop = at + int(segment[PROMPT]), at + int(segment[PROMPT] + segment[RESPONSE])
        prompt, response = ids[at:middle], ids[middle:stop]
        if (aims[at:middle] != IGNORE).any():
            return "nothing of a prompt may be supervised"
        if not np.array_equal(aims[middle:stop], response):
            return "all of a response must be supervised"
        if response[-1] != tokenizer.eos_id or (response[:-1] == tokenizer.eos_id).any():
            return "a response must end with end-of-text, and hold it nowhere else"
        if text_hash(tokenizer.decode(response[:-1])) != segment[RESPONSE_HASH]:
            return f"what is supervised must be the response, but is {tokenizer.decode(response[:-1])[:60]!r}"
        control = int(at == 0 and prompt[:1].tolist() == [tokenizer.bos_id])
        ended = not own_template and (prompt == tokenizer.eos_id).any()
        if ended or text_hash(tokenizer.decode(prompt[control:])) != segment[PROMPT_HASH]:
            return f"what is masked must be the prompt, but is {tokenizer.decode(prompt)[:60]!r}"
        at = stop
    return None if at == len(ids) else "its segments must cover it"


def table(cfg: Config, splits: dict[str, ExampleRows]) -> str:
    """Return a table of what was read, dropped and kept, and of what the rows of each split contain."""
    ledger = Ledger.read(next(iter(splits.values())).examples.folder)
    out = [f"{'':<32}{'examples':>12}", f"{'read':<32}{ledger.total('read')[0]:>12,}"]
    out += [f"{f'  dropped: {rule}':<32}{ledger.total('dropped', rule)[0]:>12,}" for rule in ledger.names("dropped")]
    changes = dict.fromkeys([CUT, *ledger.names("changed")])
    out += [f"{f'  {change}':<32}{ledger.total('changed', change)[0]:>12,}" for change in changes]
    out += [f"{'kept':<32}{ledger.total('kept')[0]:>12,}", *ledger.notes, ""]
    lines: list[tuple[str, Callable[[ExampleRows], str]]] = [
        ("examples", lambda r: f"{r.examples.n_examples:,}"),
        ("tokens supervised", lambda r: f"{r.examples.n_supervised:,}"),
        ("tokens masked", lambda r: f"{len(r.examples) - r.examples.n_supervised:,}"),
        ("longest, in tokens", lambda r: f"{r.examples.lengths.max():,}"),
        ("rows of the model", lambda r: f"{r.n_rows:,}"),
        ("of them wasted on padding", lambda r: f"{r.wasted:.1%}"),
    ]
    out.append(f"{'':<32}" + "".join(f"{split:>12}" for split in splits))
    out += [f"{name:<32}" + "".join(f"{of(rows):>12}" for rows in splits.values()) for name, of in lines]
    packing = "packed, none seeing another" if cfg.train.packing else "one a row, padded"
    template = "of the model" if is_jinja(cfg.data.template) else cfg.data.template
    out.append(f"template {template}, context {cfg.model.block_size:,}, examples {packing}")
    return "\n".join(out)


def picture(rows: ExampleRows, tokenizer: Tokenizer, color: bool) -> str:
    """Return an example as a text with the supervised parts in green, or in [[brackets]]."""
    number = rows.n_rows // 2  # from the middle, because the first ones are the longest
    batch = rows.batch_of_bins([number], 1)
    n = int(rows.examples.lengths[rows.bins[number][0]]) - 1
    ids = np.append(batch.idx[0, :n], batch.targets[0, n - 1])
    supervised = np.concatenate(([False], batch.targets[0, :n] != IGNORE))
    cuts = [0, *(np.flatnonzero(np.diff(supervised)) + 1).tolist(), len(ids)]
    before, after = (GREEN, PLAIN) if color else ("[[", "]]")
    dim, undim = (DIM, PLAIN) if color else ("", "")
    parts = []
    for start, stop in itertools.pairwise(cuts):
        # control characters are escaped, because a terminal would obey them
        text = "".join(
            c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in tokenizer.decode(ids[start:stop])
        )
        parts.append(f"{before}{text}{after}" if supervised[start] else f"{dim}{text}{undim}")
    legend = f"what is supervised is {before}{'green' if color else 'in brackets'}{after}"
    return f"--- one example; {legend}\n{''.join(parts)}\n---"


def audit_examples(cfg: Config, rows: TrainingRows, tokenizer: Tokenizer) -> None:
    """Print figures of all splits and one example, and check every example. Raises AuditError."""
    assert isinstance(rows, ExampleRows), "fine-tuning has examples"
    dataset = rows.examples
    require_template(dataset.manifest, cfg.data.template)
    splits = {"train": rows}
    for split in ("val", "test"):
        others = training_rows(cfg, Examples(dataset.folder, split))
        assert isinstance(others, ExampleRows)
        splits[split] = others
    print(f"\n{dataset.folder}\n{table(cfg, splits)}\n")
    print(picture(rows, tokenizer, wants_color(sys.stdout)))
    audit(splits, tokenizer)
    n = sum(rows.examples.n_examples for rows in splits.values())
    print(f"audit: all {n:,} examples are supervised on their response and its end, and on nothing else")
