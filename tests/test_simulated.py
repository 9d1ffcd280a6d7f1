"""ResSFL's simulated attacker, against plain steps without padding."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.costs.memory import memory_of
from mocosfl_jax.costs.report import images_of
from mocosfl_jax.learning.ssim import ssim
from mocosfl_jax.models.decoder import Decoder, DecoderShape
from mocosfl_jax.privacy.nopeek import NoPeek
from mocosfl_jax.privacy.simulated import AttackerState, SimulatedAttacker, simulated_decoder
from mocosfl_jax.privacy.together import Together
from mocosfl_jax.run.plan import plan
from mocosfl_jax.run.program import program_of
from tests.test_costs import setting

SIZE, LATENT = 8, (4, 4, 2)
SHAPE = DecoderShape("res_norm", blocks=0, channels=4)
MASK = np.array([True, False, True, True])
ALPHA, THRESHOLD, RATE = 2.0, 0.02, 0.01


@functools.cache
def attacker(norm: str = "batch") -> SimulatedAttacker:
    decoder = simulated_decoder(SHAPE, SIZE, rows=20 if norm == "batch" else 19)
    assert decoder.norm == norm
    return SimulatedAttacker(decoder, LATENT, ALPHA, THRESHOLD, RATE)


@functools.cache
def started(norm: str = "batch") -> AttackerState:
    return jax.jit(attacker(norm).init)(jax.random.key(3))


def batch(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels, and latents that tell much of them."""
    rng = np.random.default_rng(seed)
    pixels = rng.uniform(size=(len(MASK), SIZE, SIZE, 3)).astype(np.float32)
    latents = pixels.reshape(-1, 4, 2, 4, 2, 3).mean(axis=(2, 4))[..., :2]
    return pixels, (4 * latents - 2).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def called(part: Any, state: Any, pixels: Any, latents: Any, mask: Any, progress: float):
    return part(state, pixels, latents, mask, jax.random.key(0), jnp.float32(progress))


class Shown(nn.Module):
    """A decoder whose images are the latents."""

    @nn.compact
    def __call__(self, latents: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        self.param("unused", nn.initializers.zeros, (1,))
        return latents


# ------------------------------------------------------------------------------------ plain steps


@functools.partial(jax.jit, static_argnums=0)
def by_autodiff(decoder: Decoder, old: AttackerState, new: AttackerState, pixels, latents):
    """Of rows that all count: gradients of the parameters and statistics of the training pass of
    `old`; gradient of the term and SSIM of the evaluation of `new`."""
    rows = jnp.ones(len(latents), bool)

    def dissimilar(params):
        variables = {"params": params, "batch_stats": old.stats}
        images, updated = decoder.apply(variables, latents, rows, True, mutable=["batch_stats"])
        return -ssim(images, pixels).mean(), updated.get("batch_stats", {})

    def term(latents):
        variables = {"params": new.params, "batch_stats": new.stats}
        mean = ssim(decoder.apply(variables, latents, rows, False), pixels).mean()
        return ALPHA * jnp.maximum(0, mean - THRESHOLD), mean

    grads, stats = jax.grad(dissimilar, has_aux=True)(old.params)
    return grads, stats, *jax.grad(term, has_aux=True)(latents)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_step_is_one_of_adam_and_then_the_term(norm):
    part, state = attacker(norm), started(norm)
    for seed, progress, factor in ((1, 0.25, 1.0), (2, 0.5, 0.2), (3, 0.7, 0.04), (4, 0.9, 0.008)):
        pixels, latents = batch(seed)
        gradient, new, metrics = called(part, state, pixels, latents, MASK, progress)
        grads, stats, expected, mean = by_autodiff(
            part.decoder, state, new, pixels[MASK], latents[MASK]
        )
        assert_close(gradient[MASK], expected)
        assert np.abs(expected).max() > 1e-4
        assert (np.asarray(gradient)[~MASK] == 0).all()
        assert_close(metrics["attacker_ssim"], (3 * mean, 3.0))
        assert float(mean) > THRESHOLD
        assert_close(metrics["attacker_above_threshold"], (1.0, 1.0))
        assert_close(new.stats, stats)
        old, adam = state.opt_state, new.opt_state
        assert int(adam.count) == seed
        assert_close(adam.mu, jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, old.mu, grads))
        assert_close(adam.nu, jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, old.nu, grads))
        moved = functools.partial(adam_by_hand, RATE * factor, seed)
        assert_close(new.params, jax.tree.map(moved, state.params, adam.mu, adam.nu), 2e-5)
        state = new


def adam_by_hand(rate: float, step: int, param: Any, mu: Any, nu: Any) -> np.ndarray:
    param, mu, nu = (np.asarray(x, np.float64) for x in (param, mu, nu))
    return param - rate * mu / (1 - 0.9**step) / (np.sqrt(nu / (1 - 0.999**step)) + 1e-8)


def assert_close(got: Any, want: Any, tolerance: float = 2e-4) -> None:
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = max(float(np.abs(y).max()), 1e-3)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * scale)


def test_the_attacker_learns_to_see():
    part, state, seen = attacker(), started(), []
    pixels, latents = batch(1)
    for _ in range(40):
        _, state, metrics = called(part, state, pixels, latents, MASK, 0.0)
        seen.append(float(metrics["attacker_ssim"][0]) / 3)
    assert seen[-1] > seen[0] + 0.1


def test_the_term_is_left_out_of_the_warmup():
    pixels, latents = batch(1)
    part = dataclasses.replace(attacker(), warmup=0.5)
    for progress, share in ((0.0, 0.0), (0.49, 0.0), (0.5, 1.0), (0.9, 1.0)):
        gradient, *rest = called(part, started(), pixels, latents, MASK, progress)
        plain, *others = called(attacker(), started(), pixels, latents, MASK, progress)
        assert_close((gradient, *rest), (share * plain, *others))
        assert (np.asarray(gradient) == 0).all() == (share == 0)
        assert np.abs(plain).max() > 1e-4


def test_a_weak_attacker_is_put_up_with():
    pixels, _ = batch(1)
    noisy = pixels + np.float32(0.1)
    mask, gradients = np.ones(len(MASK), bool), []
    for threshold in (0.999, 0.5):
        part = SimulatedAttacker(Shown(), pixels.shape[1:], ALPHA, threshold, RATE)
        state = part.init(jax.random.key(0))
        gradient, _, metrics = called(part, state, pixels, noisy, mask, 0.0)
        gradients.append(np.abs(gradient).max())
        assert_close(metrics["attacker_above_threshold"], (float(threshold == 0.5), 1.0))
    assert gradients[0] == 0 and gradients[1] > 1e-5


def test_a_client_without_an_image_keeps_its_attacker():
    pixels, latents = batch(1)
    no_row = np.zeros(len(MASK), bool)
    gradient, state, metrics = called(attacker(), started(), pixels, latents, no_row, 0.0)
    jax.tree.map(np.testing.assert_array_equal, state, started())
    assert (np.asarray(gradient) == 0).all()
    assert all(float(x) == 0 for pair in metrics.values() for x in pair)


def test_rows_that_do_not_count_change_nothing():
    pixels, latents = batch(1)
    others = [np.where(MASK[:, None, None, None], x, 1 - x) for x in (pixels, latents)]
    results = [
        called(attacker(), started(), *images, MASK, 0.0) for images in ((pixels, latents), others)
    ]
    assert_close(*results)


def test_clients_start_with_attackers_of_their_own():
    """Xavier uniform, biases 0."""
    one, other = started(), jax.jit(attacker().init)(jax.random.key(4))
    kernel, second = (x.params["layer1"]["conv"]["kernel"] for x in (one, other))
    bound = np.sqrt(6 / (9 * (4 + 4)))
    assert 0.9 * bound < np.abs(kernel).max() <= bound
    assert np.abs(kernel - second).max() > 0.1
    leaves = jax.tree_util.tree_leaves_with_path(one.params)
    biases = [x for path, x in leaves if path[-1].key == "bias"]
    assert biases and all((x == 0).all() for x in biases)


def test_few_rows_have_no_batch_statistics():
    assert jax.tree.leaves(started("group").stats) == []
    assert len(jax.tree.leaves(started("batch").stats)) > 0


def test_two_extra_gradients_add_up():
    pixels, _ = batch(1)
    latents = pixels + np.float32(0.1)
    parts = SimulatedAttacker(Shown(), pixels.shape[1:], ALPHA, 0.5, RATE), NoPeek(0.5)
    both = Together(parts)
    state = both.init(jax.random.key(1))
    gradient, new, metrics = called(both, state, pixels, latents, MASK, 0.0)
    alone = [called(p, s, pixels, latents, MASK, 0.0) for p, s in zip(parts, state, strict=True)]
    assert_close(gradient, alone[0][0] + alone[1][0])
    assert_close(new, (alone[0][1], alone[1][1]))
    assert_close(metrics, {**alone[0][2], **alone[1][2]})


def test_the_estimate_of_memory_holds_the_attackers_passes():
    """What a compiled step takes more than without an attacker, and at most three times that: the
    estimate keeps every residual, of which a compiler makes some anew."""
    fields = {"width": 4, "blocks_per_stage": (1,), "head_width": 8, "num_clients": 5}
    fields |= {"batch_size": 4, "cohort_chunks": 1, "ressfl.decoder": "conv_normN0C8"}

    def bytes_of(alpha: float) -> tuple[int, float]:
        config = setting(**fields, **{"ressfl.alpha": alpha})
        images = images_of(config, config.images_a_step)
        train = program_of(config).method.client_work(images).train
        return memory_of(train).temporaries, plan(config).step_bytes / 5

    (without, plain), (measured, estimated) = bytes_of(0.0), bytes_of(2.0)
    assert measured - without > 3 * without  # it is most of a step
    assert measured - without < estimated - plain < 3 * (measured - without)
