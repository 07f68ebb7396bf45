"""On a GPU: documents stay apart, dropout follows its seed, and decoding with a cache gives what a whole pass gives."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from card import PRECISIONS, copies, error, model_of, runtime_of, shape_of

from kindling import device
from kindling.data.shards import document_position_ids
from kindling.generation.decoding import stream, stream_batch
from kindling.generation.inference import prepare_for_inference
from kindling.generation.sampling import Sampling

pytestmark = pytest.mark.gpu
EOS, TOO_FAR = 5, {"fp32": 1e-4, "bf16": 6e-2, "fp16": 1e-2}
SHAPES = ("demo", "code-50m", "grouped")


def tokens_of(cfg, rows: int = 2) -> torch.Tensor:
    return torch.randint(6, cfg.vocab_size, (rows, cfg.block_size), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_packed_row_gives_the_logits_of_each_document_alone(gpu, name, precision):
    cfg, runtime = shape_of(name, gpu), runtime_of(gpu, precision)
    model = model_of(cfg).to(runtime.device).eval()
    idx = tokens_of(cfg)
    ends = [17, 50, 90]
    idx[:, ends] = EOS
    position_ids = torch.from_numpy(document_position_ids(idx.numpy(), EOS)).to(runtime.device)
    idx = idx.to(runtime.device)
    with torch.no_grad(), runtime.autocast():
        packed = model(idx, position_ids=position_ids)  # (B, T, V)
        for start, stop in zip([0, *ends], [*ends, cfg.block_size]):  # an end of text begins a document
            alone = model(idx[:, start:stop])
            assert error(packed[:, start:stop].double(), alone.double()) < TOO_FAR[precision]


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("masked", [False, True])
def test_dropout_follows_its_random_state(gpu, how, masked):
    if how == "compiled" and not device.has_compiler(gpu):
        pytest.skip("needs a compiler")
    if gpu == "cpu" and how == "compiled" and not masked:
        pytest.skip("at toy size one is enough for this")
    cfg = replace(shape_of("code-50m", gpu), dropout=0.3)
    runtime = runtime_of(gpu, "bf16" if device.has_bf16(gpu) else "fp32")
    model = model_of(cfg).to(runtime.device).train()
    if how == "compiled":
        torch.compiler.reset()
        device.skip_vector_isa_test()
        model.enable_compile()
    idx = tokens_of(cfg)
    position_ids = torch.from_numpy(document_position_ids(idx.numpy(), EOS)).to(runtime.device) if masked else None
    idx = idx.to(runtime.device)

    def hidden() -> torch.Tensor:
        with torch.no_grad(), runtime.autocast():
            return model.hidden(idx, position_ids)

    device.seed_all(7)
    hidden()
    state = device.rng_state(runtime)
    first, second = hidden(), hidden()
    device.set_rng_state(state)
    assert torch.equal(hidden(), first) and not torch.equal(first, second)
    device.seed_all(8)
    hidden()
    assert not torch.equal(hidden(), first)
    model.eval()
    assert torch.equal(hidden(), hidden())


@pytest.mark.parametrize("name", SHAPES)
def test_decoding_with_a_cache_gives_the_logits_of_a_whole_pass(gpu, name):
    cfg, runtime = shape_of(name, gpu), runtime_of(gpu, "fp32")
    model = model_of(cfg).to(runtime.device).eval()
    idx = tokens_of(cfg, 3).to(runtime.device)
    with torch.no_grad():
        whole = model(idx)  # (B, T, V)
    cache = model.new_cache(3)
    for start, stop in ((0, 30), (30, 31), (31, 32), (32, 80)):
        last = model.forward_cached(idx[:, start:stop], cache)  # (B, V)
        assert error(last.double(), whole[:, stop - 1].double()) < TOO_FAR["fp32"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_batch_gives_each_prompt_what_it_gets_alone(gpu, precision):
    cfg = shape_of("modern-50m", gpu)
    gpt = prepare_for_inference(model_of(cfg).to(runtime_of(gpu, "fp32").device), precision)
    prompts = [tokens_of(cfg, 1)[0, :n].tolist() for n in (3, 40, 17, 9, 25)]
    for sampling in (Sampling(max_new_tokens=20, greedy=True), Sampling(max_new_tokens=20, temperature=0.7, seed=4)):
        alone = [list(stream(gpt, ids, sampling, EOS)) for ids in prompts]
        rows = {row.number: row.out for row in stream_batch(gpt, prompts, sampling, EOS, n_rows=3) if row.ended}
        same = np.mean([rows[i] == ids for i, ids in enumerate(alone)])
        # rounding in bfloat16 may decide between two tokens that are almost equally likely
        assert same == 1 if precision == "fp32" else same >= 0.4, (alone, rows)


def test_greedy_text_on_the_gpu_is_that_of_the_cpu(gpu):
    cfg = shape_of("code-50m", gpu)
    here, there = copies(model_of(cfg).eval(), runtime_of(gpu, "fp32"))
    prompt, greedy = tokens_of(cfg, 1)[0, :20].tolist(), Sampling(max_new_tokens=40, greedy=True)
    assert list(stream(there, prompt, greedy, EOS)) == list(stream(here, prompt, greedy, EOS))
    drawn = Sampling(max_new_tokens=40, temperature=0.8, seed=1, repetition_penalty=1.2)
    assert list(stream(there, prompt, drawn, EOS)) == list(stream(here, prompt, drawn, EOS))
