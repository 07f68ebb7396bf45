"""Logits, loss and gradients of every preset's shape on the GPU, against float64 on the CPU."""

import pytest
from card import LIMITS, NAMES, ONLY_WIDER, PRECISIONS, distance, error, reference, results, runtime_of, shape_of

from kindling import device

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_a_models_numbers_are_those_of_float64(gpu, name, precision, how, record_property):
    if gpu == "cpu" and precision == "fp16" and name not in ("demo", "grouped"):
        pytest.skip("at toy size two shapes are enough for this")
    if gpu == "cpu" and how == "compiled" and (precision, name) != ("bf16", "demo"):
        pytest.skip("at toy size one shape is enough for this")
    if how == "compiled" and name in ONLY_WIDER:
        pytest.skip("compiled, a shape of other widths is enough for this")
    if how == "compiled" and not device.has_compiler(gpu):
        pytest.skip("needs a compiler")
    cfg = shape_of(name, gpu)
    found, expected = results(cfg, runtime_of(gpu, precision), how == "compiled"), reference(cfg)
    errors = (
        error(found.logits, expected.logits),
        distance(found.loss, expected.loss),
        distance(found.gradient, expected.gradient),
    )
    record_property("errors", " ".join(f"{e:.1e}" for e in errors))
    for found_error, limit in zip(errors, LIMITS[precision]):
        assert found_error < limit, errors
