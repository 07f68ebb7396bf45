import pytest
import torch
from fake_engine import greedy_tokens
from test_autocomplete import SHAPES, TEXT, random_ids, randomized

from config import TokenizerConfig
from kindling.generation.decoding import stream
from kindling.generation.inference import prepare_for_inference
from kindling.generation.sampling import Sampling
from kindling.serving.torch_engine import TorchEngine, TorchVocabulary, rows_for
from kindling.tokenization.train_tokenizer import train_bpe
from model import GPT

NAMES = ("autocomplete", "demo", "grouped", "pairs", "fineweb-nano")


@pytest.fixture(scope="module")
def models() -> dict[str, GPT]:
    return {name: randomized(SHAPES[name]) for name in NAMES}


@pytest.fixture(scope="module")
def vocabulary() -> TorchVocabulary:
    return TorchVocabulary(train_bpe([TEXT], TokenizerConfig(), 320), 320, infills=True)


@pytest.mark.parametrize("name", NAMES)
def test_the_logits_are_those_of_the_whole_text(models, name):
    engine = TorchEngine(models[name], 4)
    a, b, c = random_ids(12, 1), random_ids(9, 2), random_ids(7, 3)
    engine.forward([(2, a[:5]), (0, b[:4]), (3, c[:6])])
    engine.copy_row(1, 2, 4)
    logits = engine.forward([(3, c[6:]), (1, a[4:]), (0, b[4:5])])
    assert [list(engine.tokens(row)) for row in range(4)] == [b[:5], a, a[:5], c]
    again = engine.forward([(2, a[5:])])
    engine.truncate(0, 2)
    engine.truncate(3, 0)
    last = engine.forward([(0, b[2:]), (3, b[:1])])
    with torch.no_grad():
        expected = [models[name](torch.tensor([ids]))[0, -1] for ids in (c, a, b[:5], a, b, b[:1])]
    actual = torch.from_numpy(logits).tolist() + torch.from_numpy(again).tolist() + torch.from_numpy(last).tolist()
    assert torch.allclose(torch.tensor(actual), torch.stack(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_logits_after_several_tokens_are_those_of_the_whole_text(models, name):
    engine = TorchEngine(models[name], 3)
    a, b, c = random_ids(12, 1), random_ids(9, 2), random_ids(7, 3)
    engine.forward([(0, a[:6]), (1, b[:8])])
    logits = engine.forward([(0, a[6:]), (1, b[8:]), (2, c)], [4, 1, 7])
    with torch.no_grad():
        expected = [models[name](torch.tensor([ids]))[0, -n:] for ids, n in ((a, 4), (b, 1), (c, 7))]
    assert torch.allclose(torch.from_numpy(logits), torch.cat(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_texts_in_company_are_those_alone(models, vocabulary, name):
    prompts = [random_ids(n, n) for n in (3, 9, 14, 9, 1)] + [[*random_ids(9, 9), 5]]
    greedy = Sampling(greedy=True, max_new_tokens=10)
    alone = [list(stream(models[name], ids, greedy, vocabulary.eos_id)) for ids in prompts]
    assert greedy_tokens(TorchEngine(models[name], 3), vocabulary, prompts, 10) == alone


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_it_runs_in_the_precisions_of_generation(precision):
    gpt = prepare_for_inference(randomized(SHAPES["demo"]), precision)
    engine = TorchEngine(gpt, 2)
    ids = random_ids(9, 1)
    engine.forward([(0, ids[:7]), (1, ids[:3])])
    logits = engine.forward([(0, ids[7:8]), (1, ids[3:4])])
    for row, n in ((0, 8), (1, 4)):
        expected = gpt.forward_cached(torch.tensor([ids[:n]]), gpt.new_cache(1))[0].float()
        assert torch.allclose(torch.from_numpy(logits[row]), expected, atol=0.02 * float(expected.abs().max()))


def test_the_vocabulary_is_that_of_the_run(vocabulary):
    tokenizer = train_bpe([TEXT], TokenizerConfig(), 320)
    ids = vocabulary.encode(TEXT)
    assert ids == tokenizer.encode(TEXT) and vocabulary.decode(ids) == TEXT
    assert vocabulary.fim == tokenizer.fim is not None and len(vocabulary.spellings) == 320
    assert TorchVocabulary(tokenizer, 320, infills=False).fim is None


def test_the_rows_are_as_many_as_fit_in_memory(models):
    cache = models["grouped"].new_cache(1)
    row = cache.keys.nbytes + cache.values.nbytes
    assert rows_for(models["grouped"], 5 * row) == 5 and rows_for(models["grouped"], 5 * row - 1) == 4
    assert rows_for(models["grouped"], 0) == 2
