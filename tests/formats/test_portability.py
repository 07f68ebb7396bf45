"""The table of where each preset can go, and the flags that it names."""

from dataclasses import replace

import pytest

from config import TokenizerConfig
from kindling.formats.portability import BEGIN, END, PAGE, advice, destinations, flag_of, row, table
from presets import PRESETS, preset

NAMES = [name for name, make in PRESETS.items() if not make().data.instructions or make().train.init_from]


def test_the_page_holds_the_present_table():
    held = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert held.strip() == table().strip()  # else run `python -m kindling.formats.portability --write`


@pytest.mark.parametrize("name", NAMES)
def test_with_the_flags_that_it_names_a_preset_goes_everywhere(name):
    cfg = preset(name)
    for destination in destinations(cfg).values():
        values = {"model": {}, "tokenizer": {}}
        for field, value in destination.needs.items():
            section, setting = field.split(".")
            values[section][setting] = value
        model = replace(cfg.model, **values["model"])
        changed = replace(cfg, model=model, tokenizer=replace(cfg.tokenizer, **values["tokenizer"]))
        assert [d for d in destinations(changed).values() if d.holder == destination.holder and d.is_open]


def test_the_flags_of_the_table_are_flags_of_main():
    from kindling.cli import parse_cli
    from main import Flags

    needs = destinations(preset("autocomplete"))["llama.cpp"].needs
    assert set(needs) == {"model.activation", "model.head_bias", "tokenizer.normalizer"}
    words = " ".join(flag_of(field, value) for field, value in needs.items())
    cfg = parse_cli(Flags, "", ["--preset", "autocomplete", *words.split()]).config
    assert not destinations(cfg)["llama.cpp"].needs


def test_a_portable_preset_goes_everywhere_without_our_code():
    for name in ("portable-5m", "portable-50m", "portable-150m"):
        cells = row(name, preset(name))
        assert cells[1:] == ["`Qwen3ForCausalLM`", "not needed", "`qwen3`", "yes", "`Qwen3ForCausalLM`", "yes", ""]


def test_a_sentencepiece_tokenizer_stands_in_every_way():
    cfg = replace(preset("portable-5m"), tokenizer=TokenizerConfig(kind="sentencepiece"))
    assert all(destination.needs == {"tokenizer.kind": "bpe"} for destination in destinations(cfg).values())
    assert row("x", cfg)[1:7] == ["-"] * 6


def test_a_run_that_llama_cpp_does_not_know_is_told_the_portable_preset_of_its_size():
    assert advice(preset("demo")).endswith("python main.py --preset portable-5m")
    assert "model.activation, model.bigram_rows;" in advice(preset("demo"))
    assert advice(preset("modern-150m")).endswith("--preset portable-150m")
    assert advice(preset("portable-5m")) is None and advice(preset("code-50m")) is None
