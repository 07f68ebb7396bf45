"""The arithmetic of the benchmarks, on numbers made up and on models of a few thousand parameters."""

import contextlib
import dataclasses
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from config import ModelConfig
from kindling.data.shards import Batch, ShardWriter, TokenDataset, write_manifest
from kindling.device import Runtime
from kindling.errors import KindlingError
from kindling.training.validation import validate
from model import build_model

sys.path.append(str(ROOT / "benchmarks"))

import lab
import loss_worker
import machine
import paired
import peer
import portability
import shared_machine
import summary
import throughput_worker
import time_to_loss
import train_throughput

CPU = Runtime(torch.device("cpu"), "fp32")
TINY = ModelConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32)
WATCHED = {
    "cores": 2,
    "threads": 2,
    "instructions": ["avx2", "avx512f"],
    "gpu": None,
    "torch": "2",
    "stolen_share": 0.25,
}


def rows_of(seed: int, count: int = 4) -> Batch:
    ids = np.random.default_rng(seed).integers(0, TINY.vocab_size, (count, TINY.block_size + 1))
    return Batch(ids[:, :-1], ids[:, 1:])


# -- the peer ---------------------------------------------------------------------------------------------------------


def test_the_peers_rate_warms_up_then_follows_a_cosine_to_a_tenth():
    warm = peer.WARMUP
    assert 0 < peer.learning_rate_scale(0.0) < 0.05
    assert peer.learning_rate_scale(warm / 2) == pytest.approx(0.5)
    assert peer.learning_rate_scale(warm) == pytest.approx(1.0)
    assert peer.learning_rate_scale((1 + warm) / 2) == pytest.approx(0.55)  # halfway between 1 and 0.1
    assert peer.learning_rate_scale(1.0) == peer.learning_rate_scale(1.5) == pytest.approx(0.1)


def test_the_peer_is_a_gpt2_of_that_shape_without_dropout():
    built = peer.Peer(TINY, CPU, 1e-3)
    # tied head, learned positions, biases: the count of our own config of GPT-2's choices
    assert sum(p.numel() for p in built.model.parameters()) == TINY.n_parameters
    idx, targets = built.on_device(rows_of(0))
    assert built.model.training
    assert torch.equal(built.loss(idx, targets), built.loss(idx, targets))


def test_a_step_of_the_peer_is_clipped_adamw_with_decay_on_matrices_only():
    built, other = peer.Peer(TINY, CPU, 1e-2), peer.Peer(TINY, CPU, 1e-2)
    idx, targets = built.on_device(rows_of(0))
    built.step(idx, targets, share=peer.WARMUP)  # at the peak rate
    loss = F.cross_entropy(other.model(idx).logits.flatten(0, 1), targets.flatten())
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in other.model.parameters()))
    assert norm > 1
    for p, stepped in zip(other.model.parameters(), built.model.parameters()):
        grad = p.grad / (norm + 1e-6)
        decayed = p * (1 - 1e-2 * 0.1) if p.ndim >= 2 else p
        expected = decayed - 1e-2 * grad / (grad.abs() + 1e-8)  # AdamW's first step
        moved = grad.abs() > 1e-6  # nearer to zero, epsilon and rounding count
        torch.testing.assert_close(stepped[moved], expected[moved], rtol=1e-4, atol=1e-5)


def test_the_peer_learns_a_batch_by_heart():
    built = peer.Peer(TINY, CPU, 3e-3)
    idx, targets = built.on_device(rows_of(0, 2))
    losses = [float(built.step(idx, targets, share=n / 60)) for n in range(60)]
    assert losses[0] > 4 > 2 > losses[-1]


# -- counting ---------------------------------------------------------------------------------------------------------


def test_matrix_parameters_are_those_of_linear_layers_and_the_head():
    by_hand = 2 * (32 * 96 + 32 * 32 + 2 * 32 * 128) + 32 * 64
    untied = dataclasses.replace(TINY, tie_embeddings=False, position="rope", norm="rmsnorm", bias=False)
    assert throughput_worker.matrix_parameters(build_model(TINY)) == by_hand
    assert throughput_worker.matrix_parameters(build_model(untied)) == by_hand
    assert throughput_worker.matrix_parameters(peer.gpt2(TINY)) == by_hand


def test_the_flops_of_a_step_agree_with_torchs_counter():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = build_model(TINY)
    batch = rows_of(0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        F.cross_entropy(
            model(torch.from_numpy(batch.idx)).flatten(0, 1), torch.from_numpy(batch.targets.copy()).flatten()
        ).backward()
    tokens = batch.idx.size
    attention = 12 * TINY.n_layer * TINY.n_embd * TINY.block_size * tokens
    matrices = throughput_worker.matrix_parameters(model)
    assert counter.get_total_flops() == 6 * matrices * tokens + attention  # torch counts what a causal mask hides
    assert throughput_worker.step_flops(matrices, TINY, tokens) == 6 * matrices * tokens + attention / 2


def test_a_worker_measures_a_product_of_known_size():
    pair = (torch.ones(64, 32), torch.ones(32, 16), torch.empty(64, 16))
    best = throughput_worker.best_product([pair], CPU)
    assert best["sizes"] == [64, 32, 16]
    assert best["flops"] > 0
    assert torch.equal(pair[2], torch.full((64, 16), 32.0))


def test_a_ratio_is_the_median_of_rounds_against_the_fastest_peer_of_each_precision():
    def way(side, precision, compiled, speeds):
        found = {"side": side, "precision": precision, "compiled": compiled, "tokens_per_s_by_round": speeds}
        return found | {"tokens_per_s": sorted(speeds)[1]}

    ways = [way("ours", "fp32", True, [20, 30, 40]), way("ours", "bf16", True, [60, 80, 100])]
    ways += [way("peer", "fp32", False, [20, 20, 25]), way("peer", "fp32", True, [10, 10, 11])]
    found = train_throughput.ratios({train_throughput.name(w): w for w in ways})
    assert found == {
        "fp32": {"ours": "ours, bf16, compiled", "peer": "peer, fp32, eager", "times": 4.0, "by_round": [3.0, 4.0, 4.0]}
    }


# -- beside other work ------------------------------------------------------------------------------------------------


def test_each_limit_is_in_the_environment_of_its_trainings_alone(monkeypatch):
    from kindling.openmp import OWN_CHOICES, limit_spinning

    monkeypatch.setenv("GOMP_SPINCOUNT", "7")  # of the process that measures
    found = {limit: shared_machine.environment_of(limit) for limit in ("as before", "passive", "1000")}
    own = {limit: {n: v for n, v in e.items() if n in OWN_CHOICES} for limit, e in found.items()}
    assert own["passive"] == {"OMP_WAIT_POLICY": "passive"} and own["1000"] == {"GOMP_SPINCOUNT": "1000"}
    assert not own["as before"].keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}
    for environment in found.values():
        kept = dict(environment)
        limit_spinning(environment)
        assert environment == kept


def test_the_slower_of_two_trainings_counts_and_loops_run_meanwhile(monkeypatch):
    running = []

    @contextlib.contextmanager
    def loops(n):
        running.append(n)
        yield
        running.clear()

    monkeypatch.setattr(shared_machine, "busy_loops", loops)
    found = shared_machine.round_of((lambda: 20.0 if running else 100.0, lambda: 60.0), 2)
    assert found == {"alone": 100.0, "two at once": 60.0, "busy loops": 20.0}


def test_figures_are_medians_of_ratios_within_rounds():
    def rounds(*speeds):
        return [dict(zip(("alone", "two at once", "busy loops"), three)) for three in speeds]

    before = rounds((100, 10, 5), (50, 10, 5), (200, 10, 5))
    found = shared_machine.figures(rounds((90, 45, 36), (60, 24, 30), (200, 120, 60)), before)
    assert found["alone_times_before"] == 1.0 and found["two_share"] == 0.5 and found["loops_share"] == 0.4
    assert found["tokens_per_s"] == {"alone": 90, "two at once": 45, "busy loops": 36}
    results = {"own": "3000", "notes": [], "machine": WATCHED, "ways": {"ours, fp32, eager": {"3000": found}}}
    assert "| fp32, eager | 3000 (Kindling's) | 90 | 1.00 | 50% | 40% |" in shared_machine.markdown(results)


@pytest.mark.slow
def test_trainings_beside_each_other_are_measured_at_toy_size(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "shared_machine.py"), "--toy", "--results", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "shared_machine.json").read_text(encoding="utf-8"))
    assert list(results["ways"]["ours, fp32, eager"]) == ["as before", "100"]
    for found in results["ways"]["ours, fp32, eager"].values():
        assert all(speed > 0 for speed in found["tokens_per_s"].values())
    assert "| fp32, eager | 100 |" in (tmp_path / "shared_machine.md").read_text(encoding="utf-8")


# -- the loss and the time --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> TokenDataset:
    folder = tmp_path_factory.mktemp("shards")
    writer = ShardWriter(folder, "val", np.dtype("<u2"))
    rng = np.random.default_rng(0)
    for _ in range(5):
        writer.add(rng.integers(0, TINY.vocab_size, 200), 611)
    writer.close()
    about = {"tokenizer_sha256": "", "vocab_size": TINY.vocab_size, "eos_id": 0}
    write_manifest(folder, fingerprint="tiny", dtype="<u2", splits={"val": writer.info}, **about)
    return TokenDataset(folder, "val")


def test_bits_per_byte_of_a_whole_split_are_those_of_validation(split):
    model = build_model(TINY).eval()

    def summed(batch):
        with torch.no_grad():
            loss, n = model(torch.from_numpy(batch.idx), torch.from_numpy(batch.targets))
        return float(loss), int(n)

    found = loss_worker.bits_per_byte(summed, split, TINY)
    assert found == pytest.approx(validate(model, split, CPU)["val_bits_per_byte"], rel=1e-6)
    assert found == pytest.approx(math.log2(64) * 999 / 3055, rel=0.02)  # it knows nothing yet


def test_a_part_of_a_split_has_the_mean_loss_of_its_tokens_at_the_splits_tokens_a_byte(split):
    seen = []

    def summed(batch):
        seen.append(int((batch.targets >= 0).sum()))
        return 2.0 * len(seen) * seen[-1], seen[-1]  # 2 nats a token in the first batch, 4 in the second

    found = loss_worker.bits_per_byte(summed, split, TINY, every=3)
    assert seen == [256, 231]  # the first and the fourth of four batches
    assert found == pytest.approx((2 * 256 + 4 * 231) / 487 / math.log(2) * 999 / 3055)


def test_the_peers_losses_are_sums_over_supervised_tokens(split):
    built = peer.Peer(TINY, CPU, 1e-3)
    *_, last = split.in_order(TINY, 16)
    total, count = built.summed_loss(last)
    logits = built.model(torch.from_numpy(last.idx)).logits
    by_hand = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(last.targets).flatten(), reduction="sum")
    assert count == 231  # of 256 places
    assert total == pytest.approx(by_hand.item(), rel=1e-5)


def test_the_time_at_a_loss_is_interpolated_between_the_points_around_it():
    points = [{"seconds": s, "bits_per_byte": b} for s, b in ((10, 3.0), (20, 2.5), (40, 1.5), (60, 1.7))]
    assert time_to_loss.reached_s(points, 2.0) == pytest.approx(30)
    assert time_to_loss.reached_s(points, 2.5) == pytest.approx(20)
    assert time_to_loss.reached_s(points, 3.1) == 10  # nothing is known before the first point
    assert time_to_loss.reached_s(points, 1.4) is None


def test_the_way_of_the_peer_is_the_one_with_the_most_steps_when_compiling_counts():
    eager, compiled = (
        {"precision": "fp32", "compiled": c, "compile_s": s, "step_s": t}
        for c, s, t in ((False, 0, 1.0), (True, 30, 0.5))
    )
    assert loss_worker.best_way([eager, compiled], 50)["compiled"] is False
    assert loss_worker.best_way([eager, compiled], 70)["compiled"] is True


def test_the_price_of_a_preset_is_its_mean_difference_to_the_first_at_the_same_seeds_with_students_interval():
    assert paired.mean_and_half_width([1.5]) == (1.5, None)
    mean, half = paired.mean_and_half_width([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.303 / 3**0.5, rel=1e-4)
    row = {"parameters": 7, "steps": 10, "tokens": 2e6, "precision": "fp32", "compiled": False, "val": 2.0}
    first = {"1": row | {"test": 1.0}, "2": row | {"test": 2.0}}
    second = {"1": row | {"test": 1.25}}  # seed 2 is still to come
    assert paired.differences({"a": first, "b": second}, "b", "test") == [0.25]
    results = {"machine": "x", "data": "d", "minutes": 5, "seeds": [1, 2], "found": {"a": first, "b": second}}
    table = portability.markdown(results)
    assert "| `a` | 7 | 10 | 2.00M | 2.0000 ± 0.0000 | 1.5000 ± 6.3530 |  |  |" in table
    assert (
        "| `b` | 7 | 10 | 2.00M | 2.0000 | 1.2500 | +0.0000 | +0.2500 |" in table
        and "steps that fit 5 minutes" in table
    )


def test_the_steps_that_fit_a_time_leave_that_of_compiling_and_one_slow_run_changes_nothing():
    runs = [
        {"compile_s": 20.0, "seconds": 20.0 + steps * s, "steps": steps}
        for steps, s in ((10, 2.0), (20, 1.0), (5, 9.0))
    ]
    assert paired.fitting_steps(runs, 300) == 140
    assert paired.fitting_steps(runs, 10) == 1


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        ((-0.03, 0.01), "kept"),
        ((-0.014, 0.001), "discarded"),  # not more than the noise of seeds
        ((0.02, 0.001), "discarded"),
        ((-0.03, 0.04), "too few seeds to tell"),
        ((-0.03, None), "one seed: try more"),
    ],
)
def test_a_change_is_kept_if_it_is_better_by_more_than_seeds_are(difference, said):
    assert lab.verdict(difference) == said


def test_the_ledger_begins_with_its_head_and_gains_a_line_for_each_change(tmp_path):
    row = {"seconds": 10.0, "compile_s": 0.0, "tokens": 1e6, "steps": 5}
    found = {"recipe": {"1": row | {"val": 2.0}, "2": row | {"val": 2.2}}, "changed": {"1": row | {"val": 1.9}}}
    short = {"recipe": [row], "changed": [row | {"seconds": 12.0}]}
    results = {
        "day": "2026-01-02",
        "change": "a|b",
        "preset": "demo",
        "flags": ["--train.batch-size", "16"],
        "minutes": None,
    }
    line = lab.line(results | {"found": found, "short_runs": short, "machine": "x"})
    assert line == (
        r"| 2026-01-02 | a\|b | `--preset demo --train.batch-size 16` | 1.00M tokens | 1 | 2.1000 ± 1.2706 | 1.9000 | -0.1000 "
        "| 1.20 | one seed: try more | x |"
    )
    ledger = tmp_path / "new" / "lab.md"
    lab.add(ledger, line)
    lab.add(ledger, line)
    assert ledger.read_text() == lab.HEAD + f"{line}\n{line}\n"


def test_a_change_is_given_as_flags_of_main_and_nothing_else(capsys):
    flags, changes = lab.parse(["wide", "--tokens", "9", "--model.n-embd", "64"])
    assert flags.tokens == 9 and changes == ["--model.n-embd", "64"]
    for wrong in (
        ["x", "--tokens", "9"],
        ["x", "--model.n-embd", "64"],
        ["x", "--minutes", "0", "--model.n-embd", "64"],
    ):
        with pytest.raises(SystemExit):
            lab.parse(wrong)


def test_the_peers_shape_keeps_context_and_vocabulary_and_takes_a_width_that_heads_divide():
    spec = loss_worker.Spec("peer", "", 1, [], layers=6, width=48)
    shape = loss_worker.peer_shape(spec, dataclasses.replace(TINY, n_head=4, n_kv_head=2, position="rope"))
    assert (shape.n_layer, shape.n_embd, shape.n_head, shape.block_size, shape.vocab_size) == (6, 48, 6, 16, 64)


# -- the machine and the summary --------------------------------------------------------------------------------------


def test_the_stolen_share_is_of_all_time_between_two_readings():
    before = [100, 0, 50, 800, 10, 0, 5, 20, 7, 7]
    after = [150, 0, 70, 900, 10, 0, 5, 50, 99, 99]
    assert machine.stolen_share(before, after) == pytest.approx(30 / 200)  # guests' time is in user
    assert machine.stolen_share([], after) is None


def throughput_results(times: float, peak_bytes: int) -> dict:
    ways = {}
    for side in ("ours", "peer"):
        about = {"precision": "fp32", "compiled": False, "tokens_per_s": 1000.0, "share_of_peak": 0.5}
        ways[f"{side}, fp32, eager"] = {"side": side, **about, "peak_bytes": peak_bytes}
    ratio = {"ours": "ours, fp32, eager", "peer": "peer, fp32, eager", "times": times}
    shape = {"ways": ways, "ratios": {"fp32": ratio}, "peak": {"fp32": {"flops": 2e11}}}
    return {"machine": WATCHED, "device": "cpu", "shapes": {"code-50m": shape}}


def loss_results(eighth: float, minutes: float = 5) -> dict:
    splits = {name: {"val": 1.0, "test": bits} for name, bits in (("ours", 1.5), ("peer", 2.0), ("eighth", eighth))}
    found = {f"{name}_bits_per_byte": bits for name, bits in splits.items()}
    found |= {"peer_seconds": 300.0, "eighth_seconds": 37.5, "reached_s": 30.0, "times_sooner": 10.0}
    found |= {"eighth_reaches_the_peer": {"test": eighth <= 2.0}, "functions": {"test": {"samples": 40, "passes": 19}}}
    return {"machine": WATCHED, "minutes": minutes, "figures": found}


def test_the_summary_says_what_was_reached_what_was_not_and_what_was_not_measured(tmp_path):
    (tmp_path / "train_throughput.json").write_text(json.dumps(throughput_results(1.7, 5 * 2**30)), encoding="utf-8")
    (tmp_path / "time_to_loss.json").write_text(json.dumps(loss_results(1.9)), encoding="utf-8")
    lines = summary.markdown(summary.rows([tmp_path])).splitlines()
    assert {line.count("|") for line in lines} == {5}
    measured = {line.split(" | ")[0][2:]: line.split(" | ")[2] for line in lines[2:]}
    assert measured["training at `code-50m` shape, times the best fp32 peer"].startswith(
        "1.70 (1,000 against 1,000 tokens/s"
    )
    assert measured["training at `code-50m` shape, times the best fp32 peer"].endswith(": reached")
    assert "no bfloat16 instructions" in measured["training at `code-50m` shape, times the best bf16 peer"]
    assert measured["`code-50m`, a step of 4 x 1024, peak process memory"].endswith("NOT reached")
    assert measured["`demo`, bits per byte on test files"] == "1.500 (validation 1.000) after 5 minutes: reached"
    assert measured["`demo`, functions that parse, from signatures of test files"] == "19 of 40, 48%: NOT reached"
    assert measured["`data`"] == "not measured: run `python benchmarks/data.py`"
    assert measured["`generation`"] == "not measured: run `python benchmarks/generation.py`"
    assert "25% of the CPU time stolen" in lines[2]


def test_a_figure_asked_after_five_minutes_has_no_verdict_after_fewer(tmp_path):
    (tmp_path / "time_to_loss.json").write_text(json.dumps(loss_results(2.1, minutes=1)), encoding="utf-8")
    text = summary.markdown(summary.rows([tmp_path]))
    assert "1.500 (validation 1.000) after 1 minutes |" in text
    assert "2.100 after 38 s, the peer 2.000 after 300 s |" in text


def test_a_result_that_is_damaged_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "time_to_loss.json").write_text('{"machine": "x"}', encoding="utf-8")
    with pytest.raises(
        KindlingError, match=r"time_to_loss.json must be a result .* run `python benchmarks/time_to_loss.py`"
    ):
        summary.rows([tmp_path])


def test_the_summary_reads_the_results_that_are_committed():
    folders = summary.kept()
    there = {path.stem for folder in folders for path in folder.glob("*.json")} & summary.SECTIONS.keys()
    unread = [row.figure for row in summary.rows(folders) if row.measured.startswith("not measured: run")]
    assert there and unread == [f"`{name}`" for name in summary.SECTIONS if name not in there]
    kept = machine.RESULTS.parent / "summary.md"
    assert kept.read_text(encoding="utf-8") == summary.markdown(summary.rows(folders))


def test_results_of_several_machines_have_a_row_each(tmp_path):
    for name, times in (("a", 1.7), ("b", 1.2)):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "train_throughput.json"
        path.write_text(json.dumps(throughput_results(times, 2**30)), encoding="utf-8")
    found = [row.measured for row in summary.rows([tmp_path / "a", tmp_path / "b"]) if "fp32 peer" in row.figure]
    assert [text[:4] for text in found] == ["1.70", "1.20"]


def test_a_benchmark_writes_only_where_git_ignores_it_and_kept_results_are_in_a_folder_of_their_machine():
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert f"/{machine.RESULTS.relative_to(ROOT)}/" in ignored
    sources = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tests" / "faults").glob("*.py")]
    own = [path.name for path in sources if re.search(r"""/ ["']results["']""", path.read_text(encoding="utf-8"))]
    assert own == ["machine.py"]  # the others take RESULTS or results_file from it
    assert {path.name for path in machine.RESULTS.parent.iterdir() if path.is_file()} == {"summary.md"}
    assert {"xeon-2.80ghz-2-cores"} < {folder.name for folder in summary.kept()}


def test_the_drawing_shows_both_curves_and_the_table_every_training():
    from kindling.plots.figures import png

    def training(ends: float, *bits: float, **more) -> dict:
        points = [{"seconds": ends * (n + 1) / len(bits), "bits_per_byte": b} for n, b in enumerate(bits)]
        about = {"seconds": ends, "compile_s": 9.0, "steps": 70, "tokens": 280_000, "parameters": 10**6, "lr": 1e-3}
        return {
            **about,
            "precision": "fp32",
            "compiled": True,
            "points": points,
            "val": bits[-1],
            "test": bits[-1],
            **more,
        }

    counts = {split: {"samples": 40, "passes": 21} for split in ("val", "test")}
    found = {
        "peer": training(300, 3.0, 2.4, 2.2, shape="4 x 192"),
        "eighth": training(37.5, 2.6, 2.1),
        "again": training(37.5, 2.5, 2.3),
    }
    found |= {"ours": training(300, 2.5, 1.8, 1.5, functions=counts), "trials": [training(60, 2.6)]}
    results = {"machine": WATCHED, "data": "demo-0123", "minutes": 5, **found, "figures": time_to_loss.figures(found)}
    assert results["figures"]["reached_s"] == pytest.approx(100 + 100 * 3 / 7)
    assert results["figures"]["times_sooner"] == pytest.approx(300 / (1000 / 7))
    table = time_to_loss.markdown(results)
    assert "is as good as the peer on the test split; with the kernels of ours in the cache it is not" in table
    assert "21 of 40 functions compile" in table
    figure = time_to_loss.drawing(results)
    assert png(figure).startswith(b"\x89PNG")
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
        "GPT-2 4 x 192, AdamW, cosine: 2.200 after 300 s",
        "ours: 1.500 after 300 s",
        "ours, all in an eighth of the time: 2.100 after 38 s",
    ]
