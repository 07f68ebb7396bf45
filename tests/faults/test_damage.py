"""Flipped bits and cut files, in checkpoints, in the data and in the other files of a run."""

import random
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from config import Config
from faults.runs import completed, damage, final_weights, flags, same_json
from kindling.data.ledger import Ledger, read_documents
from kindling.data.shards import SPLITS, TokenDataset
from kindling.errors import KindlingError
from kindling.runs.checkpoint import RunDirectory
from kindling.runs.loading import find_run, load_model
from kindling.runs.metrics import read_metrics
from kindling.tokenization.tokenizer import load_json

pytestmark = pytest.mark.faults
TRIALS = 500


@pytest.fixture
def run(work, tmp_path) -> RunDirectory:
    """A copy of the run `base`, with checkpoints 4, 8 and 12."""
    shutil.copytree(work / "runs/base", tmp_path / "base")
    return find_run(tmp_path / "base")


def test_every_flip_in_a_checkpoint_is_found_and_the_one_before_is_used(run, record, capsys):
    began, rng, found, same, unnoticed = time.perf_counter(), random.Random(4), 0, 0, []
    newest = run.newest()
    files = {path: path.read_bytes() for path in sorted(newest.iterdir())}
    for _ in range(TRIALS):
        path = rng.choice(sorted(files))
        changed = damage(files[path], rng)
        path.write_bytes(changed)
        capsys.readouterr()
        used = run.newest()
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
        if used.name == "step_000008":
            found += len(said) == 1 and "falling back to step_000008" in said[0]
        elif path.suffix == ".json" and same_json(changed, files[path]):
            same += 1  # white space or the like, and every file is as it was written
        else:
            unnoticed.append((path.name, changed))
        path.write_bytes(files[path])
    note = f"{same} of them left the manifest's meaning as it was, and the newest was used"
    record("flips and cuts, checkpoint", TRIALS, found + same, len(unnoticed), time.perf_counter() - began, note)
    assert not unnoticed and found + same == TRIALS


def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before_to_the_same_bits(work, corpus, record):
    began, rng, same = time.perf_counter(), random.Random(5), 0
    wanted = final_weights(RunDirectory(work / "runs/base"))
    names = ("model.safetensors", "state.pt", "manifest.json")
    for name in names:
        shutil.copytree(work / "runs/base", work / "runs" / f"damaged-{name}")
        path = work / f"runs/damaged-{name}/step_000012/{name}"
        path.write_bytes(path.read_bytes()[: rng.randrange(10, 200)])
        given = flags(corpus, f"damaged-{name}", save_every=4, keep_checkpoints=3)
        child = completed("main.py", given, work)
        assert "falling back to step_000008" in child.text and "resuming at step 8" in child.text
        same += final_weights(RunDirectory(work / f"runs/damaged-{name}")) == wanted
    seconds = time.perf_counter() - began
    record("resumed from the checkpoint before", len(names), same, len(names) - same, seconds, "python main.py, forked")
    assert same == len(names)


def opened_data(folder: Path, cfg: Config) -> None:
    """Open a data folder as training and evaluation do, and read all of it."""
    for split in SPLITS:
        dataset = TokenDataset(folder, split)
        dataset.require_fits(cfg.model.vocab_size, load_json(folder / "tokenizer.json", cfg.tokenizer).sha256)
        dataset.read(0, len(dataset))


def test_every_flip_in_the_data_is_found(work, run, tmp_path, record):
    """Of what training reads: shards, tables, the tokenizer and the manifest of a data folder."""
    (source,) = [p for p in (work / "data").iterdir() if p.is_dir()]
    folder, cfg = tmp_path / "data", run.config()
    shutil.copytree(source, folder)
    began, rng, outcome, unnoticed = time.perf_counter(), random.Random(6), Counter(), []
    aside = {"ledger.json", "documents.jsonl.gz"}
    files = {path: path.read_bytes() for path in sorted(folder.iterdir()) if path.name not in aside}
    tokenizer = load_json(folder / "tokenizer.json", cfg.tokenizer).sha256
    for _ in range(TRIALS):
        path = rng.choice(sorted(files))
        changed = damage(files[path], rng)
        path.write_bytes(changed)
        try:
            opened_data(folder, cfg)
        except KindlingError as e:
            assert "\n" not in str(e)
            outcome["found"] += 1
        else:
            equal = path.suffix == ".json" and same_json(changed, files[path])
            if equal or (path.name == "tokenizer.json" and load_json(path, cfg.tokenizer).sha256 == tokenizer):
                outcome["the same"] += 1
            else:
                unnoticed.append((path.name, changed))
        path.write_bytes(files[path])
    note = f"shards, tables, manifest and tokenizer; {outcome['the same']} left the meaning of a JSON file as it was"
    good, seconds = outcome.total(), time.perf_counter() - began
    record("flips and cuts, data", TRIALS, good, len(unnoticed), seconds, note)
    assert not unnoticed and good == TRIALS


def used_run(run: RunDirectory) -> tuple:
    """Use a run as evaluation does, and return what matters of what it was told."""
    model, folder = load_model(run, torch.device("cpu"))
    heldout = [run.heldout(split) for split in ("val", "test")]
    shapes = [(len(d), d.info, d.manifest["eos_id"], d.read(0, len(d)).tobytes()) for d in heldout]
    return run.config(), run.tokenizer().sha256, folder.name, model.cfg, shapes


def test_every_flip_in_the_other_files_of_a_run_is_found_or_changes_nothing(run, record, capsys):
    began, rng, outcome, unnoticed = time.perf_counter(), random.Random(7), Counter(), []
    names = ["config.yaml", "tokenizer.json", *(f"data/{p.name}" for p in sorted(run.data.iterdir()))]
    files = {run.path / name: (run.path / name).read_bytes() for name in names if name != "data/ledger.json"}
    restore_config = used_run(run)
    for trial in range(TRIALS):
        path = sorted(files)[trial % len(files)]
        changed = damage(files[path], rng)
        path.write_bytes(changed)
        try:
            used = used_run(run)
        except KindlingError as e:
            assert "\n" not in str(e)
            outcome["found"] += 1
        else:
            if used == restore_config:
                outcome["the same"] += 1
            else:
                unnoticed.append((path.name, changed))
        path.write_bytes(files[path])
    note = (
        f"config, tokenizer, held-out shards, tables and manifest; {outcome['the same']} changed nothing that is used"
    )
    good, seconds = outcome.total(), time.perf_counter() - began
    record("flips and cuts, other files of a run", TRIALS, good, len(unnoticed), seconds, note)
    assert not unnoticed and good == TRIALS


def plain(record) -> object:
    """Return a record as something that can be compared."""
    return (list(record.rows.values()), record.notes, record.labels) if isinstance(record, Ledger) else record


def test_what_has_no_checksum_is_only_shown(work, run, tmp_path, record):
    """The ledger, the log of documents and the metrics: no bit of a model depends on them."""
    (source,) = [p for p in (work / "data").iterdir() if p.is_dir()]
    began, rng, outcome = time.perf_counter(), random.Random(8), Counter()
    readers = {
        tmp_path / "ledger.json": Ledger.read,
        tmp_path / "documents.jsonl.gz": lambda folder: list(read_documents(folder)),
        tmp_path / "metrics.jsonl": lambda folder: read_metrics(folder / "metrics.jsonl"),
    }
    for path, read in readers.items():
        raw = (run.path / path.name if path.name == "metrics.jsonl" else source / path.name).read_bytes()
        path.write_bytes(raw)
        whole = read(tmp_path)
        for _ in range(200):
            path.write_bytes(damage(raw, rng))
            try:
                after = read(tmp_path)
            except (KindlingError, ValueError, KeyError, TypeError):
                outcome[path.name, "refused"] += 1
            else:
                same = plain(after) == plain(whole)
                outcome[path.name, "the same" if same else "shown"] += 1
    said = "; ".join(f"{name}: {count} {what}" for (name, what), count in sorted(outcome.items()))
    note = f"no model depends on them, so a changed figure is shown as it stands ({said})"
    tried, seen = outcome.total(), sum(n for (_, what), n in outcome.items() if what != "shown")
    record("flips and cuts, records without a checksum", tried, seen, 0, time.perf_counter() - began, note)
    assert outcome["documents.jsonl.gz", "shown"] == 0  # gzip has a checksum of its own
