import numpy as np
import pytest
from test_examples import TOKENIZER, conversations, write_examples

from config import IGNORE
from kindling.data.audit import AuditError, audit, picture
from kindling.data.examples import ExampleRows, Examples
from kindling.data.shards import Batch


@pytest.fixture(params=[True, False], ids=["packed", "padded"])
def rows(request, tmp_path):
    folder = write_examples(tmp_path / "x", conversations(), TOKENIZER, 128)
    return ExampleRows(Examples(folder, "train"), 128, 0, packing=request.param, batch_size=4)


def test_good_rows_pass(rows):
    audit({"train": rows}, TOKENIZER)


def first(targets, supervised=True):
    """The first place that is, or is not, supervised."""
    return int(((targets[0] != IGNORE) == supervised).nonzero()[0][0])


def the_mask_is_dropped(idx, targets, positions):
    targets[0, : first(targets)] = idx[0, 1 : first(targets) + 1]


def the_mask_is_early_by_one(idx, targets, positions):
    at = first(targets)
    targets[0, at - 1] = idx[0, at]


def the_mask_is_late_by_one(idx, targets, positions):
    targets[0, first(targets)] = IGNORE


def the_end_is_masked(idx, targets, positions):
    targets[targets == TOKENIZER.eos_id] = IGNORE


def the_end_is_another_token(idx, targets, positions):
    targets[targets == TOKENIZER.eos_id] = TOKENIZER.eos_id + 1


def nothing_is_supervised(idx, targets, positions):
    targets[:] = IGNORE


def a_response_is_another(idx, targets, positions):
    at = first(targets)
    idx[0, at + 1] = targets[0, at] = 300


def a_prompt_is_another(idx, targets, positions):
    idx[0, 3] = 300


def a_prompt_holds_the_end(idx, targets, positions):
    idx[0, 3] = TOKENIZER.eos_id


def targets_are_shifted(idx, targets, positions):
    targets[:] = np.roll(targets, 1, axis=1)


def padding_is_supervised(idx, targets, positions):
    targets[0, -1] = 5


def padding_is_the_end_token(idx, targets, positions):
    idx[0, -1] = TOKENIZER.eos_id


def positions_run_on(idx, targets, positions):
    if positions is None:
        pytest.skip("padded rows have no positions")
    positions[:] = np.arange(idx.shape[1])


FAULTS = [
    (the_mask_is_dropped, "nothing of a prompt may be supervised"),
    (the_mask_is_early_by_one, "nothing of a prompt may be supervised"),
    (the_mask_is_late_by_one, "all of a response must be supervised"),
    (the_end_is_masked, "a response must"),
    (the_end_is_another_token, "a response must"),
    (nothing_is_supervised, "at least one supervised token"),
    (a_response_is_another, "what is supervised must be the response"),
    (a_prompt_is_another, "what is masked must be the prompt"),
    (a_prompt_holds_the_end, "what is masked must be the prompt"),
    (targets_are_shifted, "supervised"),
    (padding_is_supervised, "padding"),
    (padding_is_the_end_token, "padding"),
    (positions_run_on, "count from 0"),
]


@pytest.mark.parametrize(("fault", "words"), FAULTS, ids=[f.__name__ for f, _ in FAULTS])
def test_the_audit_finds_a_fault_wherever_it_came_in(rows, monkeypatch, fault, words):
    batch_of_bins = ExampleRows.batch_of_bins
    # one with padding, and with as many examples as there are, so that each fault is one
    padded = [n for n in range(rows.n_rows) if rows.batch_of_bins([n], 1).targets[0, -1] == IGNORE]
    faulted = max(padded, key=lambda n: (len(rows.bins[n]), n))
    assert len(rows.bins[faulted]) > 1 or not rows.packing

    def faulty(self, bins, n_rows):
        batch = batch_of_bins(self, bins, n_rows)
        if list(bins) == [faulted]:
            fault(*batch)
        return Batch(*batch)

    monkeypatch.setattr(ExampleRows, "batch_of_bins", faulty)
    with pytest.raises(AuditError) as error:
        audit({"train": rows}, TOKENIZER)
    assert words in str(error.value) and "\n" not in str(error.value) and "train split" in str(error.value)


def test_the_picture_brackets_what_is_supervised_and_colors_it_on_a_terminal(tmp_path):
    rows = ExampleRows(Examples(write_examples(tmp_path / "x", conversations()[:1], TOKENIZER, 128), "train"), 128, 0)
    plain = picture(rows, TOKENIZER, color=False)
    assert plain.endswith("### Response:\n[[def add(a, b):\n    return a + b<|endoftext|>]]\n---")
    colored = picture(rows, TOKENIZER, color=True)
    assert "\n\x1b[0m\x1b[1;32mdef add(a, b):\n    return a + b<|endoftext|>\x1b[0m\n---" in colored


def test_the_picture_of_a_conversation_shows_each_response(tmp_path):
    rows = ExampleRows(Examples(write_examples(tmp_path / "x", conversations()[-1:], TOKENIZER, 128), "train"), 128, 0)
    shown = picture(rows, TOKENIZER, color=False)
    assert shown.count("<|endoftext|>]]") == 2 and "]]\n\n### Instruction:\nAnd again?\n\n### Response:\n[[" in shown
