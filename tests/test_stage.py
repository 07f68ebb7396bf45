import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import tiny_config
from test_examples import TOKENIZER, conversations, write_examples

import data_pipeline
from checkpoint import RunDirectory
from config import preset
from data_pipeline import prepare
from examples import ExampleRows, Examples
from shards import TokenDataset
from stage import training_data, training_rows


@pytest.mark.parametrize("document_mask", [True, False])
def test_documents_are_masked_from_each_other_where_the_model_says_so(corpus, tmp_path, monkeypatch, document_mask):
    monkeypatch.chdir(tmp_path)
    cfg = tiny_config(corpus)
    cfg = replace(cfg, model=replace(cfg.model, document_mask=document_mask))
    dataset = TokenDataset(prepare(cfg), "train")
    for batch in (training_rows(cfg, dataset).rows(0, 2), next(iter(dataset.in_order(cfg.model, 2)))):
        assert (batch.positions is not None) == document_mask


@pytest.mark.parametrize("packing", [True, False])
def test_examples_are_packed_or_padded_as_the_config_says(tmp_path, packing):
    examples = Examples(write_examples(tmp_path / "x", conversations(), TOKENIZER, 128), "train")
    cfg = preset("docstrings")
    cfg = replace(
        cfg, model=replace(cfg.model, block_size=128), train=replace(cfg.train, packing=packing, batch_size=4)
    )
    rows = training_rows(cfg, examples)
    assert isinstance(rows, ExampleRows)
    assert (rows.packing, rows.batch_size, rows.seed, rows.block_size) == (packing, 4, cfg.train.seed, 128)
    assert (rows.rows(0, 2).positions is not None) == packing


def test_a_run_that_began_before_there_was_a_table_of_documents_goes_on_when_its_shards_are_gone(
    corpus, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    cfg = tiny_config(corpus)
    monkeypatch.setattr(data_pipeline, "RECIPE", data_pipeline.RECIPE - 1)
    old = prepare(cfg)
    manifest = json.loads((old / "manifest.json").read_text(encoding="utf-8"))
    for split, info in manifest["splits"].items():
        del info["table"]
        (old / f"{split}-documents.npy").unlink()
    (old / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    run = RunDirectory(tmp_path / "runs" / "old")
    run.create(cfg, old)
    assert run.heldout("val").documents is None
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert training_data(cfg, run).folder == old
    ids = TokenDataset(old, "train").read(0, 1000)
    shutil.rmtree("data")
    rebuilt = training_data(cfg, run)
    assert rebuilt.folder != old and rebuilt.documents is not None
    assert np.array_equal(rebuilt.read(0, 1000), ids)


def test_a_run_keeps_the_tables_of_its_held_out_documents(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = prepare(tiny_config(corpus))
    run = RunDirectory(tmp_path / "runs" / "new")
    run.create(tiny_config(corpus), folder)
    for split in ("val", "test"):
        assert np.array_equal(run.heldout(split).documents, TokenDataset(folder, split).documents)
