import contextlib
import subprocess
import sys
import tempfile
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from conftest import ROOT
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from config import Config, DataConfig, ModelConfig, SourceConfig, TrainConfig
from kindling import cli, config_io
from kindling.errors import ConfigError
from model import GPT
from presets import FINE_TUNING, PRESETS, list_presets, preset

EXACT = {
    "demo": 6_030_464,
    "demo-infill": 6_030_464,
    "modern-5m": 4_867_392,
    "modern-50m": 50_340_352,
    "modern-150m": 141_576_960,
    "portable-5m": 2_508_480,
    "portable-50m": 46_460_736,
    "portable-150m": 148_548_736,
    "code-50m": 50_910_208,
    "code-150m": 123_591_168,
    "code-225m": 225_317_760,
    "tinystories": 1_850_112,
    "autocomplete": 33_551_168,
    "fineweb-nano": 44_062_661,
    "smallcoder-1": 302_027_520,
    "smallcoder-2": 302_027_520,
    "smallcoder-3": 302_027_520,
    "smallcoder-4": 302_027_520,
}


@pytest.mark.parametrize("name", EXACT)
def test_each_preset_has_its_exact_parameter_count(name):
    with torch.device("meta"):
        model = GPT(preset(name).model)
    assert model.n_parameters() == EXACT[name] == preset(name).model.n_parameters


def test_code_150m_untied_has_the_count_that_the_readme_gives():
    assert replace(preset("code-150m").model, tie_embeddings=False).n_parameters == 161_339_904


@cache
def values_for(hint):
    """A strategy for any value that a field of this type can hold."""
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) is tuple:
        return st.lists(values_for(get_args(hint)[0]), min_size=1, max_size=3).map(tuple)
    if args := get_args(hint):
        return st.one_of(*map(values_for, args))
    plain = {
        int: st.integers(1, 64),
        float: st.floats(1e-9, 0.49),
        bool: st.booleans(),
        str: st.text(min_size=1, max_size=8).filter(lambda text: text[0] != "~"),  # a path that begins so is in a home
        type(None): st.none(),
    }
    return plain[hint] if hint in plain else configs(hint)


@cache
def configs(cls):
    """A strategy for valid instances of a config class: one or more fields of the default replaced by arbitrary values."""

    hints = {f.name: get_type_hints(cls)[f.name] for f in fields(cls)}

    @st.composite
    def draw_config(draw):
        for _ in range(20):  # a class whose values do not fit each other is drawn anew; the rest of the config stays
            changed = {}
            for name, hint in hints.items():
                if is_dataclass(hint) or draw(st.booleans()):
                    changed[name] = draw(values_for(hint))
            with contextlib.suppress(ConfigError):
                return cls(**changed)
        assume(False)

    return draw_config()


@settings(max_examples=15, deadline=None, suppress_health_check=list(__import__("hypothesis").HealthCheck))
@given(configs(Config))
def test_yaml_round_trip_keeps_every_field(cfg):
    assert config_io.from_yaml(config_io.to_yaml(cfg)) == cfg


@settings(max_examples=6, deadline=None, suppress_health_check=list(__import__("hypothesis").HealthCheck))
@given(configs(Config), st.sampled_from(["main", "sft_train", "data_pipeline"]))
def test_a_config_file_gives_the_same_config_through_a_script(cfg, script):
    """Property 17, through `--config`: config -> YAML -> the script's parser -> the same config."""
    module = __import__(script)
    cfg = replace(cfg, preset=preset(cfg.preset).preset if cfg.preset in PRESETS else "demo")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_text(config_io.to_yaml(cfg), encoding="utf-8")
        flags = cli.parse_cli(module.Flags, "", ["--config", str(path)], getattr(module, "OFFLINE", None))
    assert flags.config == cfg


def parsed(tmp_path, text: str, *argv: str) -> Config:
    from main import Flags

    (tmp_path / "part.yaml").write_text(text, encoding="utf-8")
    return cli.parse_cli(Flags, "", ["--config", str(tmp_path / "part.yaml"), *argv]).config


def test_a_part_of_a_config_goes_over_its_preset_and_flags_go_over_it(tmp_path):
    text = "preset: code-50m\ntrain: {lr: 0.5, max_steps: 7, compile: off}\ndata: {sources: [{kind: files, path: x}]}\n"
    cfg, base = parsed(tmp_path, text, "--train.max-steps", "9", "--data.sources.0.weight", "2"), preset("code-50m")
    train = replace(base.train, lr=0.5, max_steps=9, compile="off")
    source = SourceConfig(kind="files", path="x", weight=2)
    assert cfg == replace(base, train=train, data=replace(base.data, sources=(source,)))
    assert parsed(tmp_path, "train: {lr: 0.5}", "--preset", "demo").train == replace(preset("demo").train, lr=0.5)
    over = parsed(tmp_path, "preset: code-50m\ntrain: {lr: 0.5}", "--preset", "demo")
    assert over == replace(preset("demo"), train=replace(preset("demo").train, lr=0.5))


def test_a_config_file_of_an_earlier_version_is_read(tmp_path):
    cfg = parsed(tmp_path, "model: {pair_rows: 64}\ndata: {when_dry: stop}\ntrain: {decay_share: 0.5}\n")
    assert (cfg.model.bigram_rows, cfg.data.stopping_strategy, cfg.train.decay_fraction) == (64, "stop", 0.5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {lrr: 1}", ["part.yaml", "train.lrr is no setting", "did you mean lr"]),
        ("trian: {lr: 1}", ["part.yaml", "trian", "did you mean train"]),
        ("data: {sources: [{pth: x}]}", ["part.yaml", "data.sources.0.pth", "path"]),
        ("train: {lr: fast}", ["part.yaml", "train.lr", "'fast'"]),
        ("train: 3", ["part.yaml", "train", "3"]),
        ("train:", ["part.yaml", "train", "None"]),
        ("model: {n_head: 5}", ["part.yaml", "model.n_embd", "multiple of n_head=5"]),
        ("model: {pair_rows: 2, bigram_rows: 2}", ["part.yaml", "once"]),
        ("preset: code-50", ["'code-50'", "code-50m"]),
        ("preset: 3", ["part.yaml", "preset", "3"]),
        ("1: {}", ["part.yaml", "name", "1"]),
        ("", ["part.yaml", "mapping", "but is empty"]),
        ("train: [1]", ["part.yaml", "train must be a mapping of settings, but is [1]"]),
        ("[1", ["part.yaml", "YAML"]),
    ],
)
def test_a_config_file_that_cannot_be_used_is_refused_in_one_line(tmp_path, text, words):
    with pytest.raises(ConfigError) as error:
        parsed(tmp_path, text)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), str(error.value)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--config"], ["names none"]),
        (["--config", "none.yaml"], ["'none.yaml'", "No such file"]),
        (["--config=."], ["'.'"]),
    ],
)
def test_a_config_file_that_cannot_be_read_is_refused_in_one_line(argv, words):
    with pytest.raises(ConfigError) as error:
        config_io.config_from_argv(argv)
    assert "--config" in str(error.value) and all(word in str(error.value) for word in words)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_yaml(name):
    assert config_io.from_yaml(config_io.to_yaml(preset(name))) == preset(name)


def test_configs_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        preset("demo").model.n_layer = 3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ModelConfig(n_embd=100, n_head=8), ["model.n_embd", "multiple of n_head=8", "100", "96 or 104"]),
        (lambda: ModelConfig(n_head=4, n_kv_head=3), ["model.n_kv_head", "divisor of n_head=4", "3"]),
        (lambda: ModelConfig(head_bias=True), ["model.head_bias", "tied"]),
        (lambda: ModelConfig(bigram_rows=1), ["model.bigram_rows", "at least 2, or 0", "1"]),
        (
            lambda: ModelConfig(bigram_rows=2, backbone="transformers"),
            ["model.bigram_rows", "0 on transformers' GPT-2"],
        ),
        (lambda: ModelConfig(dropout=1.5), ["model.dropout", "at most 0.99", "1.5"]),
        (lambda: ModelConfig(norm_eps=float("nan")), ["model.norm_eps", "nan"]),
        (
            lambda: replace(preset("smallcoder-1").model, backbone="transformers"),
            ["model.position", "'learned'", "'rope'"],
        ),
        (lambda: replace(preset("demo").train, micro_batch_size=5), ["train.micro_batch_size", "divisor", "5"]),
        (
            lambda: replace(preset("demo").tokenizer, pad_token="<|endoftext|>"),
            ["different from each other", "end token"],
        ),
        (lambda: SourceConfig(path="/my/code"), ["data.sources.path", "'/my/code'", "--data.sources.0.kind files"]),
        (lambda: SourceConfig(kind="jsonl"), ["data.sources.path", "jsonl"]),
        (lambda: replace(preset("demo"), name="../x"), ["name", "'../x'"]),
        (lambda: preset("code-50"), ["'code-50'", "code-50m"]),
        (lambda: config_io.from_yaml("model: {n_embdd: 3}"), ["model.n_embdd", "did you mean n_embd"]),
        (lambda: config_io.from_yaml("trian: {}"), ["trian", "did you mean train"]),
        (lambda: config_io.from_yaml("data: {sources: [{pth: x}]}"), ["data.sources.0.pth", "path"]),
        (lambda: config_io.from_yaml("train: {lr: fast}"), ["train.lr", "'fast'"]),
        (lambda: config_io.from_yaml("[1"), ["YAML"]),
        (lambda: config_io.from_yaml("7"), ["mapping"]),
    ],
)
def test_an_impossible_setting_is_refused_in_one_line_that_names_it(make, words):
    with pytest.raises(ConfigError) as error:
        make()
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_flags_override_the_preset_that_they_name():
    from main import Flags

    flags = cli.parse_cli(
        Flags, "", ["--preset", "code-50m", "--name", "x", "--model.bias", "False", "--train.lr", "1e-3", "--fresh"]
    )
    assert flags.fresh and not flags.dry_run
    assert config_io.changed_fields(preset("code-50m"), flags.config) == {
        "name": (None, "x"),
        "model.bias": (True, False),
        "train.lr": (6e-4, 1e-3),
    }


def test_a_mistyped_flag_exits_with_2_and_the_nearest_one():
    result = subprocess.run(
        [sys.executable, ROOT / "main.py", "--train.max-stepz", "3"], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert "--train.max-steps" in result.stdout + result.stderr


def test_the_list_shows_every_preset_with_its_parameters_tokens_and_source():
    listing = list_presets()
    for name, count in EXACT.items():
        assert name in listing and f"{count:,}" in listing
    assert (
        "819M" in listing
        and "60% nvidia/Nemotron-Pretraining-Code-v1/Synthetic-Code + 40% bigcode/starcoderdata/python" in listing
    )


@pytest.mark.parametrize(
    ("epochs", "rows", "steps"), [(3, 100, 75), (1, 100, 25), (0.5, 10, 1), (2, 3, 2), (0.01, 3, 1)]
)
def test_epochs_are_as_many_steps_as_their_rows_fill_unless_steps_are_given(epochs, rows, steps):
    cfg = replace(preset("alpaca"), train=TrainConfig(max_steps=None, epochs=epochs, batch_size=4))
    assert cfg.with_steps(rows).train.max_steps == steps
    given = replace(cfg, train=replace(cfg.train, max_steps=7))
    assert given.with_steps(rows) == given


def test_the_tokens_of_a_run_by_epochs_are_not_known_before_its_data():
    with pytest.raises(ConfigError, match=r"--train\.max-steps"):
        preset("alpaca").tokens  # noqa: B018


def test_instructions_and_documents_do_not_mix():
    sources = (SourceConfig(), SourceConfig(kind="docstrings"))
    with pytest.raises(ConfigError, match="all of instructions, or all of documents"):
        DataConfig(sources=sources)


def test_packing_is_refused_where_the_model_has_no_mask():
    cfg = preset("alpaca")
    gpt2 = replace(preset("code-225m").model, backbone="transformers")
    with pytest.raises(ConfigError, match=r"--train\.packing False"):
        replace(cfg, model=gpt2)
    assert replace(cfg, model=gpt2, train=replace(cfg.train, packing=False)).model == gpt2


def test_every_base_has_examples_to_be_fine_tuned_on():
    for base, name in FINE_TUNING.items():
        assert not preset(base).data.instructions and preset(name).data.instructions
    alpaca = preset("alpaca")
    assert (alpaca.train.epochs, alpaca.data.template) == (3, "alpaca")
    assert alpaca.data.sources[0].path == "iamtarun/python_code_instructions_18k_alpaca"
    assert preset("smallcoder-4").data.template == "user-assistant"
