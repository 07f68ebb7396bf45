import itertools
import os
import pickle
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import make_run
from safetensors import SafetensorError
from torch import nn

from kindling.runs import checkpoint
from kindling.runs.checkpoint import CheckpointError, RunDirectory, load_state, load_weights, verify
from kindling.runs.fsdp import state_digest


def model_of(value: float) -> nn.Module:
    model = nn.Linear(8, 8)
    nn.init.constant_(model.weight, value)
    return model


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    """A run with checkpoints of steps 1 to 3, each weight equal to its step."""
    run = RunDirectory(tmp_path / "run")
    for step in (1, 2, 3):
        run.save(
            step, model_of(step), {"step": step, "best": None, "rng": torch.Generator().manual_seed(step).get_state()}
        )
    return run


def weights_of(folder: Path) -> float:
    model = model_of(0)
    load_weights(folder, model)
    return model.weight[0, 0].item()


def test_a_checkpoint_loads_as_it_was_saved(run):
    newest = run.newest()
    assert newest.name == "step_000003" and weights_of(newest) == 3
    assert torch.equal(load_state(newest)["rng"], torch.Generator().manual_seed(3).get_state())
    assert sorted(p.name for p in newest.iterdir()) == ["manifest.json", "model.safetensors", "state.pt"]


def test_five_hundred_flips_and_truncations_are_all_found_and_the_one_before_is_used(run, capsys):
    newest, rng = run.newest(), random.Random(0)
    originals = {p: p.read_bytes() for p in newest.iterdir()}
    for trial in range(500):
        path = rng.choice(list(originals))
        raw = bytearray(originals[path])
        if trial % 3 == 0:
            raw = raw[: rng.randrange(len(raw))]
        else:
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        path.write_bytes(raw)
        try:
            verify(newest)
        except CheckpointError as e:
            assert "\n" not in str(e)
        else:  # a change in the manifest may leave its meaning the same
            assert path.name == "manifest.json" and weights_of(newest) == 3
        path.write_bytes(originals[path])
    (newest / "model.safetensors").write_bytes(bytes(len(originals[newest / "model.safetensors"])))
    assert run.newest().name == "step_000002"
    assert (
        "step_000003 must be as it was written, but model.safetensors has changed; falling back to step_000002"
        in capsys.readouterr().err
    )


def test_with_every_checkpoint_damaged_the_error_says_so(run):
    for folder in run.checkpoints():
        (folder / "state.pt").unlink()
    with pytest.raises(CheckpointError, match="no older checkpoint is whole either: start over with --fresh"):
        run.newest()


def test_a_failed_save_leaves_the_older_ones_and_no_remains(run, monkeypatch):
    monkeypatch.setattr(torch, "save", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(
        CheckpointError, match="No space left on device; free some space, the older checkpoints are untouched"
    ):
        run.save(4, model_of(4), {})
    assert weights_of(run.newest()) == 3
    assert sorted(p.name for p in run.path.iterdir()) == ["step_000001", "step_000002", "step_000003"]


def test_nothing_stands_under_the_final_name_before_the_rename(run, monkeypatch):
    def killed(partial, final):
        assert sorted(p.name for p in partial.iterdir()) == ["manifest.json", "model.safetensors", "state.pt"]
        assert not final.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        run.save(4, model_of(4), {})
    monkeypatch.undo()
    assert run.newest().name == "step_000003"
    run.save(5, model_of(5), {})
    assert not list(run.path.glob(".partial*"))  # the next save removes what the killed one left


def test_too_little_space_is_noticed_before_writing(run, monkeypatch):
    usage = shutil.disk_usage(run.path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda p: usage._replace(free=10))
    with pytest.raises(CheckpointError, match="are free and"):
        run.save(4, model_of(4), {})


def test_pruning_keeps_the_newest_and_the_best(run):
    run.save(4, model_of(4), {})
    run.prune(keep=2, best_step=1, newest_step=4)
    assert [p.name for p in run.checkpoints()] == ["step_000001", "step_000003", "step_000004"]


def test_pruning_never_counts_a_damaged_later_checkpoint_as_the_newest(run):
    run.prune(keep=1, best_step=None, newest_step=2)  # the run fell back to before step 3 and has just saved step 2
    assert [p.name for p in run.checkpoints()] == ["step_000002", "step_000003"]


def test_checkpoints_are_ordered_by_number_past_a_million_steps(tmp_path):
    run = RunDirectory(tmp_path / "run")
    for step in (999_998, 999_999, 1_000_000):
        run.save(step, model_of(step), {})
    run.prune(keep=2, best_step=None, newest_step=1_000_000)
    assert [p.name for p in run.checkpoints()] == [
        "step_999999",
        "step_1000000",
    ] and run.newest().name == "step_1000000"


class Evil:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return (os.mkdir, (str(self.canary),))


def test_an_evil_pickle_is_refused_and_never_run(run, tmp_path):
    newest = run.newest()
    torch.save({"step": Evil(tmp_path / "canary")}, tmp_path / "evil.pt")
    for name, evil in (
        ("state.pt", (tmp_path / "evil.pt").read_bytes()),
        ("state.pt", pickle.dumps(Evil(tmp_path / "canary"))),
        ("model.safetensors", pickle.dumps(Evil(tmp_path / "canary"))),
    ):
        (newest / name).write_bytes(evil)
        with pytest.raises((CheckpointError, SafetensorError)):  # refused even without the manifest
            load_state(newest) if name == "state.pt" else load_weights(newest, model_of(0))
    assert run.newest().name == "step_000002"
    assert not (tmp_path / "canary").exists()


def test_a_manifest_of_another_checkpoint_is_refused(run):
    for name in ("model.safetensors", "state.pt", "manifest.json"):
        shutil.copy(run.path / "step_000001" / name, run.path / "step_000003" / name)
    with pytest.raises(CheckpointError, match="another's"):
        verify(run.path / "step_000003")


def test_weights_of_another_shape_are_refused_by_name(run):
    with pytest.raises(CheckpointError, match=r"weight is \(8, 8\) and not \(4, 8\)"):
        load_weights(run.newest(), nn.Linear(8, 4))
    with pytest.raises(CheckpointError, match="bias is in only one of them"):
        load_weights(run.newest(), nn.Linear(8, 8, bias=False))


def test_saves_that_are_killed_leave_only_whole_checkpoints(tmp_path):
    """Forked processes save in a tight loop and are killed at random moments. Every folder with a final name must verify."""
    run, rng, acknowledged = RunDirectory(tmp_path / "run"), random.Random(1), 0
    for _ in range(25):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                for step in itertools.count(acknowledged + 1):
                    run.save(step, model_of(step), {"step": step})
                    os.write(writer, step.to_bytes(4, "big"))
                    run.prune(2, None, step)
            finally:
                os._exit(1)  # never back into pytest
        os.close(writer)
        said = os.read(reader, 4 * rng.randint(1, 4))  # waits for the first
        time.sleep(rng.uniform(0, 0.05))
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        with os.fdopen(reader, "rb") as f:
            said += f.read()
        acknowledged = max(acknowledged, int.from_bytes(said[-4:], "big"))
        for folder in run.checkpoints():
            verify(folder)
        if acknowledged:
            newest = run.newest()
            assert int(newest.name.removeprefix("step_")) >= acknowledged and weights_of(newest) >= acknowledged
            acknowledged = int(newest.name.removeprefix("step_"))
    assert acknowledged > 25


def test_the_digest_sees_every_bit_of_weights_and_optimiser(run):
    model = model_of(1)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(8)).sum().backward()
    optimizer.step()
    before = state_digest(model, [optimizer])
    assert state_digest(model, [optimizer]) == before
    optimizer.state[model.weight]["exp_avg_sq"][0, 0] += 1e-7
    after = state_digest(model, [optimizer])
    assert after != before
    with torch.no_grad():
        model.bias[3] = torch.nextafter(model.bias[3], torch.tensor(9.0))
    assert state_digest(model, [optimizer]) != after


def test_a_changed_digit_in_the_config_of_a_run_is_refused_unless_its_first_line_is_gone(corpus, tmp_path):
    run = make_run(tmp_path / "run", corpus)
    path = run.path / "config.yaml"
    text = path.read_text(encoding="utf-8").replace("rope_theta: 10000.0", "rope_theta: 90000.0")
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match="must be as it was written, but has changed"):
        run.config()
    path.write_text(text.partition("\n")[2], encoding="utf-8")
    assert run.config().model.rope_theta == 90_000
