"""Epsilon of released latents, against the exact formula and another accountant."""

import math

import pytest
from scipy.special import log_ndtr

from mocosfl_jax.privacy.accounting import epsilon_of


def delta_of(epsilon: float, multiplier: float) -> float:
    """Of one Gaussian release (Balle & Wang 2018, theorem 8): sensitivity 2, deviation z."""
    mu = 2 / multiplier
    first = math.exp(log_ndtr(mu / 2 - epsilon / mu))
    return first - math.exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu))


@pytest.mark.parametrize("multiplier", [0.3, 1.0, 4.0, 24.0])
@pytest.mark.parametrize("delta", [1e-5, 1e-2])
def test_one_release_is_the_gaussian_mechanism(multiplier, delta):
    epsilon = epsilon_of(multiplier, 1, delta)
    if epsilon == 0:
        assert delta_of(0, multiplier) <= delta
    else:
        assert delta_of(epsilon, multiplier) == pytest.approx(delta, rel=1e-6)


def test_many_releases_are_a_composition():
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    event = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(24 / 2), 400)
    accountant = PLDAccountant()
    accountant.compose(event)
    assert epsilon_of(24.0, 400, 1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-3)
    assert epsilon_of(24.0, 400, 1e-5) == pytest.approx(8.0, abs=0.01)


def test_little_noise_is_a_large_epsilon_and_no_failure():
    assert 1e6 < epsilon_of(0.01, 400, 1e-5) < math.inf
    assert epsilon_of(1e9, 1, 1e-5) == 0
