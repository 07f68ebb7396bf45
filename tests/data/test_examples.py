import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import shared_file
from hypothesis import given, settings
from hypothesis import strategies as st

from config import IGNORE, DataConfig, ModelConfig, SourceConfig, TokenizerConfig, TrainConfig
from kindling import device
from kindling.data.conversations import Example, encode_conversation
from kindling.data.examples import PROMPT, RESPONSE, ExampleRows, Examples, ExampleWriter, pack
from kindling.data.prompts import Exchange, prompt_text
from kindling.data.shards import SPLITS, DataError, SplitInfo, write_manifest
from kindling.files import with_checksum, write_json
from kindling.tokenization.tokenizer import Tokenizer
from kindling.tokenization.train_tokenizer import train_bpe
from kindling.training.validation import mean_loss
from model import build_model

PAIRS = DataConfig(sources=(SourceConfig(kind="jsonl", path="x", response_field="r"),))
TASKS = [
    ("Return the sum of two numbers.", "def add(a, b):\n    return a + b"),
    ("Return True if the number is even.", "def is_even(n):\n    return n % 2 == 0"),
    ("Reverse a string.", "def reverse(s):\n    return s[::-1]\n"),
    ("Count the vowels.", "def vowels(s):\n    return sum(c in 'aeiou' for c in s)"),
]
TOKENIZER = train_bpe([prompt_text("alpaca", Exchange(a)) + b for a, b in TASKS] * 20, TokenizerConfig(), 512)


def write_examples(folder: Path, conversations: list[tuple[Exchange, ...]], tokenizer: Tokenizer, context: int) -> Path:
    """Write a data folder of which every split holds the conversations that fit, as the pipeline writes one."""
    folder.mkdir(parents=True, exist_ok=True)
    writers = {split: ExampleWriter(folder, split, np.dtype("<u2")) for split in SPLITS}
    for writer in writers.values():
        for exchanges in conversations:
            example = encode_conversation(exchanges, PAIRS, tokenizer, context)
            if isinstance(example, Example):
                writer.add_example(example, source=exchanges[0].instruction[:5])
        writer.close()
    write_manifest(
        folder,
        fingerprint="x",
        dtype="<u2",
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        splits={split: writer.info for split, writer in writers.items()},
    )
    return folder


def conversations() -> list[tuple[Exchange, ...]]:
    """Twelve single exchanges, and four conversations of two."""
    singles = [(Exchange(f"{a} ({n})", b),) for n in range(3) for a, b in TASKS]
    return singles + [(Exchange(a, b), Exchange("And again?", b[: 10 + i])) for i, (a, b) in enumerate(TASKS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_examples(tmp_path_factory.mktemp("examples"), conversations(), TOKENIZER, context=128)


@pytest.fixture
def examples(folder):
    return Examples(folder, "train")


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), max_size=80), st.integers(60, 100))
def test_packing_puts_every_item_into_one_bin_that_holds_it(lengths, capacity):
    lengths = np.array(lengths, dtype=np.int64)
    bins = pack(lengths, capacity)
    assert sorted(itertools.chain(*bins)) == list(range(len(lengths)))
    assert all(0 < lengths[b].sum() <= capacity for b in bins)
    # no two bins could be one
    loads = sorted(int(lengths[b].sum()) for b in bins)
    assert len(loads) < 2 or loads[0] + loads[1] > capacity


def test_packing_takes_the_fullest_bin_that_still_has_room():
    assert [sorted(b) for b in pack(np.array([7, 5, 3, 3]), 10)] == [[0, 2], [1, 3]]
    with pytest.raises(ValueError, match="at most 10, but one is 11"):
        pack(np.array([2, 11]), 10)


def test_examples_come_back_as_they_were_written(examples):
    expected = [encode_conversation(exchanges, PAIRS, TOKENIZER, 128) for exchanges in conversations()]
    assert examples.n_examples == len(expected) == 16
    for number, want in enumerate(expected):
        found = examples.example(number)
        assert found.ids.tolist() == want.ids.tolist()
        assert found.segments.tolist() == want.segments.tolist()
        supervised = [
            i for s in want.segments for i in [False] * int(s[0]) + [True] * int(s[1])
        ]  # by the plainest of loops
        assert found.supervised.tolist() == supervised
        assert found.targets.tolist() == [t if s else IGNORE for t, s in zip(want.ids.tolist(), supervised)][1:]
    assert examples.lengths.tolist() == [len(e.ids) for e in expected]
    assert examples.n_supervised == sum(int(e.segments[:, 1].sum()) for e in expected)
    assert examples.info.bytes == sum(len(e.response.encode()) for c in conversations() for e in c)


def test_the_table_of_documents_has_a_row_for_each_example(examples):
    names = examples.info.table["sources"]
    for number, exchanges in enumerate(conversations()):
        length, n_bytes, language, source = examples.documents[number]
        assert length == examples.lengths[number] and n_bytes == sum(len(e.response.encode()) for e in exchanges)
        assert (language, names[source]) == (0, exchanges[0].instruction[:5])
    assert len(examples.documents) == 16 and len(names) > 2


@pytest.mark.parametrize("backbone", ["kindling", "transformers"])
def test_the_examples_of_the_targets_are_told_in_the_order_of_the_rows(examples, backbone):
    cfg = ModelConfig(block_size=128, vocab_size=512, backbone=backbone)
    targets = np.concatenate([batch.targets[batch.targets != IGNORE] for batch in examples.in_order(cfg, 3)])
    numbers, counts = examples.targets_in_order(cfg)
    wanted = [examples.example(n).targets for n in numbers]
    assert sorted(numbers) == list(range(16)) and counts.sum() == examples.n_supervised
    assert counts.tolist() == [(t != IGNORE).sum() for t in wanted]
    assert targets.tolist() == [t for ts in wanted for t in ts if t != IGNORE]


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_trains_on_every_example_once_and_the_next_in_another_order(examples, packing):
    rows = ExampleRows(examples, 128, seed=3, packing=packing, batch_size=4)
    epochs = []
    for epoch in range(3):
        targets = [rows.rows(epoch * rows.n_rows + i, 1).targets[0] for i in range(rows.n_rows)]
        epochs.append([tuple(t[t != IGNORE]) for t in targets])
    wanted = sorted(t for n in range(16) for t in examples.example(n).targets if t != IGNORE)
    for epoch in epochs:
        assert sorted(t for row in epoch for t in row) == wanted
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1] != epochs[2]


@settings(deadline=None, max_examples=30)
@given(st.data(), st.booleans())
def test_a_row_depends_on_seed_and_position_alone(folder, data, packing):
    examples, seed = Examples(folder, "train"), data.draw(st.integers(0, 2**40))
    position, count = data.draw(st.integers(0, 60)), data.draw(st.integers(1, 6))

    def targets(first, n):
        rows = ExampleRows(examples, 128, seed, packing, batch_size=4).rows(first, n)
        return [[t for t in row if t != IGNORE] for row in rows.targets.tolist()]

    assert targets(position, count) == [targets(position + i, 1)[0] for i in range(count)]


def test_examples_of_a_packed_row_count_their_own_positions_and_padding_is_alone(examples):
    rows = ExampleRows(examples, 128, seed=0)
    assert rows.n_rows < 16
    for number in range(rows.n_rows):
        batch = rows.batch_of_bins([number], 1)
        lengths = [len(examples.example(i).ids) - 1 for i in rows.bins[number]]
        filled = sum(lengths)
        assert batch.position_ids[0].tolist() == [p for n in lengths for p in range(n)] + [0] * (128 - filled)
        assert (batch.targets[0, filled:] == IGNORE).all()
        assert (batch.idx[0, filled:] != TOKENIZER.eos_id).all()


@pytest.mark.parametrize("eos_id", [0, 7])
def test_padding_is_never_the_end_token(examples, eos_id):
    examples.manifest["eos_id"] = eos_id
    assert ExampleRows(examples, 128, 0).pad_id != eos_id


def test_padded_rows_are_of_like_lengths_and_as_wide_as_the_longest_wants(folder):
    examples = Examples(folder, "train")
    rows = ExampleRows(examples, 128, seed=0, packing=False, batch_size=4)
    places = 0
    for epoch in range(3):
        for first in range(0, 16, 4):
            batch = rows.rows(epoch * 16 + first, 4)
            assert batch.position_ids is None and batch.idx.shape[1] % 32 == 0
            longest = max(int((t != IGNORE).nonzero()[0].max()) for t in batch.targets) + 1
            assert longest <= batch.idx.shape[1] < longest + 32
            places += batch.idx.size if epoch == 0 else 0
    assert rows.wasted == pytest.approx(1 - (examples.lengths - 1).sum() / places)
    shuffled = np.random.default_rng(0).permutation(16).reshape(-1, 4)
    by_chance = sum(4 * examples.lengths[b].max() for b in shuffled)
    assert places < by_chance * 1.1


def test_batches_of_like_lengths_stay_whole_where_epochs_end_in_the_middle_of_one(folder):
    examples = Examples(folder, "train")
    rows = ExampleRows(examples, 128, seed=0, packing=False, batch_size=3)
    for epoch in range(3):
        inside = range(-(-epoch * 16 // 3) * 3, (epoch + 1) * 16 - 2, 3)  # batches of one epoch only
        assert len(inside) >= 4
        spans = []
        for first in inside:
            lengths = [int((t != IGNORE).nonzero()[0].max()) for t in rows.rows(first, 3).targets]
            spans.append((min(lengths), max(lengths)))
        for (_, longest), (shortest, _) in itertools.pairwise(sorted(spans)):
            assert longest <= shortest


def test_what_packing_wastes_is_what_its_rows_leave_empty(examples):
    rows = ExampleRows(examples, 128, seed=0)
    padding = sum((rows.batch_of_bins([n], 1).position_ids[0, 1:] == 0).sum() for n in range(rows.n_rows))
    starts = sum(len(b) - 1 for b in rows.bins)
    assert rows.wasted == pytest.approx((padding - starts) / (128 * rows.n_rows))


@pytest.mark.parametrize("position", ["learned", "rope", "sinusoidal"])
def test_packed_and_padded_rows_have_the_loss_of_the_examples_one_by_one(examples, position):
    cfg = ModelConfig(block_size=128, vocab_size=512, n_layer=2, n_head=2, n_embd=32, position=position, init_std=0.2)
    device.seed_all(1)
    model, runtime = build_model(cfg), device.resolve(TrainConfig(device="cpu", precision="fp32"))
    alone, count = 0.0, 0
    with torch.no_grad():
        for n in range(examples.n_examples):
            example = examples.example(n)
            logits = model(torch.from_numpy(example.ids[None, :-1])).double().log_softmax(-1)[0]
            for place in example.supervised[1:].nonzero()[0]:
                alone -= float(logits[place, example.ids[place + 1]])
                count += 1
    for packing in (True, False):
        rows = ExampleRows(examples, 128, 0, packing, batch_size=5)
        batches = [rows.rows(i, min(5, rows.n_rows - i)) for i in range(0, rows.n_rows, 5)]
        loss, n = mean_loss(model, batches, runtime)
        assert n == count and loss == pytest.approx(alone / count, rel=1e-5)
    assert mean_loss(model, examples.in_order(cfg, 5), runtime) == pytest.approx((alone / count, count), rel=1e-5)


def test_no_example_of_a_packed_row_sees_another(examples):
    cfg = ModelConfig(block_size=128, vocab_size=512, n_layer=2, n_head=2, n_embd=32)
    model, rows = build_model(cfg), ExampleRows(examples, 128, 0)
    number = next(n for n in range(rows.n_rows) if len(rows.bins[n]) > 1)
    batch = rows.batch_of_bins([number], 1)
    idx, positions = torch.from_numpy(batch.idx), torch.from_numpy(batch.position_ids)
    second = int((batch.position_ids[0] == 0).nonzero()[0][1])
    changed = idx.clone()
    changed[0, :second] = (changed[0, :second] + 1) % 512
    with torch.no_grad():
        assert torch.equal(model(idx, None, positions)[0, second:], model(changed, None, positions)[0, second:])


# -- the mask, proven on rows -----------------------------------------------------------------------------------------


def assert_the_mask_holds(examples: Examples, context: int, n_rows: int) -> None:
    """Changing prompts leaves the targets alone, and the gradient of the logits is zero wherever the loss must not reach."""
    cfg = ModelConfig(
        block_size=context, vocab_size=examples.manifest["vocab_size"], n_layer=1, n_head=2, n_embd=16, init_std=0.2
    )
    model, rows = build_model(cfg), ExampleRows(examples, context, 0)
    for number in range(min(n_rows, rows.n_rows)):
        batch = rows.batch_of_bins([number], 1)
        # by the segments alone: at which places the next token is one of a response
        reached = np.zeros(context, dtype=bool)
        at = 0
        for item in rows.bins[number]:
            place = at - 1  # of the token before
            for segment in examples.example(item).segments:
                place += int(segment[PROMPT])
                reached[place : place + int(segment[RESPONSE])] = True
                place += int(segment[RESPONSE])
            at = place
        assert ((batch.targets[0] != IGNORE) == reached).all()
        logits = (
            model(torch.from_numpy(batch.idx), None, torch.from_numpy(batch.position_ids)).detach().requires_grad_()
        )
        torch.nn.functional.cross_entropy(
            logits[0], torch.from_numpy(batch.targets[0]), ignore_index=IGNORE, reduction="sum"
        ).backward()
        norms = logits.grad[0].abs().sum(-1)
        assert (norms[~torch.from_numpy(reached)] == 0).all()
        assert (norms[torch.from_numpy(reached)] > 0).all()
        # and so with the project's own loss, by which the features would be trained
        features = (
            model.hidden(torch.from_numpy(batch.idx), torch.from_numpy(batch.position_ids)).detach().requires_grad_()
        )
        model.hidden = lambda idx, position_ids=None, features=features: features
        model(torch.from_numpy(batch.idx), torch.from_numpy(batch.targets))[0].backward()
        del model.hidden
        assert (features.grad[0].abs().sum(-1)[~torch.from_numpy(reached)] == 0).all()


def test_nothing_but_responses_and_their_ends_is_learnt(examples):
    assert_the_mask_holds(examples, 128, 100)


def test_changing_prompt_tokens_leaves_the_supervised_targets_alone(folder):
    plain, changed = Examples(folder, "train"), Examples(folder, "train")
    read = changed.read

    def other(start, count):
        ids = read(start, count)
        prompts = np.concatenate(
            [~plain.example(n).supervised for n in range(plain.n_examples)]  # of the whole split
        )[start : start + count]
        return np.where(prompts, (ids + 17) % 512, ids)

    changed.read = other
    before, after = (ExampleRows(e, 128, 0).rows(0, 3) for e in (plain, changed))
    assert (before.idx != after.idx).any() and (before.targets == after.targets).all()


@pytest.mark.slow
def test_the_mask_holds_on_real_instructions_with_the_real_vocabulary(tmp_path):
    import gzip

    from kindling.tokenization.pretrained import load_pretrained

    with gzip.open(shared_file("codealpaca/python_alpaca_subset.jsonl.gz"), "rt", encoding="utf-8") as f:
        rows = [json.loads(line) for line in itertools.islice(f, 300)]
    path = str(shared_file("starcoder2_tokenizer/tokenizer.json"))
    tokenizer = load_pretrained(TokenizerConfig(kind="pretrained", path=path))
    real = [(Exchange(r["instruction"], r["output"], r["input"]),) for r in rows]
    examples = Examples(write_examples(tmp_path / "real", real, tokenizer, 512), "train")
    assert examples.n_examples > 280
    assert_the_mask_holds(examples, 512, 10)


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flip", "missing", "truncate"])
def test_a_damaged_table_of_segments_is_refused_in_one_line(tmp_path, damage):
    folder = write_examples(tmp_path / "d", conversations()[:3], TOKENIZER, 128)
    path = folder / "train-segments.npy"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
    path.write_bytes(content[:-8] if damage == "truncate" else content)
    if damage == "missing":
        path.unlink()
    with pytest.raises(DataError) as error:
        Examples(folder, "train")
    assert "train-segments.npy" in str(error.value) and "\n" not in str(error.value)


def test_documents_are_no_examples(folder, tmp_path):
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["splits"]["train"]["segments"] = None
    other = tmp_path / "documents"
    other.mkdir()
    for name in SplitInfo(**manifest["splits"]["train"]).files:
        (other / name).write_bytes((folder / name).read_bytes())
    write_json(other / "manifest.json", with_checksum(manifest))
    with pytest.raises(DataError, match="must hold conversations, but holds documents"):
        Examples(other, "train")


def test_the_transformers_backbone_is_evaluated_on_padded_rows(examples):
    cfg = ModelConfig(block_size=128, vocab_size=512, n_layer=1, n_head=2, n_embd=16)
    assert all(b.position_ids is not None for b in examples.in_order(cfg, 4))
    assert all(b.position_ids is None for b in examples.in_order(replace(cfg, backbone="transformers"), 4))
