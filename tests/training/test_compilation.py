"""Whether a run is compiled, by its length and by what torch's cache of kernels has."""

from dataclasses import replace

import pytest
from conftest import tiny_config
from test_trainer import make_trainer

from kindling import device
from kindling.training import compilation
from kindling.training.compilation import wants_compile
from model import build_model


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of kernels."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def wanted(cfg) -> bool:
    return wants_compile(cfg, build_model(cfg.model), device.resolve(cfg.train))


def lasting(cfg, minutes: float):
    return replace(cfg, train=replace(cfg.train, max_minutes=minutes, max_steps=None))


@pytest.mark.skipif(not device.has_compiler("cpu"), reason="no C++ compiler")
def test_a_short_run_is_compiled_where_the_kernels_are_there(corpus, tmp_path, cache, monkeypatch):
    cfg = tiny_config(corpus, compile="auto")
    short = lasting(cfg, 0.6)
    assert not wanted(short) and wanted(lasting(cfg, 1.5))
    trainer = make_trainer(tmp_path / "r", replace(cfg, train=replace(cfg.train, compile="on")))
    monkeypatch.setattr(trainer.model, "enable_compile", lambda *_: None)
    assert trainer.compile()
    assert wanted(short) and not wanted(lasting(cfg, 0.4))
    assert not wanted(cfg)  # a run by steps gives the same bits whatever is in the cache
    wider = replace(short, model=replace(short.model, d_ff=48))
    more_rows = replace(short, train=replace(short.train, micro_batch_size=1))
    assert not wanted(wider) and not wanted(more_rows)
    monkeypatch.setattr(compilation, "CODE", ("config",))
    assert not wanted(short)  # other code has other kernels


def test_a_failed_compilation_is_not_marked(corpus, tmp_path, cache, monkeypatch, capsys):
    trainer = make_trainer(tmp_path / "r", tiny_config(corpus, compile="on"))

    def fails(*_) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(trainer.model, "enable_compile", fails)
    assert not trainer.compile() and not list(cache.rglob("kindling/*"))
    assert "no such instruction" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_costs_nothing(corpus, tmp_path, cache):
    cfg = tiny_config(corpus)
    cache.write_text("a file", encoding="utf-8")
    compilation.mark_compiled(cfg, device.resolve(cfg.train))
    assert not wanted(lasting(replace(cfg, train=replace(cfg.train, compile="auto")), 0.6))
