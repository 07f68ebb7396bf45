"""An evil pickle in place of every file that is loaded anywhere, by an attacker who recomputes each checksum that covers it."""

import base64
import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_run
from test_examples import TOKENIZER, conversations, write_examples

import autocomplete
import export
from config import ModelConfig
from faults.runs import Forked, flags
from kindling.data.examples import Examples
from kindling.data.ledger import read_documents
from kindling.data.shards import DataError
from kindling.files import sha256_file, with_checksum, write_json
from kindling.formats import gguf_format, hf_format
from kindling.formats.model_card import _read_ledger
from kindling.runs.checkpoint import SEAL, RunDirectory
from kindling.runs.metrics import read_metrics

pytestmark = pytest.mark.faults
STOCK = ModelConfig(block_size=32, vocab_size=512, n_layer=2, n_head=2, n_embd=32)


class Evil:
    """What makes the canary's folder when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return (os.mkdir, (str(self.canary),))


def payloads(canary: Path) -> dict[str, bytes]:
    """The same attack in every wrapping that one of our files could be taken for."""
    evil, saved, array, packed = Evil(canary), io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"step": evil, "weights": torch.zeros(2)}, saved)
    np.save(array, np.array([evil], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(packed, "w") as z:
        z.writestr("a.npy", array.getvalue())
    model = base64.b64encode(pickle.dumps(evil, 2)).decode()
    return {
        "pickle, protocol 2": pickle.dumps(evil, 2),
        "pickle, protocol 5": pickle.dumps(evil, 5),
        "torch.save": saved.getvalue(),
        "npy": array.getvalue(),
        "npz": packed.getvalue(),
        "gzip": gzip.compress(pickle.dumps(evil, 2)),
        "yaml apply": f"!!python/object/apply:os.mkdir ['{canary}']\n".encode(),
        "yaml in a value": f"preset: !!python/object/apply:os.mkdir ['{canary}']\nmodel: {{}}\n".encode(),
        "json": json.dumps({"type": "sentencepiece", "model": model}).encode(),
        "json, py/reduce": json.dumps({"py/reduce": [{"py/function": "os.mkdir"}, [str(canary)]]}).encode(),
    }


def reseal(path: Path) -> None:
    """Recompute every checksum that covers the file at `path`, as one does who knows how they are made."""
    manifest = path.parent / "manifest.json"
    if path.name == "config.yaml":
        raw = path.read_bytes()
        path.write_bytes(SEAL.encode() + hashlib.sha256(raw).hexdigest().encode() + b"\n" + raw)
    elif path != manifest and manifest.is_file():
        content = json.loads(manifest.read_text(encoding="utf-8"))
        if path.name in content.get("files", {}):
            content["files"][path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for split in content.get("splits", {}).values():
            for entry in (*split["shards"], split["table"], split["segments"]):
                if entry is not None and entry["file"] == path.name:
                    entry["sha256"] = sha256_file(path)
        if path.name == "tokenizer.json":
            content["tokenizer_sha256"] = sha256_file(path)
        write_json(manifest, with_checksum(content))


class Attacks:
    """Counts what came of attacks on one folder of canaries."""

    def __init__(self, canaries: Path):
        canaries.mkdir()
        self.canaries, self.tried, self.one_line, self.files, self.uncaught = canaries, 0, 0, set(), set()

    def on(self, path: Path) -> Iterator[str]:
        """Yield with each payload in place of the file at `path`, and restore it, and what covers it, afterwards."""
        covers = [p for p in (path, path.parent / "manifest.json") if p.is_file()]
        originals = {p: p.read_bytes() for p in covers}
        self.files.add(path.name)
        for name, raw in payloads(self.canaries / "canary").items():
            path.write_bytes(raw)
            reseal(path)
            self.tried += 1
            yield name
            for p, original in originals.items():
                p.write_bytes(original)

    def happened(self) -> int:
        """Return whether anything was run."""
        return len(list(self.canaries.iterdir()))

    def load(self, what: str, how, *given) -> None:
        """Load an attacked file, and count how it was refused."""
        try:
            how(*given)
        except Exception as e:
            self.one_line += "\n" not in str(e)
            if not isinstance(e, (ValueError, RuntimeError)) and type(e).__module__ in ("builtins", "_pickle"):
                self.uncaught.add(f"{what}: {type(e).__name__}")
        else:
            self.one_line += 1  # taken for nothing, such as a line of metrics that is none


@pytest.fixture
def attacks(tmp_path) -> Attacks:
    """Attacks whose canary is in a folder of its own."""
    return Attacks(tmp_path / "canaries")


def test_the_payloads_are_live(tmp_path):
    raw = payloads(tmp_path / "canary")
    for live in (
        lambda: pickle.loads(raw["pickle, protocol 2"]),
        lambda: torch.load(io.BytesIO(raw["torch.save"]), weights_only=False),
        lambda: np.load(io.BytesIO(raw["npy"]), allow_pickle=True),
    ):
        live()
        (tmp_path / "canary").rmdir()  # it was there


def test_no_file_of_a_run_or_of_its_data_runs_anything(work, corpus, tmp_path, attacks, record):
    """Every file under runs/NAME and data/, while the real scripts go on with the run and use it."""
    began, place, refused = time.perf_counter(), tmp_path / "place", 0
    shutil.copytree(work / "data", place / "data")
    ignored = shutil.ignore_patterns("step_000004", "step_000008", "tensorboard")
    shutil.copytree(work / "runs/base", place / "runs/base", ignore=ignored)
    train = ("main.py", flags(corpus, "base", max_steps=13))
    infer = ("generate.py", ["base", "--prompt", "def ", "--max-new-tokens", "2"])
    files = [p for p in sorted((place / "runs/base").rglob("*")) + sorted((place / "data").rglob("*")) if p.is_file()]
    wrapped = {
        ".npy": ("npy", "npz"),
        ".json": ("json", "json, py/reduce"),
        ".pt": ("torch.save",),
        ".yaml": ("yaml apply",),
    }
    for path in files:
        usual = {*wrapped.get(path.suffix, ()), "pickle, protocol 2"} | (
            {"yaml in a value"} if path.suffix == ".yaml" else set()
        )
        for name in attacks.on(path):
            if name not in usual:
                attacks.tried -= 1  # every wrapping would be as many starts again: test_every_loader has them
                continue
            of_run = path.is_relative_to(place / "runs")
            child = Forked(*(infer if of_run and path.parent.name != "data" else train), place)
            ended = child.wait()
            assert "Traceback" not in child.text, (path, name, child.text)
            refused += bool(ended and child.error)
            for made in (place / "runs/base").glob("step_000013"):
                shutil.rmtree(made)
    canaries, tried = attacks.happened(), attacks.tried
    note = (
        f"{len(files)} files of a run and of its data, used by main.py and generate.py; {refused} refused in one line, "
        f"{tried - refused} not read (such as a ledger, or lines of metrics that are none)"
    )
    record("evil pickle, scripts", tried, tried - canaries, canaries, time.perf_counter() - began, note)
    assert not canaries


def test_no_loader_runs_anything_in_any_wrapping(corpus, tmp_path, attacks, record):
    began = time.perf_counter()
    run = make_run(tmp_path / "run", corpus, STOCK)
    folder, cfg = run.newest(), run.config()
    for path in (folder / "state.pt", folder / "model.safetensors", folder / "manifest.json"):
        for name in attacks.on(path):
            attacks.load(name, load_checkpoint, run, folder)
    for path in sorted(run.data.iterdir()):
        for name in attacks.on(path):
            attacks.load(name, lambda: [run.heldout(split) for split in ("val", "test")])
            attacks.load(name, _read_ledger, run)
    for path in (run.path / "config.yaml", run.path / "tokenizer.json"):
        for name in attacks.on(path):
            attacks.load(name, run.tokenizer)
            attacks.load(name, run.config)
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "documents.jsonl.gz").touch()
    for name in attacks.on(tmp_path / "metrics.jsonl"):
        attacks.load(name, read_metrics, tmp_path / "metrics.jsonl")
    for name in attacks.on(tmp_path / "documents.jsonl.gz"):
        attacks.load(name, lambda: list(read_documents(tmp_path)))
    examples = write_examples(tmp_path / "examples", conversations(), TOKENIZER, 128)
    for path in (examples / "train-segments.npy", examples / "train-documents.npy", examples / "train-00000.npy"):
        for name in attacks.on(path):
            with pytest.raises(DataError) as error:
                Examples(examples, "train")
            assert "\n" not in str(error.value), name
    attack_exports(run, replace(cfg, model=STOCK), tmp_path / "exports", attacks)
    canaries, tried = attacks.happened(), attacks.tried
    note = f"{len(attacks.files)} files, {len(payloads(tmp_path))} wrappings each, checksums recomputed; state, weights, shards, "
    note += "tables, segments, tokenizer, config, manifests, ledger, log, metrics, hub folders, gguf, int8"
    record("evil pickle, every loader", tried, tried - canaries, canaries, time.perf_counter() - began, note)
    assert not canaries and not attacks.uncaught, attacks.uncaught


def load_checkpoint(run: RunDirectory, folder: Path) -> None:
    """Load a checkpoint as resuming does; nothing may come of it."""
    from kindling.runs.checkpoint import load_state, load_weights
    from model import build_model

    run.newest()
    load_state(folder)
    load_weights(folder, build_model(STOCK))


def attack_exports(run: RunDirectory, cfg, out: Path, attacks: Attacks) -> None:
    """Attack each format that a run is exported to, and that is read again."""
    out.mkdir()
    for to in ("hf", "int8", "gguf"):
        assert export.main([str(run.path), "--to", to, "--out", str(out / (to if to != "gguf" else "x.gguf"))]) == 0
    for path in sorted((out / "hf").iterdir()):
        for name in attacks.on(path):
            attacks.load(name, hf_format.read, out / "hf")
            attacks.load(name, hf_format.require_same_tokenizer, out / "hf", run.tokenizer())
    weights = (out / "hf/model.safetensors").rename(out / "aside")
    (out / "hf/pytorch_model.bin").touch()
    for name in attacks.on(out / "hf/pytorch_model.bin"):
        with pytest.raises(hf_format.HubFormatError, match=r"pytorch_model\.bin, which could run code"):
            hf_format.read(out / "hf")
        assert name
    weights.rename(out / "hf/model.safetensors")
    for path in sorted((out / "int8").iterdir()):
        for name in attacks.on(path):
            meta = (
                json.loads((out / "int8/config.json").read_text(encoding="utf-8"))
                if path.name != "config.json"
                else None
            )
            if path.name == "model.safetensors":
                write_json(out / "int8/config.json", {**meta, "weights_sha256": sha256_file(path)})
            attacks.load(name, autocomplete.Completer, out / "int8")
            if meta is not None:
                write_json(out / "int8/config.json", meta)
    for name in attacks.on(out / "x.gguf"):
        attacks.load(name, gguf_format.read, out / "x.gguf")
