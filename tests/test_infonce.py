"""InfoNCE, against a NumPy loop, closed forms and finite differences; its sums over masked rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.learning.infonce import infonce, normalize
from mocosfl_jax.learning.losses import LOSSES
from mocosfl_jax.learning.sgd import sgd
from mocosfl_jax.methods.mocosfl.server import ServerSide, contrast
from mocosfl_jax.models.contract import Network
from mocosfl_jax.models.split import SplitModel, build_model

WIDTH = 6


def unit(seed: int, *shape: int) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(*shape, WIDTH))
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def loss_loop(query, key, queue, temperature):
    """Cross-entropy of each row against index 0, and whether index 0 wins, in float64."""
    losses, correct = [], []
    for q, k in zip(query.astype(np.float64), key.astype(np.float64), strict=True):
        logits = np.array([q @ k, *(q @ n for n in queue.astype(np.float64))]) / temperature
        losses.append(np.log(np.exp(logits).sum()) - logits[0])
        correct.append(logits.argmax() == 0)
    return np.array(losses), np.array(correct)


@pytest.mark.parametrize("temperature", [0.07, 0.1, 1.0])
@pytest.mark.parametrize("rows, length", [(5, 9), (4, 1)])
def test_values_equal_the_loop(rows, length, temperature):
    query, key, queue = unit(0, rows), unit(1, rows), unit(2, length)
    key[1] = query[1]  # at least one row is right
    key[2], queue[0] = -query[2], query[2]  # and one is wrong
    losses, correct = loss_loop(query, key, queue, temperature)
    result = infonce(query, key, queue, temperature)
    assert result.loss.dtype == jnp.float32 and result.correct.dtype == jnp.bool_
    np.testing.assert_allclose(result.loss, losses, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(result.correct, correct)
    assert correct.any() and not correct.all()


def test_closed_form_of_orthogonal_rows():
    """One positive of cosine 1 among K of cosine 0: log(1 + K exp(-1 / T))."""
    eye = jnp.eye(WIDTH)
    result = infonce(eye[:1], eye[:1], eye[1:], 0.5)
    np.testing.assert_allclose(result.loss, [np.log(1 + (WIDTH - 1) * np.exp(-2))], rtol=1e-6)
    assert result.correct.all()


def test_a_negative_equal_to_the_positive_counts_as_correct():
    eye = jnp.eye(WIDTH)
    result = infonce(eye[:1], eye[:1], eye, 0.5)
    assert result.correct.all()
    np.testing.assert_allclose(result.loss, [np.log(2 + (WIDTH - 1) * np.exp(-2))], rtol=1e-6)


def test_sharp_temperatures_stay_finite():
    query, queue = unit(0, 3), unit(2, 4)
    value, grad = jax.value_and_grad(lambda q: infonce(q, -query, queue, 1e-3).loss.sum())(query)
    assert np.isfinite(value) and np.isfinite(grad).all()


def test_gradient_flows_into_the_queries_only():
    query, key, queue, temperature = unit(0, 3), unit(1, 3), unit(2, 5), 0.2
    weight_M = jnp.asarray([1.0, -2.0, 0.5])

    def total(query, key, queue):
        return (infonce(query, key, queue, temperature).loss * weight_M).sum()

    into_query, into_key, into_queue = jax.grad(total, argnums=(0, 1, 2))(query, key, queue)
    np.testing.assert_array_equal(into_key, 0)
    np.testing.assert_array_equal(into_queue, 0)
    for row in range(3):
        logits = np.concatenate([query[row : row + 1] @ key[row], queue @ query[row]]) / temperature
        p = np.exp(logits) / np.exp(logits).sum()
        expected = (p @ np.vstack([key[row], queue]) - key[row]) / temperature * weight_M[row]
        np.testing.assert_allclose(into_query[row], expected, rtol=1e-4, atol=1e-5)


def test_normalize_gives_unit_rows_and_leaves_zero_finite():
    x = 3 * np.random.default_rng(0).normal(size=(4, WIDTH)).astype(np.float32)
    x[2] = 0
    value, pull = jax.vjp(normalize, jnp.asarray(x))
    norms = np.where(np.arange(4) == 2, 1, np.linalg.norm(x, axis=1))
    np.testing.assert_allclose(value, x / norms[:, None], rtol=1e-5)
    assert np.isfinite(pull(jnp.ones_like(value))[0]).all()


# ------------------------------------------------------------------- rows of the cohort, `contrast`


def tiny_model() -> SplitModel:
    """A server that only pools and has a linear head."""
    return build_model(
        Network("resnet18", 4, (), "3x3s1"),
        cut=1,
        bottleneck=None,
        head="V1",
        head_width=WIDTH,
        image_size=4,
    )


@pytest.mark.parametrize("groups", [1, 3])
def test_contrast_sums_the_rows_that_count_each_against_its_own_queue(groups):
    model, rows, rng = tiny_model(), 6, np.random.default_rng(7)
    variables = model.init(jax.random.key(0))
    views = tuple(jnp.asarray(rng.normal(size=(rows, 2, 2, 4)), jnp.float32) for _ in range(2))
    keys, queue = (unit(1, rows), unit(2, rows)), unit(3, groups, 5)
    keys[1][:2] = np.asarray(normalize(model_output(model, variables, views[1])))[:2]
    mask = np.array([True, False, True, True, True, False])
    side = ServerSide(model, sgd(0.9, 0.0), LOSSES["server"], temperature=0.2, ema=0.9)
    result = jax.jit(contrast, static_argnums=0)(
        side, variables.server, variables.stats, views, keys, queue, jnp.asarray(mask)
    )

    total = 0.0
    for view, key in zip(views, keys, strict=True):
        query = np.asarray(normalize(model_output(model, variables, view)))
        correct = 0
        for row in np.flatnonzero(mask):
            own_queue = queue[row // (rows // groups)]
            one = slice(row, row + 1)
            losses, rights = loss_loop(query[one], key[one], own_queue, 0.2)
            total, correct = total + losses[0], correct + int(rights[0])
    np.testing.assert_allclose(result.loss, total, rtol=1e-5)
    assert result.correct == correct > 0


def model_output(model: SplitModel, variables, latents) -> jax.Array:
    """Pool and linear head by hand."""
    dense = variables.server["head"]["dense1"]
    return latents.mean(axis=(1, 2)) @ dense["kernel"] + dense["bias"][None]
