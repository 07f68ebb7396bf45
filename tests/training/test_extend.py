"""extend.py: a run that goes on longer than planned is the run that was planned for its end."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import assert_one_clear_line, script, tiny_config
from test_trainer import Clock, make_trainer, timed

from config import Config
from kindling.data.shards import TokenDataset
from kindling.errors import KindlingError
from kindling.formats.model_card import card
from kindling.runs.checkpoint import RunDirectory, load_state, step_of, verify
from kindling.runs.metrics import read_metrics
from kindling.training.early_checks import run_to_extend
from kindling.training.extend import branch
from kindling.training.loop import fit
from kindling.training.stage import train_stage
from kindling.training.start_or_resume import data_of_run
from main import steps_done

PLAN = {"optimizer": "muon", "micro_batch_size": 2, "schedule": "linear", "decay_fraction": 0.3, "min_lr_ratio": 0.0}
PLAN |= {"save_every": 5, "eval_every": 5, "keep_checkpoints": 1}


def planned(corpus: Path, name: str, **train) -> Config:
    return replace(tiny_config(corpus, **{**PLAN, **train}), name=name)


def trained(cfg: Config) -> tuple[str, RunDirectory]:
    """Train as main.py does; return the digest of the end, and the run."""
    digests = []
    assert train_stage(cfg, False, lambda trainer: digests.append(trainer.digest()) or []) == 0
    return digests[0], RunDirectory(Path("runs") / cfg.run_name)


@pytest.fixture(scope="module")
def work(corpus, tmp_path_factory):
    """A folder with the run `short`, of 12 steps: two of warmup, seven at the peak, three of decay."""
    folder = tmp_path_factory.mktemp("extend")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        trained(planned(corpus, "short"))
    return folder


@pytest.fixture
def inside(work, monkeypatch):
    monkeypatch.chdir(work)
    return work


def steps_of(run: RunDirectory) -> list[int]:
    return list(map(step_of, run.checkpoints()))


def states_of(run: RunDirectory) -> dict[int, int | None]:
    return {step_of(folder): load_state(folder)["decay_step"] for folder in run.checkpoints()}


def test_a_run_keeps_its_checkpoint_from_before_the_decay(inside):
    assert states_of(RunDirectory(Path("runs/short"))) == {9: None, 12: 9}


def test_an_extended_run_ends_with_the_bits_of_one_that_was_planned_for_its_end(inside, corpus, capsys):
    wanted, whole = trained(planned(corpus, "whole", max_steps=17))
    capsys.readouterr()
    digest, run = trained(planned(corpus, "longer", max_steps=17, extend="short"))
    out = capsys.readouterr().out
    assert "runs/longer goes on from step 9 of runs/short" in out and "resuming at step 9" in out
    assert digest == wanted
    rates, losses = (
        [[line[key] for line in read_metrics(r.path / "metrics.jsonl") if key in line] for r in (whole, run)]
        for key in ("lr", "loss")
    )
    assert rates[0] == rates[1] and losses[0] == losses[1] and len(losses[0]) == 17
    state = load_state(run.newest())
    assert (state["extended_from"], state["decay_step"]) == (9, 12) and run.config().train.extend == "short"
    assert steps_of(run) == steps_of(whole)
    assert "going on with the run `short` from its step 9" in card(run, "longer", run.newest())


def test_another_decay_from_the_same_step_is_the_run_that_was_planned_so(inside, corpus):
    other = {"max_steps": 11, "schedule": "cosine", "decay_fraction": 0.2, "min_lr_ratio": 0.1}
    wanted, _ = trained(planned(corpus, "cosine", **other))
    digest, _ = trained(planned(corpus, "from-short", extend="runs/short", **other))
    assert digest == wanted


def test_a_run_that_was_cut_off_while_it_was_created_is_created_again(inside, corpus, monkeypatch, capsys):
    cfg = planned(corpus, "cut", max_steps=15, extend="short")
    monkeypatch.setattr(RunDirectory, "create", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        trained(cfg)
    monkeypatch.undo()
    monkeypatch.chdir(inside)
    assert not RunDirectory(Path("runs/cut")).exists()
    _, run = trained(cfg)
    assert "the old run is kept" in capsys.readouterr().out and step_of(run.newest()) == 15
    verify(run.newest())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"max_steps": 20, "lr": 1e-4},
            "keep the settings of runs/short but .* train.lr 0.0006 -> 0.0001; .*init-from",
        ),
        ({"max_steps": 20, "batch_size": 8}, "train.batch_size 4 -> 8"),
        ({"max_steps": 20, "warmup_steps": 3}, "train.warmup_steps 2 -> 3"),
        ({}, "another end or decay than runs/short has, but both are the same; set --train.max-steps"),
        ({"epochs": 3.0}, "both are the same"),  # it has a number of steps
        (
            {"max_steps": 20, "decay_fraction": 1.0},
            "at its peak .*, but this run has schedule linear and decay_fraction 1;",
        ),
        ({"max_steps": 20, "extend": "nowhere"}, "nowhere must be the folder of a run"),
    ],
)
def test_what_would_be_no_extension_is_refused_in_a_line(inside, corpus, change, words):
    cfg = planned(corpus, "longer", **{"extend": "short", **change})
    with pytest.raises(KindlingError, match=words) as e:
        run_to_extend(cfg, RunDirectory(Path("runs/none")))
    assert "\n" not in str(e.value)


def test_another_model_other_data_and_the_same_name_are_refused(inside, corpus):
    cfg = planned(corpus, "longer", extend="short", max_steps=20)
    of_model = replace(cfg, model=replace(cfg.model, n_layer=3))
    of_data = replace(cfg, data=replace(cfg.data, min_chars=5))
    for other, words in ((of_model, "model.n_layer 2 -> 3"), (of_data, "data.min_chars")):
        with pytest.raises(KindlingError, match=words):
            run_to_extend(other, RunDirectory(Path("runs/longer")))
    with pytest.raises(KindlingError, match="name must differ"):
        run_to_extend(cfg, RunDirectory(Path("runs/short")))


def test_a_dry_run_counts_from_the_branch(inside, corpus):
    cfg, new = planned(corpus, "dry", max_steps=17, extend="short"), RunDirectory(Path("runs/dry"))
    assert steps_done(cfg, new, False) == 9
    own = replace(cfg, train=replace(cfg.train, extend=None))
    assert steps_done(own, new, False) == 0
    assert steps_done(own, RunDirectory(Path("runs/short")), False) == 12
    assert steps_done(own, RunDirectory(Path("runs/short")), True) == 0
    with pytest.raises(KindlingError, match="max-steps must be at least 12"):
        steps_done(planned(corpus, "dry", max_steps=11, extend="short"), new, False)


def test_the_way_out_of_changed_data_is_not_to_start_over(inside, corpus, monkeypatch):
    """A new run with another name, or with --fresh, would go on with the same data."""
    run, cfg = RunDirectory(Path("runs/short")), planned(corpus, "longer", max_steps=20, extend="short")
    opened = TokenDataset.__init__

    def changed(self, *args):
        opened(self, *args)
        self.manifest["splits"]["train"]["tokens"] += 1

    monkeypatch.setattr(TokenDataset, "__init__", changed)
    with pytest.raises(KindlingError, match=r"sources have changed since; start from .* --train.init-from runs/short$"):
        data_of_run(cfg, run)
    with pytest.raises(KindlingError, match="start over with --fresh"):
        data_of_run(planned(corpus, "short"), run)


def test_an_end_before_the_branch_is_refused_with_the_earliest_that_can_be(inside, corpus):
    origin = RunDirectory(Path("runs/short"))
    train = planned(corpus, "x").train
    for end, least in ((9, 12), (11, 12)):
        with pytest.raises(
            KindlingError, match=rf"max-steps must be at least {least}, .* after step 9, .* but is {end};"
        ):
            branch(origin, replace(train, max_steps=end))
    assert branch(origin, replace(train, max_steps=12))[0].name == "step_000009"
    constant = replace(train, schedule="constant", decay_fraction=1.0)
    with pytest.raises(KindlingError, match="at least 10"):
        branch(origin, replace(constant, max_steps=9))


def test_a_run_of_an_earlier_version_and_one_that_always_decays_keep_no_such_checkpoint(inside, corpus, tmp_path):
    run = RunDirectory(tmp_path / "old")
    shutil.copytree("runs/short", run.path)
    (nine, _) = run.checkpoints()
    state = load_state(nine)
    del state["decay_step"]
    shutil.rmtree(nine)
    run.copy_checkpoint(Path("runs/short/step_000009"), state)
    with pytest.raises(KindlingError, match="has none, as runs of earlier versions; train it again, or"):
        branch(run, planned(corpus, "x", max_steps=20).train)
    always = make_trainer(tmp_path / "always", tiny_config(corpus, save_every=1, keep_checkpoints=1))
    assert fit(always) == 0
    assert set(states_of(always.run).values()) == {2}
    with pytest.raises(
        KindlingError, match=r"had schedule cosine and decay_fraction 1; set --train.decay-fraction 0.2 in both"
    ):
        began = planned(corpus, "always", decay_fraction=1.0, schedule="cosine")
        shutil.copytree("runs/short", "runs/always")
        Path("runs/always/config.yaml").unlink()
        from kindling.config_io import to_yaml

        Path("runs/always/config.yaml").write_text(to_yaml(began), encoding="utf-8")
        run_to_extend(replace(began, train=replace(began.train, extend="always")), RunDirectory(Path("runs/longer")))


def test_a_run_by_minutes_is_extended_from_the_step_at_which_its_decay_began(corpus, tmp_path, monkeypatch):
    plan = {"warmup_steps": 1, "schedule": "linear", "min_lr_ratio": 0.0, "decay_fraction": 0.5}
    trainer = make_trainer(tmp_path / "r", timed(corpus, 0.5, **plan))
    Clock(trainer, monkeypatch, step_s=1.5)
    assert fit(trainer) == 0
    assert states_of(trainer.run) == {11: None, 20: 11}  # after 16.5 of 30 seconds
    folder, state = branch(trainer.run, timed(corpus, 1.0, **plan).train)
    assert folder.name == "step_000011" and state["elapsed_s"] == 16.5
    with pytest.raises(KindlingError, match=r"max-minutes must be at least 0.6, .* but is 0.5"):
        branch(trainer.run, timed(corpus, 0.5, **plan).train)
    branch(trainer.run, timed(corpus, 0.6, **plan).train)


def test_no_checkpoint_before_the_decay_is_saved_between_skipped_steps(corpus, tmp_path):
    cfg = planned(corpus, "x", save_every=100, eval_every=100)
    trainer = make_trainer(tmp_path / "r", cfg)
    launch = trainer.launch_step

    def poisoned():
        if trainer.state.step in (7, 8):
            trainer.guard.limit = lambda step: 0.0
        step = launch()
        trainer.guard.__dict__.pop("limit", None)
        return step

    trainer.launch_step = poisoned
    assert fit(trainer) == 0
    assert states_of(trainer.run) == {12: 9} and trainer.state.skipped == 2


def test_the_script_takes_the_settings_of_the_run_that_it_extends(inside, corpus):
    run = RunDirectory(Path("runs/short"))
    result = script("main.py", "--train.extend", "short", "--train.max-steps", "14", cwd=inside)
    assert result.returncode == 0, result.stderr
    longer = RunDirectory(Path("runs/short-longer"))
    assert longer.config() == replace(
        run.config(), name="short-longer", train=replace(run.config().train, extend="short", max_steps=14)
    )
    assert step_of(longer.newest()) == 14
    again = script("main.py", "--train.extend", "short", "--train.max-steps", "14", cwd=inside)
    assert "the run is complete at step 14" in again.stdout and "--train.extend runs/short-longer" in again.stdout
    refused = script("main.py", "--train.extend", "short", "--name", "b", "--train.max-steps", "10", cwd=inside)
    assert_one_clear_line(refused, "--train.max-steps must be at least 12")
