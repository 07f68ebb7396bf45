import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_clear_line, script
from hypothesis import given, settings
from hypothesis import strategies as st

import autocomplete
from autocomplete import Completer, Sampling, draw, main, stream
from config import ModelConfig, TokenizerConfig
from kindling.formats.int8_format import difference, write
from kindling.generation.healing import Healing
from kindling.int8 import kernel as int8_kernel
from kindling.int8.model import CompletionError, Model, erf
from kindling.int8_rounding import quantize
from kindling.tokenization.tokenizer import from_json
from kindling.tokenization.train_tokenizer import train_bpe
from model import GPT
from presets import PRESETS

TEXT = "def add(a, b):\n    return a + b\n\nclass Stack:\n    def __init__(self):\n        self.items = []\n" * 3
SHAPES = {
    name: replace(make().model, n_layer=2, n_head=4, n_kv_head=4, n_embd=48, d_ff=80, block_size=32, vocab_size=320)
    for name, make in PRESETS.items()
    if not make().data.instructions
} | {
    "grouped": ModelConfig(
        n_layer=2,
        n_head=4,
        n_kv_head=2,
        n_embd=96,
        block_size=150,
        vocab_size=320,
        position="rope",
        qk_norm="learned",
        norm_eps=1.0,  # so that an epsilon which is left out is seen
    ),
    "stretched": ModelConfig(
        n_layer=2,
        n_head=4,
        n_kv_head=2,
        n_embd=40,
        d_head=24,
        block_size=32,
        vocab_size=320,
        bias=False,
        position="rope",
        norm="rmsnorm",
        activation="swiglu",
        qkv_bias=True,
        rope_factors=(8.0, 1.0, 4.0, 16.0),
    ),
    "pairs": ModelConfig(n_layer=2, n_head=4, n_embd=48, block_size=32, vocab_size=320, bigram_rows=101),
}
HAS_COMPILER = any(map(shutil.which, ("cc", "gcc", "clang")))


def randomized(cfg: ModelConfig) -> GPT:
    """A model whose every weight counts, biases and norms included, and whose logits differ from each other."""
    torch.manual_seed(0)
    model = GPT(cfg).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.3)
    return model


def exported(folder: Path, cfg: ModelConfig, tokenizer=None) -> GPT:
    """Write an export and return the model with the weights that it holds, as torch computes it."""
    model = randomized(cfg)
    folder.mkdir(parents=True)
    write(folder, model, tokenizer or train_bpe([TEXT], TokenizerConfig(), 320), "a test")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and name != "wpe.weight":
                q, scale = quantize(p)
                p.copy_(q * scale[:, None])
    return model


def written(completer: Completer, text: str, sampling: Sampling) -> str:
    """What the model writes behind a text."""
    return "".join(completer.complete(completer.prompt_ids(text, sampling.max_new_tokens)[0], sampling))


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, tuple[Path, GPT]]:
    folder = tmp_path_factory.mktemp("exports")
    return {name: (folder / name, exported(folder / name, cfg)) for name, cfg in SHAPES.items()}


@pytest.mark.parametrize("name", SHAPES)
def test_the_logits_are_those_of_torch_with_the_same_weights(exports, name):
    folder, model = exports[name]
    ids = torch.randint(0, 320, (1, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids)[0].numpy()  # (T, V)
    logits = Model(folder).logits(ids[0].tolist())
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", SHAPES)
def test_a_text_read_in_pieces_gives_the_logits_of_the_whole(exports, name):
    model = Model(exports[name][0])
    ids = list(range(100, 120))
    whole = model.logits(ids)
    cache = model.new_cache()
    model.forward_cached(ids[:7], cache)
    model.forward_cached(ids[7:12], cache)
    pieces = [model.forward_cached([token], cache) for token in ids[12:]]
    assert np.allclose(pieces, whole[12:], atol=1e-4)


@pytest.fixture(scope="module")
def compiled(exports):
    """The models of `exports`, with the kernel in C."""
    if not HAS_COMPILER:
        pytest.skip("there is no C compiler")
    models = {name: Model(folder) for name, (folder, _) in exports.items()}
    for model in models.values():
        model.compile()
    return models


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    """The kernel rounds activations, so that now and then a key or value is rounded to the next number."""
    assert np.sqrt(np.mean((actual - expected) ** 2)) < 1.5e-3 * np.abs(expected).max()


def random_ids(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 320, n).tolist()


def to_bytes(x: np.ndarray) -> np.ndarray:
    """Vectors as int8 with a scale each holds them."""
    scale = np.abs(x).max(-1, keepdims=True) / 127
    return np.rint(x / scale) * scale


class AsInC(Model):
    """The model in NumPy, with keys and values as the kernel's cache holds them."""

    def _heads(self, block, qkv, start):
        q, k, v = super()._heads(block, qkv, start)
        return q, to_bytes(k), to_bytes(v)


@pytest.mark.parametrize("name", SHAPES)
def test_the_kernel_in_c_computes_what_numpy_does(exports, compiled, name):
    by_numpy, by_c = AsInC(exports[name][0]), compiled[name]
    ids = random_ids(by_c.block_size)
    assert_close(by_c.logits(ids), by_numpy.logits(ids))
    caches = by_numpy.new_cache(3), by_c.new_cache(3)
    for texts, n_last in (
        ([(0, [5, 6, 7]), (2, [9])], []),
        ([(1, ids[:9]), (2, [8, 100]), (0, [4])], [4, 2, 1]),
        ([(0, [1])], []),
        ([(2, [3]), (1, [2])], [1, 1]),
    ):
        expected, actual = (model.forward(texts, cache, n_last) for model, cache in zip((by_numpy, by_c), caches))
        assert expected.shape == actual.shape
        assert_close(actual, expected)
    assert caches[0].lengths == caches[1].lengths == [5, 10, 4]


@pytest.mark.parametrize("name", SHAPES)
def test_a_text_has_the_same_bits_in_any_pieces_and_any_company(compiled, name):
    model = compiled[name]
    texts = [random_ids(model.block_size - 3 * i, i) for i in range(4)]  # more tokens than are worked on at once
    alone = [model.logits(ids) for ids in texts]
    together = model.forward(list(enumerate(texts)), model.new_cache(4), [len(ids) for ids in texts])
    assert np.array_equal(together, np.concatenate(alone))
    ends = model.forward(list(enumerate(texts)), model.new_cache(4))
    assert np.array_equal(ends, [logits[-1] for logits in alone])
    cache, done = model.new_cache(4), [0] * 4
    while any(left := [len(ids) - n for ids, n in zip(texts, done)]):
        rows = [row for row in (3, 1, 0, 2) if left[row] and (row < 2 or sum(done) % 3)]  # rows join, wait and end
        rows = rows or [row for row in range(4) if left[row]]
        sizes = [min(left[row], 1 if row == 1 else 1 + (sum(done) + 5 * row) % 11) for row in rows]
        logits = model.forward([(row, texts[row][done[row] : done[row] + n]) for row, n in zip(rows, sizes)], cache)
        for row, n, after in zip(rows, sizes, logits):
            done[row] += n
            assert np.array_equal(after, alone[row][done[row] - 1])
    assert cache.tokens == texts


@pytest.mark.parametrize("name", ["grouped", "pairs"])
@pytest.mark.parametrize("kernel", ["numpy", "c"])
def test_a_kept_prefix_goes_on_as_another_text(exports, compiled, name, kernel):
    model = compiled[name] if kernel == "c" else Model(exports[name][0])
    first, second, ends = random_ids(20, 1), random_ids(25, 2), random_ids(6, 3)
    cache, other = model.new_cache(2), model.new_cache(1)
    model.forward([(0, first), (1, second)], cache)
    other.copy_row(0, cache, 1, 13)
    cache.truncate(1, 8)
    cache.truncate(0, 0)
    logits = [*model.forward([(1, ends), (0, ends)], cache), model.forward_cached(ends, other)]
    for found, text in zip(logits, (second[:8], [], second[:13])):
        assert np.allclose(found, model.logits(text + ends)[-1], atol=0 if kernel == "c" else 1e-4, rtol=0)
    assert cache.tokens == [ends, second[:8] + ends] and other.lengths == [19]


def test_an_export_of_before_the_table_of_pairs_is_read(exports, tmp_path):
    shutil.copytree(exports["autocomplete"][0], tmp_path / "x")
    meta = json.loads((tmp_path / "x" / "config.json").read_text(encoding="utf-8"))
    del meta["model"]["pair_rows"]
    (tmp_path / "x" / "config.json").write_text(json.dumps(meta), encoding="utf-8")
    ids = list(range(9))
    assert np.array_equal(Model(tmp_path / "x").logits(ids), Model(exports["autocomplete"][0]).logits(ids))


def test_a_quantized_weight_is_within_half_a_step():
    weight = torch.randn(64, 33, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 64)[:, None]
    weight[3] = 0
    q, scale = quantize(weight)
    assert q.dtype == torch.int8 and q.abs().max() == 127
    assert ((q * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()


def test_the_error_function_is_that_of_the_standard_library():
    x = np.linspace(-5, 5, 1001, dtype=np.float32)
    assert np.abs(erf(x) - [math.erf(value) for value in x]).max() < 5e-7


@given(st.lists(st.floats(-20, 20), min_size=2, max_size=30), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_a_draw_is_one_of_the_most_likely_tokens(logits, top_k, seed):
    logits = np.array(logits, np.float32)
    token = draw(logits, Sampling(0.7, top_k, 1, seed), np.random.default_rng(seed))
    assert (logits > logits[token]).sum() < top_k
    assert logits[draw(logits, Sampling(0.0, 0, 1, 0), np.random.default_rng(0))] == logits.max()


def test_the_draws_have_the_probabilities_of_a_softmax():
    logits = np.log(np.array([0.5, 0.25, 0.2, 0.05], np.float32))
    rng = np.random.default_rng(0)
    counts = np.bincount([draw(logits, Sampling(1.0, 0, 1, 0), rng) for _ in range(4000)])
    assert np.abs(counts / 4000 - [0.5, 0.25, 0.2, 0.05]).max() < 0.03
    kept = np.bincount([draw(logits, Sampling(1.0, 2, 1, 0), rng) for _ in range(4000)], minlength=4)
    assert np.abs(kept / 4000 - [2 / 3, 1 / 3, 0, 0]).max() < 0.03


def test_the_same_seed_gives_the_same_text(exports):
    completer = Completer(exports["demo"][0])

    def text(seed: int) -> str:
        return written(completer, "def ", Sampling(1.5, 0, 20, seed))

    assert text(3) == text(3) != text(4)


def test_it_ends_at_end_of_text_and_where_the_context_is_full(exports):
    model = Model(exports["autocomplete"][0])
    greedy = Sampling(0.0, 0, 100, 0)
    free = list(stream(model, [5, 6], greedy, eos_id=-1))
    assert len(free) == 30  # of a context of 32
    end = free[4]
    assert list(stream(model, [5, 6], greedy, eos_id=end)) == free[: free.index(end)]


def test_the_prompt_is_cropped_from_the_left_to_leave_room(exports):
    completer = Completer(exports["autocomplete"][0])
    ids = completer.tokenizer.encode(TEXT)
    assert completer.prompt_ids(TEXT, 10) == (ids[-22:], True)
    assert completer.prompt_ids(TEXT, 1000) == (ids[-16:], True)  # half of the context at least stays
    assert completer.prompt_ids(TEXT * 500, 10) == (ids[-22:], True)  # of which most is never encoded
    line = "x = 1; " * 5000 + "\n"  # whose only line break is its end
    assert completer.prompt_ids(line, 10) == (completer.tokenizer.encode(line[-400:])[-22:], True)
    assert completer.prompt_ids("def", 10)[1] is False


def test_a_token_that_begins_documents_is_put_where_the_beginning_is_seen(tmp_path):
    tokenizer = train_bpe([TEXT], TokenizerConfig(bos_token="<s>"), 320)
    exported(tmp_path / "x", SHAPES["demo"], tokenizer)
    completer = Completer(tmp_path / "x")
    assert completer.prompt_ids("def", 8)[0] == [tokenizer.bos_id, *tokenizer.encode("def")]
    assert tokenizer.bos_id not in completer.prompt_ids(TEXT, 8)[0]


@pytest.mark.parametrize("lossy", [False, True])
def test_a_text_that_the_tokenizer_of_an_export_would_change_is_refused_unless_the_run_took_that(lossy, tmp_path):
    content = json.loads(train_bpe([TEXT], TokenizerConfig(), 320).to_json())
    content["normalizer"] = {"type": "Lowercase"}
    exported(tmp_path / "x", SHAPES["demo"], from_json(json.dumps(content), TokenizerConfig(lossy=lossy)))
    tokenizer = Completer(tmp_path / "x").tokenizer
    assert tokenizer.decode(tokenizer.encode("ab")) == "ab"
    if lossy:
        assert tokenizer.encode("Ab") == tokenizer.encode("ab")
    else:
        with pytest.raises(CompletionError, match="as it was, but 'Ab' comes back as 'ab'"):
            tokenizer.encode("Ab")


def test_special_tokens_that_are_spelt_out_are_text(exports):
    completer = Completer(exports["demo"][0])
    ids, _ = completer.prompt_ids("<|endoftext|>", 8)
    assert completer.tokenizer.eos_id not in ids and len(ids) > 3


def test_the_pieces_are_whole_characters(exports, monkeypatch):
    completer = Completer(exports["demo"][0])
    ids = completer.tokenizer.encode("é🔥x")
    assert len(ids) > 3
    monkeypatch.setattr(autocomplete, "stream", lambda *_: iter(ids))
    d = completer.prompt_ids("d", 20)[0]
    assert [piece for piece in completer.complete(d, Sampling(0, 0, 20, 0)) if piece] == ["é", "🔥", "x"]


def test_half_of_a_character_is_left_out_at_the_limit(exports, monkeypatch):
    completer = Completer(exports["demo"][0])
    monkeypatch.setattr(autocomplete, "split_for_healing", lambda ids, spellings: (ids, Healing("", spellings)))
    half = completer.tokenizer.encode("é🔥")[:-1]
    monkeypatch.setattr(autocomplete, "stream", lambda *_: iter(half))
    d = completer.prompt_ids("d", 20)[0]
    texts = ["".join(completer.complete(d, Sampling(0, 0, n, 0))) for n in (len(half), 20)]
    assert texts == ["é", "é\ufffd"]


def test_a_text_cut_inside_a_word_goes_on_inside_it(exports, monkeypatch):
    completer = Completer(exports["demo"][0])
    texts = completer.tokenizer.spellings
    asked = []

    def logits(self, ids, cache):
        """Prefers the longest token that is allowed, then always the one that was best."""
        asked.append(list(ids))
        return np.array([len(text) for text in texts] + [0] * (320 - len(texts)), np.float32)

    monkeypatch.setattr(Model, "forward_cached", logits)
    cut = "class Stack:\n    def __in"
    ids, _ = completer.prompt_ids(cut, 1)
    text = written(completer, cut, Sampling(0.0, 0, 1, 0))
    assert asked[0] == ids[:-3]
    new = [token for ids in asked[1:] for token in ids]
    assert len(new) == 3 and (cut + text).startswith(completer.tokenizer.decode(asked[0] + new)) and text


def test_neither_torch_nor_pydantic_is_imported(exports):
    code = f"""
import sys, autocomplete
assert autocomplete.main([{str(exports["demo"][0])!r}, "--prompt", "def f", "--max-new-tokens", "3"]) == 0
print(sorted({{"torch", "pydantic", "tyro", "transformers", "safetensors"}} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.endswith("[]\n"), result.stderr


def test_the_files_that_it_names_are_enough(exports, tmp_path):
    source = (ROOT / "autocomplete.py").read_text(encoding="utf-8")
    named = re.search(r"^# of the project, it needs (.*?)\n\n", source, re.DOTALL | re.MULTILINE)[1]
    folder, generation, own = (re.findall(r"\w+\.py|kindling/\w*/?", part) for part in named.split(";"))
    assert folder == ["kindling/int8"] and generation.pop() == "kindling/generation/" and own.pop() == "kindling/"
    paths = [f"kindling/generation/{name}" for name in generation] + [f"kindling/{name}" for name in own]
    for path in ("autocomplete.py", *paths):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    shutil.copytree(ROOT / folder[0], tmp_path / folder[0])
    command = [sys.executable, "autocomplete.py", exports["demo"][0], "--prompt", "def f", "--max-new-tokens", "3"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
    assert result.returncode == 0 and result.stdout, result.stderr


def test_a_run_finds_its_export(exports, tmp_path, monkeypatch, capsys):
    shutil.copytree(exports["demo"][0], tmp_path / "runs" / "demo" / "export" / "int8")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.py").write_text("def f", encoding="utf-8")
    texts = []
    for folder in ("demo", "runs/demo", "runs/demo/export/int8"):
        assert main([folder, "--file", "a.py", "--mode", "creative", "--stats"]) == 0
        said = capsys.readouterr()
        texts.append(said.out)
        assert "tokens/s" in said.err and "MB" in said.err
    assert texts[0] and len(set(texts)) == 1


def damage(folder: Path, what: str) -> None:
    if what == "a flipped byte":
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[-100] ^= 1
        (folder / "model.safetensors").write_bytes(content)
    elif what == "no weights":
        (folder / "model.safetensors").unlink()
    elif what == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif what in ("another format", "another shape", "no heads"):
        meta = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if what == "no heads":
            del meta["model"]["n_head"]
        elif what == "another shape":
            meta["model"]["n_layer"] = 3
        else:
            meta["format"] = 99
        (folder / "config.json").write_text(json.dumps(meta), encoding="utf-8")
    else:
        (folder / "config.json").write_text("{", encoding="utf-8")


@pytest.mark.parametrize(
    "what", ["a flipped byte", "no weights", "no tokenizer", "another format", "another shape", "no heads", "no json"]
)
def test_a_damaged_export_is_refused(exports, tmp_path, what):
    shutil.copytree(exports["demo"][0], tmp_path / "x")
    damage(tmp_path / "x", what)
    with pytest.raises(CompletionError, match=r"must be .*export"):
        Completer(tmp_path / "x")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompt", ""], "at least one character"),
        (["--file", "empty.py"], "at least one character"),
        (["--file", "none.py"], "readable text"),
        (["--file", "latin.py"], "UTF-8"),
        (["--file", "."], r"is not \(Is a directory\); name another"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature must be"),
        (["--prompt", "x", "--top-k", "-1"], "--top-k must be"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens must be"),
        (["--prompt", "x", "--seed", "-1"], "--seed must be"),
    ],
)
def test_bad_input_is_one_line(exports, tmp_path, monkeypatch, flags, words):
    (tmp_path / "empty.py").write_text("", encoding="utf-8")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CompletionError, match=words) as error:
        main([str(exports["demo"][0]), *flags])
    assert "\n" not in str(error.value)


def test_an_error_is_one_line_on_stderr(tmp_path):
    assert_one_clear_line(script("autocomplete.py", "nothing", "--prompt", "x", cwd=tmp_path), "nothing", "export.py")


def test_without_a_compiler_the_kernel_is_refused(exports, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(CompletionError, match="C compiler"):
        Model(exports["demo"][0]).compile()


@pytest.mark.skipif(not HAS_COMPILER, reason="there is no C compiler")
def test_a_kernel_that_does_not_compile_is_refused_and_leaves_nothing(exports, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "bad.c").write_text("int step(", encoding="utf-8")
    monkeypatch.setattr(int8_kernel, "SOURCE", tmp_path / "bad.c")
    with pytest.raises(CompletionError, match="must be able to compile"):
        Model(exports["demo"][0]).compile()
    assert list((tmp_path / "kindling").iterdir()) == []


def test_the_difference_that_an_export_states_is_measured(exports):
    folder, model = exports["autocomplete"]
    rows = torch.randint(0, 320, (2, 32), generator=torch.Generator().manual_seed(1))
    largest, loss, changed = difference(folder, model, rows)
    assert largest < 1e-3 and loss == pytest.approx(changed, rel=1e-5)
    with torch.no_grad():
        expected, n = model(rows[:, :-1], rows[:, 1:])
        model.head.bias[7] += 1.0
    assert loss == pytest.approx(float(expected / n), rel=1e-5)
    assert difference(folder, model, rows)[0] == pytest.approx(1.0, rel=1e-2)
    with torch.no_grad():
        model.head.bias[7] -= 1.0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["x", "--top-k", "y"], "--top-k: invalid int value: 'y'; see --help"),
        (["x", "--mode", "z"], "invalid choice: 'z'"),
        (["--prompt", "x"], "required: DIR"),
    ],
)
def test_an_error_of_the_command_line_is_one_line(argv, words, capsys):
    with pytest.raises(SystemExit) as ended:
        autocomplete.parse_arguments(argv)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith("error: ") and words in line
