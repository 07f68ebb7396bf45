"""The runner of a study's steps, on scripts that do their work in a moment."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT

import study
from kindling.studies.shared_steps import data_step
from kindling.studies.speed import Clock
from kindling.studies.steps import Child, Records, Step, StudyError, duration, only_study, require_plan, run_steps
from presets import preset

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
kind, output = sys.argv[1:]
if kind == "fail":
    print("some text")
    sys.exit("error: no room; free some space")
if kind == "stop" and not Path("saved").exists():
    def save(number, frame):
        Path("saved").write_text("half")
        sys.exit(130)
    signal.signal(signal.SIGINT, save)
    os.kill(os.getppid(), signal.SIGINT)   # as a Ctrl-C in the terminal, which reaches the study alone
    time.sleep(60)
if kind == "count":
    got = []
    signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    while not got:
        print("a step", flush=True)
        time.sleep(0.05)
    time.sleep(0.5)  # saves
    Path("saved").write_text("".join(f"{number} " for number in got))
    sys.exit(143)
with open("ran", "a") as f:
    f.write(output + "\\n")
if kind != "nothing":
    Path(output).write_text("done")
"""


@pytest.fixture
def scripts(tmp_path):
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "main.py").write_text(SCRIPT, encoding="utf-8")
    return folder


def step(name: str, kind: str = "work", after: tuple[str, ...] = ()) -> Step:
    return Step(name, "main.py", (kind, name), name, after, 1.0)


def ran(folder: Path) -> list[str]:
    path = folder / "ran"
    return path.read_text(encoding="utf-8").split() if path.exists() else []


def test_steps_run_once_in_order_and_what_is_done_is_skipped(tmp_path, scripts, capsys):
    folder = tmp_path / "study"
    steps = [step("a"), step("b", after=("a",))]
    assert run_steps(steps, folder, scripts=scripts) == 0
    assert run_steps(steps, folder, scripts=scripts) == 0
    assert ran(folder) == ["a", "b"]
    assert "[2/2] b: done before" in capsys.readouterr().out
    assert json.loads((folder / "steps.json").read_text("utf-8"))["a"]["command"] == "python main.py work a"


def test_a_step_whose_output_is_gone_runs_again(tmp_path, scripts):
    folder = tmp_path / "study"
    run_steps([step("a")], folder, scripts=scripts)
    (folder / "a").unlink()
    run_steps([step("a")], folder, scripts=scripts)
    assert ran(folder) == ["a", "a"]


def test_data_are_done_when_the_build_has_its_name(tmp_path):
    """A build is in a folder of another name until it is whole."""
    data = data_step(preset("demo"), Clock(tmp_path, start=lambda: 1.0), 1e6)
    for name, whole in ((".building-demo-0123456789ab@host@1", False), ("demo-0123456789ab", True)):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "manifest.json").touch()
        assert data.wrote(tmp_path) is whole


def test_a_step_runs_again_when_something_that_it_reads_came_later(tmp_path, scripts):
    """As the law of a scaling study, after the held-out run failed at first."""
    folder = tmp_path / "study"
    law = replace(step("law"), reads=("a", "b"))
    assert run_steps([step("a"), step("b", "nothing"), law], folder, scripts=scripts) == 1
    (folder / "b").touch()
    (folder / "a").unlink()
    assert run_steps([step("a"), step("b", "nothing"), law], folder, scripts=scripts) == 0
    assert ran(folder) == ["a", "b", "law", "a", "law"]


def test_a_failed_step_stops_only_what_comes_after_it(tmp_path, scripts, capsys):
    folder = tmp_path / "study"
    steps = [step("a", "fail"), step("b", after=("a",)), step("c"), step("d", after=("c",)), step("e", after=("b",))]
    assert run_steps(steps, folder, "python study.py 000", scripts) == 1
    assert ran(folder) == ["c", "d"]
    out = capsys.readouterr().out
    assert "error: no room; free some space" in out and "logs/a.log" in out
    assert "b: left out, as a failed" in out and "e: left out, as b failed" in out
    assert "3 of 5 steps failed or were left out; python study.py 000 tries them again" in out


def test_a_step_that_writes_no_output_has_failed(tmp_path, scripts, capsys):
    assert run_steps([step("a", "nothing")], tmp_path / "study", scripts=scripts) == 1
    assert "it ended well, but wrote no a" in capsys.readouterr().out


def test_ctrl_c_is_passed_on_and_the_next_start_goes_on_in_the_middle(tmp_path, scripts, capsys):
    folder = tmp_path / "study"
    steps = [step("a"), step("b", "stop"), step("c")]
    assert run_steps(steps, folder, "python study.py 000", scripts) == 130
    assert "stopped in step b; python study.py 000 goes on from here" in capsys.readouterr().out
    assert (folder / "saved").exists() and ran(folder) == ["a"]
    assert run_steps(steps, folder, "python study.py 000", scripts) == 0
    assert ran(folder) == ["a", "b", "c"]


def test_a_folder_of_another_plan_is_refused_before_anything_runs(tmp_path, scripts):
    folder = tmp_path / "study"
    run_steps([step("a")], folder, scripts=scripts)
    other = Step("a", "main.py", ("work", "a", "more"), "a")
    with pytest.raises(StudyError, match=r"must be empty or hold this plan, but its step a is of another one .*--out"):
        run_steps([step("z"), other], folder, scripts=scripts)
    assert ran(folder) == ["a"]


def test_damaged_records_are_one_line(tmp_path):
    (tmp_path / "steps.json").write_text("{", encoding="utf-8")
    with pytest.raises(StudyError, match=r"steps\.json must be as study\.py wrote it"):
        require_plan([step("a")], tmp_path)


def test_steps_must_be_in_order():
    with pytest.raises(StudyError, match="step b must be unique, and come after a"):
        require_plan([step("b", after=("a",)), step("a")], Path(os.devnull))


def test_durations_are_for_people():
    assert [duration(s) for s in (5, 119, 6000, 200_000)] == ["5 s", "2.0 min", "1.7 h", "2.3 days"]


def test_a_second_study_in_a_folder_is_refused_while_the_first_one_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "run_in", lambda *a: pytest.fail("it ran"))
    folder = tmp_path / "study"
    with only_study(folder):
        (folder / "steps.json").write_text("{}", encoding="utf-8")
        with pytest.raises(
            StudyError, match=r"must be used by one study at a time, .*; wait for it, or give another --out"
        ):
            study.main(["003", "--out", str(folder)])
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "steps.json"]
    with only_study(folder):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(StudyError, match="must be a folder that can be written"), only_study(tmp_path / "file"):
        pass


CLOSED = """
import sys
from pathlib import Path
from kindling.studies.steps import Step, run_steps
sys.exit(run_steps([Step("a", "main.py", ("count", "a"), "a", (), 1.0)], Path("study"), scripts=Path("scripts").resolve()))
"""


def test_a_terminal_that_closes_lets_a_training_save(tmp_path, scripts):
    import pty

    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
        signal.alarm(100)  # ends it if it hangs
        os.execve(sys.executable, [sys.executable, "-c", CLOSED], {**os.environ, "PYTHONPATH": str(ROOT)})
    said = b""
    while b"a step" not in said:
        said += os.read(terminal, 1000)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    assert (tmp_path / "study" / "saved").read_text("utf-8") == "15 "  # one SIGTERM, in time to save
    assert Records(tmp_path / "study").of["a"].code is None


def test_a_study_under_nohup_goes_on_when_its_terminal_closes():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Child().signals():
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
