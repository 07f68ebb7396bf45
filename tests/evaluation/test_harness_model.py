"""A model asked by lm-eval answers what its logits say, and what lm-eval's own class for transformers' models does."""

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install -r requirements-harness.txt")

import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from config import ModelConfig, TokenizerConfig
from kindling.evaluation.harness_model import KindlingLM, first_of, windows
from kindling.generation.decoding import stream
from kindling.generation.sampling import Sampling
from kindling.tokenization.train_tokenizer import train, train_bpe
from model import build_model

CPU = torch.device("cpu")
SHAPE = ModelConfig(block_size=64, vocab_size=500, n_layer=2, n_head=2, n_embd=32, backbone="transformers")
TEXT = Path(__file__).read_text(encoding="utf-8")
PAIRS = [
    ("def add(a, b):", " return a + b"),
    ("def add(a, b): ", "return a - b"),  # its space goes over to the continuation
    ("", "import torch"),
    ("   ", "x"),
    ("one", " two three four"),
    ("from pathlib import Path\n" * 20, "Path"),  # longer than the context
    ("x", TEXT[:300]),  # a continuation that is
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([TEXT], TokenizerConfig(), 500)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return build_model(replace(SHAPE, init_std=0.3)).eval()  # far from uniform


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def ask(model, tokenizer, batch_size: int = 4) -> KindlingLM:
    return KindlingLM(model, tokenizer, CPU, batch_size, progress=False)


@pytest.fixture
def hflm(model, tokenizer):
    """lm-eval's own adapter, over the same weights and the same tokenizer."""
    pytest.importorskip("accelerate", reason="lm-eval's own class needs accelerate: pip install accelerate")
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    end = TokenizerConfig().eos_token
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.to_json()), eos_token=end, pad_token=end
    )
    return HFLM(pretrained=model.gpt2, tokenizer=fast, batch_size=3, device="cpu", backend="causal")


def directly(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One token after another, each from at most block_size tokens before it."""
    total, greedy, ids = 0.0, True, context + continuation
    for at in range(len(context), len(ids)):
        with torch.no_grad():
            logits = model(torch.tensor([ids[max(0, at - model.cfg.block_size) : at]]))[0, -1].double()
        total += logits.log_softmax(-1)[ids[at]].item()
        greedy &= int(logits.argmax()) == ids[at]
    return total, greedy


def test_a_log_likelihood_is_that_of_the_logits(model, tokenizer):
    pairs = [PAIRS[0], PAIRS[2], PAIRS[4], ("", "   x")]
    encoded = [(tokenizer.encode(c) or [tokenizer.eos_id], tokenizer.encode(e)) for c, e in pairs]
    pairs[-1] = ("   ", "x")  # the spaces go over to the continuation, which then begins a document
    got = ask(model, tokenizer).loglikelihood(requests("loglikelihood", pairs))
    for (total, greedy), (context, continuation) in zip(got, encoded):
        expected = directly(model, context, continuation)
        assert total == pytest.approx(expected[0], abs=1e-4) and greedy == expected[1]


def test_the_greedy_continuation_is_known_as_such(model, tokenizer):
    lm, context = ask(model, tokenizer), tokenizer.encode("def add")
    best = list(stream(model, context, Sampling(max_new_tokens=6, greedy=True), tokenizer.eos_id))
    other = [*best[:-1], (best[-1] + 1) % 500]
    assert len(best) == 6
    answers = lm._loglikelihood_tokens([(None, context, best), (None, context, other), (None, context, best[:1])])
    assert [greedy for _, greedy in answers] == [True, False, True]


def test_a_continuation_in_several_windows_is_greedy_only_if_each_is(model, tokenizer):
    ids = tokenizer.encode(TEXT)[: model.cfg.block_size + 1]
    with torch.no_grad():
        best = int(model(torch.tensor([ids[1:]]))[0, -1].argmax())
    ((_, greedy),) = ask(model, tokenizer)._loglikelihood_tokens([(None, ids[:1], [*ids[1:], best])])
    assert not greedy  # though its last token, a window by itself, is


def test_the_batch_size_does_not_change_the_answers(model, tokenizer):
    one = ask(model, tokenizer, 1).loglikelihood(requests("loglikelihood", PAIRS))
    for size in (3, 8):
        several = ask(model, tokenizer, size).loglikelihood(requests("loglikelihood", PAIRS))
        assert [greedy for _, greedy in several] == [greedy for _, greedy in one]
        assert [total for total, _ in several] == pytest.approx([total for total, _ in one], abs=1e-4)


def test_log_likelihoods_are_those_of_lm_evals_own_class(model, tokenizer, hflm):
    pairs = [pair for pair in PAIRS if pair[0] != "   " and len(pair[1]) < 100]  # of which it refuses the others
    ours = ask(model, tokenizer).loglikelihood(requests("loglikelihood", pairs))
    theirs = hflm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    assert [total for total, _ in ours] == pytest.approx([total for total, _ in theirs], abs=1e-3)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_whole_texts_get_the_log_likelihoods_of_lm_evals_own_class(model, tokenizer, hflm):
    texts = [("x = 1",), (TEXT[:2000],), ("",), (TEXT[500:900],)]
    ours = ask(model, tokenizer).loglikelihood_rolling(requests("loglikelihood_rolling", texts))
    theirs = hflm.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-3)


def test_what_is_written_is_what_lm_evals_own_class_writes(model, tokenizer, hflm):
    settings = {"until": ["zz"], "max_gen_toks": 20, "do_sample": False}
    asked = [("def add(a, b):", settings), ("import", settings), (TEXT[:1500], settings)]
    ours = ask(model, tokenizer).generate_until(requests("generate_until", asked))
    assert ours == hflm.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert all(ours)


@given(st.integers(1, 40), st.integers(1, 9))
def test_the_windows_of_a_whole_text_are_lm_evals(n_tokens, block_size):
    tokens = list(range(1, n_tokens + 1))
    ours = [(w.ids, w.n_scored) for w in windows(0, [0], tokens, block_size)]
    theirs = map(make_disjoint_window, get_rolling_token_windows(tokens, 0, block_size, 1))
    assert ours == [(context + predicted, len(predicted)) for context, predicted in theirs]


def test_a_cropped_context_is_counted_and_a_whole_text_in_windows_is_not(model, tokenizer):
    lm = ask(model, tokenizer)
    lm.loglikelihood(requests("loglikelihood", PAIRS))
    assert (lm.n_requests, lm.n_cropped) == (7, 1)  # the last one has two windows
    lm = ask(model, tokenizer)
    lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(TEXT[:2000],)]))
    assert (lm.n_requests, lm.n_cropped) == (1, 0)
    lm.generate_until(requests("generate_until", [(TEXT[:2000], {"until": [], "max_gen_toks": 2})]))
    assert (lm.n_requests, lm.n_cropped) == (2, 1)


def test_a_continuation_within_the_contexts_last_token_is_still_scored(model):
    joined = train(["ab " * 50], TokenizerConfig(), 270)
    assert len(joined.encode("ab")) == 1
    lm = ask(model, joined)
    ((total, _),) = lm.loglikelihood(requests("loglikelihood", [("a", "b")]))
    assert lm.n_apart == 1
    assert total == pytest.approx(directly(model, joined.encode("a"), joined.encode("b"))[0], abs=1e-4)


def test_a_document_begins_with_the_beginning_of_text_where_there_is_one(model):
    with_bos = train_bpe([TEXT], TokenizerConfig(bos_token="<bos>"), 500)
    lm = ask(model, with_bos)
    ((total, _),) = lm.loglikelihood(requests("loglikelihood", [("import", " torch")]))
    assert total == pytest.approx(
        directly(model, [with_bos.bos_id, *with_bos.encode("import")], with_bos.encode(" torch"))[0], abs=1e-4
    )
    (whole,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [("import",)]))
    assert whole == pytest.approx(directly(model, [with_bos.bos_id], with_bos.encode("import"))[0], abs=1e-4)


def test_what_is_written_ends_before_the_first_stop(model, tokenizer):
    lm = ask(model, tokenizer)

    def write(until):
        return lm.generate_until(requests("generate_until", [("import", {"until": until, "max_gen_toks": 12})]))[0]

    whole = write([])
    stop = whole[len(whole) // 2 :][:3]
    assert stop and write(["", stop]) == whole[: whole.index(stop)] == write(stop)
    assert first_of("abcdef", ["e", "cd", "zz"]) == "ab"


def test_requests_with_other_settings_keep_their_place(model, tokenizer):
    lengths = [3, 1, 3, 2]
    asked = [("import", {"until": [], "max_gen_toks": n}) for n in lengths]
    texts = ask(model, tokenizer).generate_until(requests("generate_until", asked))
    longest = list(stream(model, tokenizer.encode("import"), Sampling(max_new_tokens=3, greedy=True), tokenizer.eos_id))
    assert texts == [tokenizer.decode(longest[:n]) for n in lengths]
