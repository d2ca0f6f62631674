"""The law that made the losses is found again, with intervals that hold it as often as they say."""

import itertools

import numpy as np
import pandas
import pytest

from cleangpt.law import fit_law, missing, parabola, predict

LAW = [1.2, 20.0, 0.35, 60.0, 0.3]
SIZES, BUDGETS = (5e4, 1e5, 2e5, 4.5e5, 8e5, 1.8e6, 3.2e6), (3e11, 1e12, 3e12, 1e13)


def made_runs(scatter: float, seed: int = 0) -> pandas.DataFrame:
    """Runs of `LAW` at equal compute C = 6 N D, with a relative scatter of their losses."""
    pairs = pandas.DataFrame(itertools.product(BUDGETS, SIZES), columns=["budget", "parameters"])
    runs = pairs.assign(width=pairs.parameters, tokens=pairs.budget / 6 / pairs.parameters)
    luck = np.exp(scatter * np.random.default_rng(seed).normal(size=len(runs)))
    return runs.assign(loss=predict(LAW, runs.parameters, runs.tokens) * luck)


def test_the_law_that_made_the_losses_is_found():
    assert fit_law(made_runs(0), num_samples=1).law == pytest.approx(LAW, rel=1e-6)


def test_one_run_that_failed_moves_the_law_little():
    runs = made_runs(0)
    runs.loc[10, "loss"] *= 1.5
    assert fit_law(runs, num_samples=1).law == pytest.approx(LAW, rel=0.02)


def test_intervals_hold_the_law_and_a_run_it_has_not_seen():
    held, seen, unseen = np.zeros(5), 0, (3e6, 3e13 / 6 / 3e6)
    for seed in range(4):
        fit = fit_law(made_runs(0.005, seed), num_samples=30)
        low, high = np.quantile(fit.samples, [0.025, 0.975], axis=0)
        held += (low <= LAW) & (low <= high) & (high >= LAW)
        low, high = fit.interval(*unseen)
        luck = np.exp(0.005 * np.random.default_rng(100 + seed).normal(size=50))
        seen += np.mean((low <= predict(LAW, *unseen) * luck) & (predict(LAW, *unseen) * luck <= high))
        assert high - low < 0.1
    assert (held >= 3).all() and seen > 3  # of 4


def test_a_law_without_a_floor_or_without_a_use_of_size_is_found_at_the_edge():
    for law in ([0, *LAW[1:]], [1.2, 0, 0, *LAW[3:]]):
        runs = made_runs(0)
        runs["loss"] = predict(law, runs.parameters, runs.tokens)
        found = predict(fit_law(runs, num_samples=1).law, runs.parameters, runs.tokens)
        np.testing.assert_allclose(found, runs.loss, rtol=1e-3)


def test_the_parabola_of_a_budget_has_the_law_s_minimum():
    runs = made_runs(0)
    part = runs[(runs.budget == 1e13) & (runs.parameters < 1e6)]
    sizes = np.geomspace(5e4, 1e6, 1000)
    least = sizes[predict(LAW, sizes, 1e13 / 6 / sizes).argmin()]
    assert parabola(part)[1] == pytest.approx(least, rel=0.1)
    assert np.isnan(parabola(part.assign(loss=-part.loss))[1])


def test_what_a_fit_lacks_is_told():
    runs = made_runs(0)
    assert missing(runs) == ""
    assert missing(runs[runs.budget == 1e13]) == "a fit needs 2 budgets (finished: 1)"
    assert missing(runs[:2]) == "a fit needs 6 runs (finished: 2), 3 sizes (finished: 2), 2 budgets (finished: 1)"
