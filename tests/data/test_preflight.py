"""What is refused before a build: by the hub, the tokenizer, the context and the disk."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import tiny_config

from config import Config, DataConfig, ModelConfig, SourceConfig, TokenizerConfig
from kindling.data import build, preflight
from kindling.data.build import prepare
from kindling.data.conversations import encode_conversation
from kindling.data.process_document import Drop
from kindling.data.shards import DataError
from kindling.data.sources import list_files
from kindling.errors import KindlingError
from kindling.tokenization.train_tokenizer import train_bpe


@pytest.fixture
def no_build(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build, "atomic_folder", lambda *args: pytest.fail("the build has begun"))


def trained(tmp_path: Path) -> TokenizerConfig:
    made = train_bpe(["def add(a, b): return a + b\n" * 9], TokenizerConfig(), 300)
    (tmp_path / "tokenizer.json").write_text(made.to_json(), encoding="utf-8")
    return TokenizerConfig(kind="pretrained", path=str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        (TokenizerConfig(kind="pretrained", path="/nowhere/tokenizer.json"), "/nowhere/tokenizer.json"),
        (TokenizerConfig(pad_token="<pad>"), "model.vocab_size must be at least 262"),
    ],
)
def test_a_tokenizer_that_cannot_be_had_is_refused_before_the_build(corpus, no_build, tokenizer, words):
    cfg = tiny_config(corpus)
    with pytest.raises(KindlingError, match=words):
        prepare(replace(cfg, tokenizer=tokenizer, model=replace(cfg.model, vocab_size=257)))


def test_a_tokenizer_that_is_larger_than_the_model_is_refused_before_the_build(corpus, no_build, tmp_path):
    cfg = tiny_config(corpus)
    with pytest.raises(KindlingError, match="at least the tokenizer's"):
        prepare(replace(cfg, tokenizer=trained(tmp_path), model=replace(cfg.model, vocab_size=260)))


def test_files_that_are_smaller_than_a_block_are_refused_before_the_build(no_build, tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n", encoding="utf-8")
    cfg = tiny_config(tmp_path)
    with pytest.raises(DataError, match=r"one block of 9 tokens, but the files of .* have at most 7; .*block-size"):
        prepare(replace(cfg, model=replace(cfg.model, block_size=8)))
    preflight._require_a_block(replace(cfg, model=replace(cfg.model, block_size=6)), list_files(cfg))


def test_a_context_without_room_for_the_template_is_refused_before_the_build(no_build, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "q", "answer": "a"}\n', encoding="utf-8")
    source = SourceConfig(kind="jsonl", path=str(tmp_path / "a.jsonl"), response_field="answer")
    cfg = Config(
        model=ModelConfig(block_size=64, vocab_size=512, n_layer=1, n_head=1, n_embd=8),
        tokenizer=trained(tmp_path),
        data=DataConfig(sources=(source,)),
    )
    with pytest.raises(
        DataError, match=r"room for the template and a response, at least .* but model\.block_size is 64"
    ):
        prepare(cfg)
    tokenizer = preflight.load_pretrained(cfg.tokenizer)
    for context in range(64, 256):  # the border is where `encode_conversation` begins to keep the shortest example
        of_context = replace(cfg, model=replace(cfg.model, block_size=context))
        exchanges = (preflight.Exchange("x", "y"),)
        example = encode_conversation(exchanges, replace(cfg.data, too_long="cut"), tokenizer, context)
        if isinstance(example, Drop):
            with pytest.raises(DataError):
                preflight._require_room_for_examples(of_context, tokenizer)
        else:
            preflight._require_room_for_examples(of_context, tokenizer)


def test_a_disk_without_room_is_refused_before_the_build_with_both_figures(corpus, no_build, monkeypatch):
    cfg = tiny_config(corpus)
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=10_000))
    with pytest.raises(DataError, match=r"data/ must have room for the shards, about 0\.00 GB .* 0\.00 GB free"):
        prepare(cfg)


def test_the_estimate_is_below_the_real_size_and_knows_the_limits(corpus):
    cfg = tiny_config(corpus)
    files = list_files(cfg)
    total = sum(f.size for f in files[0])
    assert preflight.estimated_bytes(cfg, files) == total // 5 * 2
    wide = replace(cfg, model=replace(cfg.model, vocab_size=70_000))
    assert preflight.estimated_bytes(wide, files) == total // 5 * 4
    few = replace(cfg, data=replace(cfg.data, max_tokens=100))
    assert preflight.estimated_bytes(few, files) == 200
    hub = replace(cfg, data=replace(cfg.data, sources=(SourceConfig(kind="datasets", path="a/b"),)))
    assert preflight.estimated_bytes(hub, [None]) == 0
    assert preflight.estimated_bytes(replace(hub, data=replace(hub.data, max_tokens=7)), [None]) == 14
