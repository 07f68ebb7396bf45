"""The scaling law: the constants that made the data come back, and the paper's optimum comes of the paper's constants."""

import math

import numpy as np
import pytest
import torch

from kindling.studies.scaling_law import DELTA, NAMES, Law, ScalingError, _Problem, best_for_seconds, fit_law

# Hoffmann et al. 2022, approach 3, with the digits that its sources have (Besiroglu et al. 2024, section 2)
CHINCHILLA = Law(1.6934, 406.4, 410.7, 0.3392, 0.2849)
OURS = Law(0.6, 20.0, 400.0, 0.30, 0.45)  # bits per byte, of small models
N, D = (grid.ravel() for grid in np.meshgrid([1.2e5, 6.6e5, 1.9e6, 4.2e6], [2.3e5, 5e5, 1.07e6, 2.3e6]))


def losses(law: Law, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    exact = np.array([law.loss(n, d) for n, d in zip(N, D)])
    return exact * np.exp(np.random.default_rng(seed).normal(0, noise, len(exact)))


@pytest.mark.parametrize("law", [OURS, Law(1.69, 406.4, 410.7, 0.34, 0.28)])
def test_the_constants_of_data_without_noise_come_back(law):
    fit = fit_law(N, D, losses(law), n=3)
    assert fit.law == pytest.approx(law, rel=1e-4)
    assert np.abs(fit.residuals).max() < 1e-7
    assert fit.resamples == pytest.approx(np.tile(law, (3, 1)), rel=1e-3)


def test_with_noise_the_intervals_hold_the_constants_and_a_run_beyond():
    fit = fit_law(N, D, losses(OURS, 0.005), n=60)
    for name in NAMES:
        low, high = fit.interval(name)
        assert low <= getattr(OURS, name) <= high, name
        assert high > low
    loss, (low, high) = fit.predict(7.8e6, 2.3e6)
    assert low < OURS.loss(7.8e6, 2.3e6) < high and low < loss < high
    assert high - low < 0.15
    (of_n, of_d), (best_n, best_d) = fit.optimum_intervals(6e12), OURS.optimum(6e12)
    assert of_n.low <= best_n <= of_n.high and of_d.low <= best_d <= of_d.high


def test_one_run_that_went_wrong_hardly_moves_the_law():
    """That is what the Huber loss is for."""
    spoiled = losses(OURS)
    spoiled[5] *= 1.3
    law = fit_law(N, D, spoiled, n=1).law
    assert [law.loss(n, d) for n, d in zip(N, D)] == pytest.approx(losses(OURS), rel=2e-3)


def test_the_published_constants_give_the_published_optimum():
    small, large = CHINCHILLA.optimum(1e20), CHINCHILLA.optimum(1e22)
    a, b = (math.log(y / x) / math.log(100) for x, y in zip(small, large))
    assert (round(a, 2), round(b, 2)) == (0.46, 0.54)  # table 2, approach 3
    assert CHINCHILLA.optimum(5.76e23)[0] == pytest.approx(40e9, rel=0.02)  # figure 4: 40B for the budget of Gopher


@pytest.mark.parametrize(("a", "b"), [(0.0, 0.1), (0.1, 0.0), (0.0, 0.0), (1e-12, 0.1)])
def test_the_optimum_of_an_exponent_of_zero_is_at_the_end_of_the_budget(a, b):
    """Else one such resample makes an interval of the table end in nan."""
    parameters, tokens = OURS._replace(a=np.float64(a), b=np.float64(b)).optimum(6e10)
    assert parameters >= 1 and tokens >= 1 - 1e-9
    assert parameters * tokens == pytest.approx(1e10)
    assert a or not b or parameters == 1


def test_the_optimum_is_the_lowest_loss_of_its_budget():
    best_n, best_d = OURS.optimum(1e15)
    assert 6 * best_n * best_d == pytest.approx(1e15)
    others = [OURS.loss(n, 1e15 / 6 / n) for n in best_n * np.geomspace(0.5, 2, 21)]
    assert OURS.loss(best_n, best_d) == pytest.approx(min(others), rel=1e-12)


def test_by_time_the_best_size_is_that_by_compute_if_a_token_takes_6_n():
    sizes = np.geomspace(1e4, 1e8, 30)
    assert best_for_seconds(OURS, 1e15, sizes, 6 * sizes) == pytest.approx(OURS.optimum(1e15), rel=0.01)
    slow_when_small = np.full(30, 6 * sizes[-1])  # a token takes the same time at each size
    assert best_for_seconds(OURS, 1e15, sizes, slow_when_small)[0] == pytest.approx(sizes[-1])


def lbfgs(problem: _Problem, start: np.ndarray) -> float:
    """Return the objective where torch's L-BFGS ends, from one start."""
    x, y, target = (torch.from_numpy(column) for column in (problem.x, problem.y, problem.log_loss))
    point = torch.tensor(start, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [point], max_iter=100, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        e, a0, b0, a, b = point
        r = torch.logsumexp(torch.stack([e.expand(len(x)), a0 - a * x, b0 - b * y]), 0) - target
        loss = torch.nn.functional.huber_loss(r, torch.zeros_like(r), reduction="sum", delta=DELTA)
        loss.backward()
        return loss

    optimizer.step(closure)
    return closure().item()


def test_no_descent_by_lbfgs_ends_lower():
    problem = _Problem(N, D, losses(OURS, 0.004, seed=3))
    starts = problem.starts()
    _, costs = problem.minimise(starts.copy(), np.ones((1, len(N))))
    theirs = [lbfgs(problem, start) for start in starts[40::100]]
    assert costs.min() <= min(theirs) + 1e-9
    assert min(theirs) == pytest.approx(costs.min(), rel=1e-3)  # and they do end there


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        (np.arange(16) < 7, "there are 7 of"),
        (N < 1.3e5, "of 1 and 4"),
        (D < 2.4e5, "of 4 and 1"),
        (N < 0, "0 of 0 and 0"),
    ],
)
def test_too_few_runs_sizes_or_lengths_are_refused_in_one_line(keep, said):
    with pytest.raises(ScalingError, match=said) as error:
        fit_law(N[keep], D[keep], losses(OURS)[keep])
    assert "\n" not in str(error.value)


def test_a_run_without_a_finite_loss_is_refused():
    broken = losses(OURS)
    broken[3] = math.nan
    with pytest.raises(ScalingError, match="must be finite"):
        fit_law(N, D, broken)
