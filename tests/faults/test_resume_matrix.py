"""Resuming in each precision at several stops, to the last bit; and that each part of the saved state is needed for it."""

import copy
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import tiny_config
from test_trainer import Numbers, interrupted, make_trainer

from config import Config
from faults.runs import Forked, completed, final_weights, flags, stopping_at
from kindling import device
from kindling.data.shards import PackedBlocks
from kindling.errors import KindlingError
from kindling.runs.checkpoint import RunDirectory
from kindling.training.loop import fit

pytestmark = pytest.mark.faults
STEPS = {"fp32": 20, "bf16": 20, "fp16": 4}  # products in fp16 are slow on a CPU
STOPS = {"fp32": (1, 9, 19), "bf16": (1, 9, 19), "fp16": (1, 2, 3)}
NO_BITS = {  # parts of the state that no bit of a run by steps depends on, and what they are for
    "elapsed_s": "time, which only a run by minutes is made of",
    "best": "which checkpoint is kept",
    "first_eval": "shown at the end of a fine-tuning",
    "last_point": "shown at the end of a fine-tuning",
    "validation_rows": "how much of the split is evaluated",
    "evaluation_s": "time, which bounds the evaluations of a run by minutes",
    "last_eval": "shown at the end",
    "last_eval_step": "whether the end evaluates once more",
    "initial_sha256": "refuses a base that has changed",
    "decay_step": "which checkpoint is kept, for a run that extends this one (test_extend.py)",
    "extended_from": "shown in the card and the report",
    "environment": "what is compared and said on resuming",
    "skipped": "a count that is shown",
    "skipped_in_a_row": "when a run of bad steps ends",
    "streak": "where it began",
    "rollbacks": "how often the run went back",
    "avoided": "what a run that went back leaves out (test_trainer.py shows that it is needed there)",
    "guard": "what is an outlier, once there are 32 norms (test_trainer.py shows that it is needed there)",
}


@pytest.mark.parametrize("precision", STEPS)
def test_each_precision_resumes_to_the_same_bits_at_every_stop(work, corpus, record, precision):
    """By the real script: SIGTERM while a step is under way."""
    began, steps, equal = time.perf_counter(), STEPS[precision], 0
    small = {"batch_size": 2 if precision == "fp16" else 4, "micro_batch_size": 1, "optimizer": "muon"}
    settings = {**small, "max_steps": steps, "precision": precision, "eval_every": 1000, "save_every": 1000}
    whole = completed("main.py", flags(corpus, f"{precision}-whole", **settings), work)
    wanted = final_weights(RunDirectory(work / f"runs/{precision}-whole"))
    for stop in STOPS[precision]:
        argv = flags(corpus, f"{precision}-{stop}", **settings)
        child = Forked("main.py", argv, work, stopping_at(stop))
        assert child.wait() == 143 and child.saved == [stop], child.text
        end = completed("main.py", argv, work)
        equal += end.digest == whole.digest and final_weights(RunDirectory(work / f"runs/{precision}-{stop}")) == wanted
    tried = len(STOPS[precision])
    note = (
        f"stopped after steps {', '.join(map(str, STOPS[precision]))} of {steps}, with dropout, accumulation and Muon"
    )
    record(f"resume, {precision}", tried, equal, tried - equal, time.perf_counter() - began, note)
    assert equal == tried


def parts(state: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Return the places of all parts of a state: its keys, those of the random state, each optimiser and what is in it."""
    found: list[tuple[Any, ...]] = [(key,) for key in state]
    found += [("rng", 0, key) for key in state["rng"][0]]
    for n, optimizer in enumerate(state["optimizers"]):
        names = dict.fromkeys(name for values in optimizer["state"].values() for name in values)
        found += [("optimizers", n), *(("optimizers", n, "state", name) for name in names)]
    return found


def without(state: dict[str, Any], place: tuple[Any, ...]) -> dict[str, Any]:
    """Return the state without what is at `place`."""
    state = copy.deepcopy(state)
    if place[0] == "optimizers" and len(place) == 4:
        for values in state["optimizers"][place[1]]["state"].values():
            values.pop(place[3], None)
    elif place[0] == "optimizers" and len(place) == 2:
        state["optimizers"][place[1]]["state"] = {}
    else:
        inner = state
        for key in place[:-1]:
            inner = inner[key]
        del inner[place[-1]]
    return state


def reset(state: dict[str, Any], blank: dict[str, Any], place: tuple[Any, ...]) -> dict[str, Any]:
    """Return the state with what is at `place` as a run begins with it; zeros in the optimisers, as these begin empty."""
    state = copy.deepcopy(state)
    if place[0] == "optimizers" and len(place) == 4:
        for values in state["optimizers"][place[1]]["state"].values():
            if place[3] in values:
                values[place[3]] = torch.zeros_like(torch.as_tensor(values[place[3]]))
    elif place[0] == "optimizers" and len(place) == 2:
        state["optimizers"][place[1]]["state"] = {}
    else:
        inner, begun = state, blank
        for key in place[:-1]:
            inner, begun = inner[key], begun[key]
        inner[place[-1]] = copy.deepcopy(begun[place[-1]])
    return state


def outcome(path, cfg: Config, folder, state: dict[str, Any], stop: int, wanted: str) -> str:
    """Resume from a state that was tampered with; return "error", "other bits" or "same bits"."""
    blocks = PackedBlocks(Numbers(), cfg.model.block_size, cfg.train.seed)
    trainer = make_trainer(path, cfg, blocks, model_seed=99)
    try:
        trainer.resume(folder, state)
        left = cfg.train.max_steps - stop  # as many steps as remained
        trainer.train = replace(trainer.train, max_steps=trainer.state.step + left)
        fit(trainer)
    except (KeyError, ValueError, TypeError, RuntimeError, KindlingError):
        return "error"
    return "same bits" if trainer.digest() == wanted else "other bits"


def test_every_part_of_the_state_is_needed_or_said_not_to_be(corpus, tmp_path, record, capsys, monkeypatch):
    """Reflection over the state of a run: a new part of it must be shown to matter here, or said in NO_BITS not to."""
    began, needed, idle, tried = time.perf_counter(), 0, [], 0

    def scaler(runtime):  # the first step overflows, and lowers the scale to where no later one does
        return torch.amp.GradScaler("cpu", 2.0**40, backoff_factor=2.0**-26, enabled=runtime.precision == "fp16")

    monkeypatch.setattr(device.Runtime, "grad_scaler", scaler)
    settings = dict(max_steps=10, batch_size=4, micro_batch_size=2, optimizer="muon", eval_every=1000, save_every=1000)
    half = dict(precision="fp16", max_steps=3, batch_size=1, eval_every=1000, save_every=1000)
    for name, cfg, stop in (("fp32", tiny_config(corpus, **settings), 6), ("fp16", tiny_config(corpus, **half), 2)):
        whole = make_trainer(tmp_path / name, cfg)
        assert fit(whole) == 0
        _, folder, state = interrupted(tmp_path / f"{name}-stopped", cfg, stop - 1)
        assert outcome(tmp_path / f"{name}-again", cfg, folder, state, stop, whole.digest()) == "same bits"
        blank = make_trainer(tmp_path / f"{name}-blank", cfg, model_seed=5).saved_state()
        for place in parts(state) if name == "fp32" else [("scaler",)]:
            tried += 1
            ends = {
                outcome(tmp_path / f"{name}-{tried}", cfg, folder, tampered, stop, whole.digest())
                for tampered in (without(state, place), reset(state, blank, place))
            }
            if ends <= {"error", "other bits"}:
                needed += 1
            elif place[0] not in NO_BITS and not (place == ("scaler",) and name == "fp32"):
                idle.append((place, ends))
            elif "other bits" in ends:
                idle.append((place, f"is said not to matter to the bits, but does: {ends}"))
    capsys.readouterr()
    note = (
        f"without it, and with it as at the beginning: an error or other bits; not so by design: {', '.join(NO_BITS)}"
    )
    record("resume without a part of the state", tried, tried - len(idle), len(idle), time.perf_counter() - began, note)
    assert not idle, f"say in NO_BITS what they are for, or restore them: {idle}"
    assert needed > 8
