"""Where a run that a person named is looked for."""

from pathlib import Path

import pytest

from kindling import paths
from kindling.errors import KindlingError


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A folder of the scripts, and another one, which is the working directory."""
    project, here = tmp_path / "project", tmp_path / "here"
    for folder in (project, here):
        (folder / "runs").mkdir(parents=True)
    monkeypatch.setattr(paths, "PROJECT", project)
    monkeypatch.chdir(here)
    return project, here


def write_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    return folder


@pytest.mark.parametrize("name", ["demo", "runs/demo"])
def test_a_name_is_found_here_first_and_then_beside_the_scripts(folders, name):
    project, here = folders
    beside = write_run(project / "runs/demo")
    assert paths.require_run(Path(name)) == beside
    write_run(here / "runs/demo")
    assert paths.require_run(Path(name)) == Path("runs/demo")
    assert paths.require_run(beside) == beside


def test_the_error_says_where_it_was_looked_for_and_what_there_is(folders):
    project, here = folders
    write_run(project / "runs/other")
    write_run(here / "runs/mine")
    with pytest.raises(KindlingError) as error:
        paths.require_run(Path("demo"))
    said = str(error.value)
    for folder in (here, project):
        assert f"{folder}/demo" in said and f"{folder}/runs/demo" in said
    assert f"there are: {project}/runs/other, runs/mine" in said and "\n" not in said


def test_where_the_scripts_are_each_place_is_named_once(folders, monkeypatch):
    project, _ = folders
    monkeypatch.chdir(project)
    write_run(project / "runs/other")
    with pytest.raises(KindlingError) as error:
        paths.require_run(Path("demo"))
    assert str(error.value).count("runs/demo") == 1 and "there are: runs/other" in str(error.value)
