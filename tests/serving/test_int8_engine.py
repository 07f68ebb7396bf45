import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from fake_engine import greedy_tokens
from test_autocomplete import HAS_COMPILER, SHAPES, TEXT, exported, random_ids

from autocomplete import Sampling, stream
from config import TokenizerConfig
from kindling.errors import KindlingError
from kindling.formats.int8_format import write
from kindling.int8.model import Model
from kindling.serving.int8_engine import Int8Engine, Int8Vocabulary, rows_for
from kindling.serving.logprobs import bytes_of
from kindling.tokenization.train_tokenizer import train_bpe
from model import GPT

NAMES = ("autocomplete", "demo", "grouped", "pairs")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, tuple[Model, Int8Vocabulary]]:
    """Small exports with the kernel in C, or in NumPy without a compiler."""
    found = {}
    for name in NAMES:
        folder = tmp_path_factory.mktemp("export") / name
        exported(folder, SHAPES[name])
        model = Model(folder)
        if HAS_COMPILER:
            model.compile()
        found[name] = model, Int8Vocabulary(folder, model)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_logits_are_those_of_a_text_alone(models, name):
    model, _ = models[name]
    engine = Int8Engine(model, 3)
    a, b = random_ids(12, 1), random_ids(9, 2)
    first = engine.forward([(2, a[:5]), (0, b[:8])])
    engine.copy_row(1, 2, 4)
    second = engine.forward([(1, a[4:]), (0, b[8:])])
    expected = [model.forward_cached(ids, model.new_cache()) for ids in (a[:5], b[:8], a, b)]
    assert np.allclose([*first, *second], expected, atol=1e-4)
    if HAS_COMPILER:
        assert np.array_equal([*first, *second], expected), "to the bit"
    engine.truncate(0, 2)
    assert [list(engine.tokens(row)) for row in range(3)] == [b[:2], a, a[:5]]


@pytest.mark.parametrize("name", NAMES)
def test_the_logits_after_several_tokens_are_those_of_the_whole_text(models, name):
    model, _ = models[name]
    engine = Int8Engine(model, 3)
    a, b, c = random_ids(12, 1), random_ids(9, 2), random_ids(7, 3)
    engine.forward([(0, a[:6]), (1, b[:8])])
    logits = engine.forward([(0, a[6:]), (1, b[8:]), (2, c)], [4, 1, 7])
    expected = np.concatenate([model.logits(ids)[-n:] for ids, n in ((a, 4), (b, 1), (c, 7))])
    assert np.allclose(logits, expected, atol=1e-4)
    if HAS_COMPILER:
        assert np.array_equal(logits, expected), "to the bit"


@pytest.mark.parametrize("name", NAMES)
def test_greedy_texts_in_company_are_those_alone(models, name):
    model, vocabulary = models[name]
    prompts = [random_ids(n, n) for n in (3, 9, 14, 9, 1)] + [[*random_ids(9, 9), 5]]
    alone = [list(stream(model, ids, Sampling(0.0, 0, 10, 0), vocabulary.eos_id)) for ids in prompts]
    assert greedy_tokens(Int8Engine(model, 3), vocabulary, prompts, 10) == alone


def test_the_vocabulary_is_that_of_the_run(models):
    _, vocabulary = models["demo"]
    tokenizer = train_bpe([TEXT], TokenizerConfig(), 320)
    ids = vocabulary.encode(TEXT + "é <|endoftext|>")
    assert ids == tokenizer.encode(TEXT + "é <|endoftext|>") and vocabulary.eos_id == tokenizer.eos_id not in ids
    assert vocabulary.decode(ids) == TEXT + "é <|endoftext|>"
    assert vocabulary.spellings[ids[0]] and len(vocabulary.spellings) == 320 and vocabulary.bos_id is None
    assert b"".join(bytes_of(vocabulary, i) for i in ids).decode("utf-8") == TEXT + "é <|endoftext|>"
    with pytest.raises(KindlingError, match="surrogate"):
        vocabulary.encode("a\ud800")


def test_an_export_says_whether_its_model_fills_in_the_middle(models, tmp_path):
    assert models["demo"][1].fim is None
    tokenizer = train_bpe([TEXT], TokenizerConfig(), 320)
    write(tmp_path, GPT(SHAPES["demo"]), tokenizer, "a test", infills=True)
    model = Model(tmp_path)
    assert Int8Vocabulary(tmp_path, model).fim == tokenizer.fim is not None
    config = tmp_path / "config.json"
    meta = json.loads(config.read_text(encoding="utf-8"))
    del meta["infills"]  # as earlier exports are
    config.write_text(json.dumps(meta), encoding="utf-8")
    assert Int8Vocabulary(tmp_path, Model(tmp_path)).fim is None


def test_the_rows_are_as_many_as_fit_in_memory(models):
    model, _ = models["grouped"]
    cache = model.new_cache(1)
    row = sum(a.nbytes for a in (cache.keys, cache.values, cache.key_scale, cache.value_scale))
    assert rows_for(model, 5 * row) == 5 and rows_for(model, 5 * row - 1) == 4
    assert rows_for(model, 0) == 2


def test_the_server_of_an_export_imports_no_torch():
    code = (
        "import sys, kindling.serving.scheduler, kindling.serving.int8_engine\n"
        "print(sorted({'torch', 'pydantic', 'config', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr
