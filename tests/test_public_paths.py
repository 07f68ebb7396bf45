"""What is written for others names no folder of this machine."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
from conftest import tiny_config
from hypothesis import given
from hypothesis import strategies as st

from config import Config, SourceConfig
from kindling.config_io import to_yaml
from kindling.public_paths import PublicPaths, is_on_hub, public_names, public_path
from kindling.tables import Section

SHOWN = {
    "runs/demo": "runs/demo",
    "./set": "./set",
    "rows.jsonl": "rows.jsonl",
    "/home/ann/secret/rows.jsonl": "rows.jsonl",
    "/home/ann/a b/": "a b",
    "~/secret/code": "code",
    "~ann/secret/code": "code",
    "../../ann/secret/code": "code",
    "a/../../ann/code": "code",
    "": "",
}


@pytest.mark.parametrize("path", SHOWN)
def test_a_path_of_this_machine_keeps_its_last_part(path):
    assert public_path(path) == SHOWN[path]


@pytest.mark.parametrize("path", ["..", "~", "/", "../..", "/home/ann/.."])
def test_a_path_without_a_name_is_still_a_name(path):
    assert public_path(path) and "/" not in public_path(path)


@given(st.lists(st.sampled_from(["home", "ann", "secret", "..", "a b", "code"]), min_size=1, max_size=6))
def test_no_folder_above_the_last_part_is_shown(parts):
    shown = public_path("/" + "/".join(parts))
    assert "/" not in shown


def test_runs_that_end_alike_are_told_apart():
    paths = [Path("/home/ann/one/demo"), Path("/home/ann/two/demo"), Path("/home/ann/other")]
    assert public_names(paths) == ["one/demo", "two/demo", "other"]


def test_settings_errors_and_tables_are_shortened_in_every_spelling(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    cfg = tiny_config(Path("/srv/ann/corpus"))
    sources = (*cfg.data.sources, SourceConfig(kind="jsonl", path="~/secret/rows.jsonl"))
    data = replace(cfg.data, sources=sources, decontaminate=("humaneval", "../ann/exam.jsonl"))
    cfg = replace(cfg, data=data, train=replace(cfg.train, init_from="/home/ann/runs/base"))
    public = PublicPaths(cfg)
    texts = [
        to_yaml(Config(**public(asdict(cfg)))),
        public("without ~/secret/rows.jsonl: FileNotFoundError: '/home/ann/secret/rows.jsonl'"),
        public("OSError: /home/ann/.cache/x"),
        str(
            vars(
                public(
                    Section("Data", ["source"], [["/srv/ann/corpus, python"]], notes=["/home/ann/secret/rows.jsonl"])
                )
            )
        ),
    ]
    for text in texts:
        assert "ann" not in text.replace("humaneval", "") and "secret" not in text, text
    assert "humaneval" in texts[0] and "rows.jsonl" in texts[1]


HUB = {
    "bigcode/the-stack": True,
    "squad": True,
    "./set": False,
    "../set": False,
    "/sets/a": False,
    "~/set": False,
    "here/set": False,
    "gone/set": True,
}


@pytest.mark.parametrize("path", HUB)
def test_a_folder_is_no_data_set_of_the_hub(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here/set").mkdir(parents=True)
    assert is_on_hub(SourceConfig(kind="datasets", path=path)) == HUB[path]


def public_of(*paths: str) -> PublicPaths:
    cfg = Config()
    sources = tuple(SourceConfig(kind="files", path=path) for path in paths)
    return PublicPaths(replace(cfg, data=replace(cfg.data, sources=sources)))


@pytest.mark.parametrize(
    ("path", "text", "shown"),
    [
        ("..", "and so on... 3 of 4..5", "and so on... 3 of 4..5"),
        ("/", "a/b", "a/b"),
        ("/data", "/data2/secret, /mnt/data/x and /data-old", "/data2/secret, /mnt/data/x and /data-old"),
        ("/data", "error: /data/x must be a file; '/data'. (/data)", "error: data/x must be a file; 'data'. (data)"),
    ],
)
def test_a_path_is_replaced_where_it_is_a_path_and_not_a_part_of_a_name(path, text, shown):
    assert public_of(path)(text) == shown


def test_two_paths_that_end_alike_stay_two():
    assert public_of("/a/x", "/b/x")({"/a/x": 1, "/b/x": 2}) == {"x": 1, "x (2)": 2}
