"""NoPeek's distance correlation, against its definition in plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.privacy.nopeek import NoPeek, distance_correlation

ROWS = 6
MASK = np.array([True, False, True, True, True, False])
PROGRESS = jnp.float32(0.5)


def by_definition(x: np.ndarray, y: np.ndarray) -> float:
    """R_n of the rows, in float64."""

    def centred(rows: np.ndarray) -> np.ndarray:
        n = len(rows)
        d = np.array([[np.linalg.norm(rows[i] - rows[j]) for j in range(n)] for i in range(n)])
        return d - d.mean(axis=0)[None] - d.mean(axis=1)[:, None] + d.mean()

    a, b = centred(x.astype(np.float64)), centred(y.astype(np.float64))
    return np.sqrt((a * b).mean() / np.sqrt((a * a).mean() * (b * b).mean()))


def client() -> tuple[np.ndarray, np.ndarray]:
    """Pixels and latents that depend on them."""
    rng = np.random.default_rng(2)
    pixels = rng.uniform(size=(ROWS, 4, 4, 3)).astype(np.float32)
    latents = 3 * pixels[:, ::2, ::2, :2] ** 2 + 0.3 * rng.normal(size=(ROWS, 2, 2, 2))
    return pixels, latents.astype(np.float32)


def rows(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), -1)


@jax.jit
def called(pixels: np.ndarray, latents: np.ndarray, mask: np.ndarray):
    part = NoPeek(weight=2.5)
    return part(part.init(jax.random.key(0)), pixels, latents, mask, None, PROGRESS)


correlation = jax.jit(distance_correlation)


@pytest.mark.parametrize("mask", [np.ones(ROWS, bool), MASK])
def test_the_correlation_is_that_of_the_definition(mask):
    pixels, latents = client()
    got = correlation(rows(pixels), rows(latents), mask)
    expected = by_definition(rows(pixels)[mask], rows(latents)[mask])
    assert 0.3 < expected < 0.99
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    far = correlation(rows(pixels) + 100, rows(latents) * np.float32(1e-9), mask)
    np.testing.assert_allclose(far, expected, rtol=1e-2)  # it knows no shift and no scale


def test_the_gradient_is_that_of_weight_times_the_definition():
    pixels, latents = client()
    gradient, state, metrics = called(pixels, latents, MASK)
    assert state == ()
    kept = rows(latents)[MASK].astype(np.float64)
    expected = np.zeros_like(rows(latents))
    for i, row in enumerate(np.flatnonzero(MASK)):
        for j in range(kept.shape[1]):
            step = np.zeros_like(kept)
            step[i, j] = 1e-5
            x = rows(pixels)[MASK]
            change = by_definition(x, kept + step) - by_definition(x, kept - step)
            expected[row, j] = 2.5 * change / 2e-5
    np.testing.assert_allclose(rows(np.asarray(gradient)), expected, rtol=0, atol=1e-5)
    assert np.abs(expected).max() > 0.04
    value, weight = metrics["distance_correlation"]
    np.testing.assert_allclose(value, by_definition(rows(pixels)[MASK], kept), rtol=1e-5)
    assert float(weight) == 1


def test_rows_that_do_not_count_change_nothing():
    pixels, latents = client()
    others = [np.where(MASK[:, None, None, None], x, 7 * x + 1) for x in (pixels, latents)]
    jax.tree.map(
        np.testing.assert_array_equal, called(pixels, latents, MASK), called(*others, MASK)
    )


@pytest.mark.parametrize(
    "case", ["no row", "one row", "latents alike", "images alike", "two images alike"]
)
def test_what_has_no_correlation_has_no_gradient(case):
    pixels, latents = client()
    mask = np.zeros(ROWS, bool)
    mask[: {"no row": 0, "one row": 1}.get(case, ROWS)] = True
    if case == "latents alike":
        latents[:] = latents[0]
    if case == "images alike":
        pixels[:] = pixels[0]
    if case == "two images alike":
        pixels[1], latents[1] = pixels[0], latents[0]
    gradient, _, metrics = called(pixels, latents, mask)
    assert np.isfinite(gradient).all()
    value, weight = metrics["distance_correlation"]
    if case == "two images alike":
        np.testing.assert_allclose(value, by_definition(rows(pixels), rows(latents)), rtol=1e-4)
    else:
        assert (gradient == 0).all() and float(value) == 0
        assert float(weight) == (mask.sum() >= 2)
