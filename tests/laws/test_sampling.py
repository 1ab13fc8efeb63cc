"""Standard errors of correlated series, against processes whose truth is known."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.laws.sampling import mean_se_log, quantile_se_log


def ar1(n: int, phi: float, rng: np.random.Generator) -> np.ndarray:
    """A stationary AR(1) process of unit variance."""
    x = np.empty(n)
    x[0] = rng.standard_normal()
    noise = rng.standard_normal(n) * np.sqrt(1 - phi**2)
    for i in range(1, n):
        x[i] = phi * x[i - 1] + noise[i]
    return x


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.8])
def test_the_error_of_a_mean_grows_with_correlation(phi: float) -> None:
    """Of an AR(1) process it is sqrt((1 + phi) / (1 - phi) / n), here over a mean of 100."""
    rng = np.random.default_rng(1)
    truth = np.sqrt((1 + phi) / (1 - phi) / 1000) / 100
    found = [mean_se_log(100 + ar1(1000, phi, rng)) for _ in range(60)]
    assert float(np.sqrt(np.mean(np.square(found)))) == pytest.approx(truth, rel=0.15)


@pytest.mark.parametrize("p", [0.5, 0.95, 0.99])
@pytest.mark.parametrize("phi", [0.0, 0.7])
def test_intervals_cover_the_true_quantile(p: float, phi: float) -> None:
    """exp of an AR(1) has the quantiles exp(z_p): 90 % of the intervals should hold them; a tail of 4 values less."""
    rng = np.random.default_rng(2)
    truth = NormalDist().inv_cdf(p)
    hits = 0
    for _ in range(200):
        x = np.exp(ar1(400, phi, rng))
        hits += abs(np.log(np.quantile(x, p)) - truth) <= 1.645 * quantile_se_log(x, p)
    assert (0.78 if p < 0.99 else 0.72) <= hits / 200 <= 0.97


@given(st.lists(st.floats(1e-6, 1e6), max_size=60), st.floats(0.01, 0.99))
def test_every_series_has_an_error(values: list[float], p: float) -> None:
    x = np.array(values)
    assert 0 <= mean_se_log(x) < np.inf
    assert 0 <= quantile_se_log(x, p) < np.inf
    assert quantile_se_log(np.full(50, 3.0), p) == 0.0
