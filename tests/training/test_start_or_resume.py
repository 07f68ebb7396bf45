import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_run, tiny_config
from safetensors.torch import load_file, save_file
from test_examples import TOKENIZER, conversations, write_examples

from config import ModelConfig, TokenizerConfig
from kindling.data import build
from kindling.data.build import prepare
from kindling.data.examples import ExampleRows, Examples, training_rows
from kindling.data.shards import TokenDataset
from kindling.device import DeviceError
from kindling.files import sha256_file, with_checksum, write_json
from kindling.formats import hf_format
from kindling.runs.checkpoint import CheckpointError, RunDirectory
from kindling.tokenization.pretrained import load_pretrained
from kindling.tokenization.train_tokenizer import train_bpe
from kindling.training.stage import train_stage
from kindling.training.start_or_resume import (
    check_config_changes,
    check_new_run,
    data_of_run,
    start_or_resume,
    weight_settings,
)
from model import GPT
from presets import preset

pytestmark = pytest.mark.usefixtures("forked_workers")


@pytest.fixture(scope="module")
def built(corpus, tmp_path_factory) -> Path:
    """The data of the tiny config, built once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("built"))
        return prepare(tiny_config(corpus)).absolute()


@pytest.mark.parametrize("document_mask", [True, False])
def test_documents_are_masked_from_each_other_where_the_model_says_so(corpus, built, document_mask):
    cfg = tiny_config(corpus)
    cfg = replace(cfg, model=replace(cfg.model, document_mask=document_mask))
    dataset = TokenDataset(built, "train")
    for batch in (training_rows(cfg, dataset).rows(0, 2), next(iter(dataset.in_order(cfg.model, 2)))):
        assert (batch.position_ids is not None) == document_mask


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
    assert (rows.rows(0, 2).position_ids is not None) == packing


@pytest.mark.slow
def test_a_run_that_began_before_there_was_a_table_of_documents_goes_on_when_its_shards_are_gone(
    corpus, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    cfg = tiny_config(corpus)
    monkeypatch.setattr(build, "RECIPE", build.RECIPE - 1)
    monkeypatch.setattr(
        "kindling.tokenization.train_tokenizer.control_tokens", list
    )  # nor tokens of fill-in-the-middle
    old = prepare(cfg)
    manifest = json.loads((old / "manifest.json").read_text(encoding="utf-8"))
    for split, info in manifest["splits"].items():
        del info["table"]
        (old / f"{split}-documents.npy").unlink()
    write_json(old / "manifest.json", with_checksum(manifest))
    run = RunDirectory(tmp_path / "runs" / "old")
    run.create(cfg, old)
    assert run.heldout("val").documents is None and run.tokenizer().fim is None
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert data_of_run(cfg, run).folder == old
    ids = TokenDataset(old, "train").read(0, 1000)
    shutil.rmtree("data")
    rebuilt = data_of_run(cfg, run)  # with the vocabulary of the run
    assert rebuilt.folder != old and rebuilt.documents is not None
    assert np.array_equal(rebuilt.read(0, 1000), ids)


def test_a_run_keeps_the_tables_of_its_held_out_documents(corpus, built, tmp_path):
    run = RunDirectory(tmp_path / "runs" / "new")
    run.create(tiny_config(corpus), built)
    for split in ("val", "test"):
        assert np.array_equal(run.heldout(split).documents, TokenDataset(built, split).documents)


@pytest.fixture(scope="module")
def hub(corpus, tmp_path_factory):
    """A hub folder with weights of the tiny shape and another seed; the config of a run that starts from it, and its data."""
    root = tmp_path_factory.mktemp("hub")
    folder = root / "model"
    folder.mkdir()
    cfg = tiny_config(corpus)
    cfg = replace(cfg, model=replace(cfg.model, dropout=0.0))
    texts = [path.read_text(encoding="utf-8") for path in sorted(corpus.rglob("*.py"))[:20]]
    tokenizer = train_bpe(texts, cfg.tokenizer, cfg.model.vocab_size)
    torch.manual_seed(5)
    model = GPT(cfg.model)
    hf_format.write(folder, model, tokenizer, "")
    of_folder = TokenizerConfig(kind="pretrained", path=str(folder))
    cfg = replace(cfg, tokenizer=of_folder, train=replace(cfg.train, init_from=str(folder)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        prepare(cfg)
    return model, cfg, root / "data"


@pytest.fixture
def in_tmp(hub, tmp_path, monkeypatch) -> None:
    """Make the test's folder, with the data of `hub`, the working directory."""
    shutil.copytree(hub[2], tmp_path / "data")
    monkeypatch.chdir(tmp_path)


def taken_up(cfg, where, begun=False):
    run = RunDirectory(where / "runs" / "new")
    assert run.exists() == begun
    if begun:
        check_config_changes(run.config(), cfg, run)
        dataset = data_of_run(cfg, run)
    else:
        check_new_run(cfg, run, fresh=False)
        dataset = TokenDataset(prepare(cfg), "train")
    return start_or_resume(cfg, run, begun, dataset, training_rows(cfg, dataset))


@pytest.mark.parametrize("backbone", ["kindling", "transformers"])
def test_a_run_starts_from_the_weights_of_a_hub_folder(hub, in_tmp, tmp_path, backbone):
    theirs, cfg, _ = hub
    cfg = replace(cfg, model=replace(cfg.model, backbone=backbone))
    trainer = taken_up(cfg, tmp_path)
    ours = dict(trainer.model.for_generation().named_parameters())
    assert all(torch.equal(p, ours[name]) for name, p in theirs.named_parameters())
    assert trainer.state.initial_sha256 == sha256_file(Path(cfg.train.init_from) / "model.safetensors")


def test_a_run_goes_on_only_from_the_hub_weights_that_it_started_from(hub, in_tmp, tmp_path):
    _, cfg, _ = hub
    folder = tmp_path / "copy"
    shutil.copytree(cfg.train.init_from, folder)
    cfg = replace(cfg, train=replace(cfg.train, init_from=str(folder)))
    taken_up(cfg, tmp_path).save(required=True)
    taken_up(cfg, tmp_path, begun=True)
    weights = load_file(folder / "model.safetensors")
    save_file({name: w + 1 for name, w in weights.items()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="has been trained since"):
        taken_up(cfg, tmp_path, begun=True)
    shutil.rmtree(folder)
    taken_up(cfg, tmp_path, begun=True)


def test_hub_weights_of_another_shape_are_refused_before_any_data_is_read(hub, tmp_path):
    _, cfg, _ = hub
    cfg = replace(cfg, model=replace(cfg.model, n_layer=3, activation="relu", block_size=16, d_ff=128))
    with pytest.raises(CheckpointError) as caught:
        check_new_run(cfg, RunDirectory(tmp_path / "new"), fresh=False)
    assert str(caught.value).endswith("set --model.block-size 32 --model.n-layer 2 --model.activation gelu_new")


def test_hub_weights_with_another_tokenizer_are_refused(hub, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, cfg, _ = hub
    own = TokenizerConfig(pad_token="<pad>")
    with pytest.raises(hf_format.HubFormatError, match=rf"--tokenizer\.path {cfg.train.init_from}"):
        taken_up(replace(cfg, tokenizer=own), tmp_path)
    assert not (tmp_path / "runs").exists()
    other = tmp_path / "tokenizer.json"
    other.write_text(train_bpe(["abc"], TokenizerConfig(), 300).to_json(), encoding="utf-8")
    with pytest.raises(hf_format.HubFormatError, match="is another"):
        check_new_run(
            replace(cfg, tokenizer=TokenizerConfig(kind="pretrained", path=str(other))),
            RunDirectory(tmp_path / "new"),
            False,
        )


def test_the_context_of_rotary_hub_weights_may_be_another(hub, tmp_path):
    _, cfg, _ = hub
    model = replace(cfg.model, position="rope", norm="rmsnorm")
    torch.manual_seed(6)
    hf_format.write(tmp_path, GPT(model), load_pretrained(cfg.tokenizer), "")
    cfg = replace(cfg, model=replace(model, block_size=16), train=replace(cfg.train, init_from=str(tmp_path)))
    check_new_run(cfg, RunDirectory(tmp_path / "new"), fresh=False)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"n_layer": 3}, ["n_layer 2 for 3", "set --model.n-layer 2"]),
        ({"n_embd": 64, "position": "rope"}, ["n_embd 32 for 64", "--model.position learned"]),
        ({"block_size": 64}, ["block_size 32 for 64"]),
        ({"backbone": "transformers"}, ["backbone kindling for transformers"]),
    ],
)
def test_a_base_of_another_shape_is_refused_before_the_data_are_built(corpus, tmp_path, model, words):
    base = make_run(tmp_path / "base", corpus)
    cfg = tiny_config(corpus, init_from=str(base.path))
    run = RunDirectory(tmp_path / "runs/child")
    check_new_run(cfg, run, False)
    with pytest.raises(CheckpointError) as error:
        check_new_run(replace(cfg, model=replace(cfg.model, **model)), run, False)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in [str(base.path), *words])


def test_a_base_may_differ_in_what_no_weight_depends_on(corpus, tmp_path):
    base = make_run(tmp_path / "base", corpus, model=replace(tiny_config(corpus).model, position="rope"))
    cfg = tiny_config(corpus, init_from=str(base.path))
    longer = replace(base.config().model, block_size=64, dropout=0.3, rope_theta=5e5)
    check_new_run(replace(cfg, model=longer), RunDirectory(tmp_path / "runs/child"), False)


def test_a_base_with_another_tokenizer_or_without_a_checkpoint_is_refused_before_the_data_are_built(corpus, tmp_path):
    base = make_run(tmp_path / "base", corpus)
    other = tmp_path / "tokenizer.json"
    other.write_text(train_bpe(["another text"], TokenizerConfig(), 300).to_json(), encoding="utf-8")
    cfg = tiny_config(corpus, init_from=str(base.path))
    run = RunDirectory(tmp_path / "runs/child")
    with pytest.raises(CheckpointError, match=r"same tokenizer, but .* --tokenizer\.path"):
        check_new_run(replace(cfg, tokenizer=TokenizerConfig(kind="pretrained", path=str(other))), run, False)
    shutil.rmtree(base.newest())
    with pytest.raises(CheckpointError, match="must name a run with a checkpoint"):
        check_new_run(cfg, run, False)


@pytest.mark.parametrize(("train", "word"), [({"threads": 100_000}, r"train\.threads"), ({"device": "mps"}, "device")])
def test_hardware_that_is_not_there_is_refused_before_the_data_are_built(corpus, tmp_path, train, word):
    if "device" in train and torch.backends.mps.is_available():
        pytest.skip("this machine has MPS")
    with pytest.raises(DeviceError, match=word):
        train_stage(tiny_config(corpus, **train), False, lambda trainer: [])


@pytest.mark.parametrize(
    "changed",
    [
        *(
            {"vocab_size": 300},
            {"n_layer": 2},
            {"n_embd": 48},
            {"n_kv_head": 2},
            {"d_ff": 40},
            {"activation": "swiglu"},
        ),
        *({"activation": "relu"}, {"bias": False}, {"norm": "rmsnorm"}, {"norm": "rmsnorm", "bias": False}),
        *({"final_norm": False}, {"attn_out_proj": False}, {"bigram_rows": 8}, {"tie_embeddings": False}),
        *({"tie_embeddings": False, "head_bias": True}, {"position": "rope"}, {"position": "sinusoidal"}),
        *(
            {"block_size": 64},
            {"position": "rope", "block_size": 64},
            {"qk_norm": True},
            {"qk_norm": "learned"},
            {"dropout": 0.5},
            {"n_head": 2},
        ),
    ],
    ids=str,
)
def test_the_settings_of_weights_differ_where_their_names_or_shapes_do(changed):
    cfg = ModelConfig(vocab_size=256, n_layer=1, n_embd=32, n_head=4, block_size=16)
    other = replace(cfg, **changed)

    def shapes(c):
        return {name: p.shape for name, p in GPT(c).named_parameters()}

    assert (weight_settings(cfg) == weight_settings(other)) == (shapes(cfg) == shapes(other))
