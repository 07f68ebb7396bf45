from dataclasses import replace

import pytest
from conftest import tiny_config
from test_examples import TOKENIZER, conversations, write_examples

from config import preset
from data_pipeline import prepare
from examples import ExampleRows, Examples
from shards import TokenDataset
from stage import training_rows


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
