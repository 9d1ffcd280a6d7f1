"""Replays of the golden files on privacy: SSIM, ResSFL's term, the attacker's decoder."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mocosfl_jax.attack.quality import quality
from mocosfl_jax.learning.ssim import ssim
from mocosfl_jax.models.decoder import Decoder, DecoderShape
from mocosfl_jax.privacy.simulated import SimulatedAttacker
from tests.golden_errors import Errors, Golden, absolute, exact, relative
from tests.named_arrays import normal, parameter
from tests.test_simulated import Shown, called

SIZE = 32


def pair(name: str, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Images in [0, 1], and the same with noise."""
    a = 1 / (1 + np.exp(-normal(f"{name}/a", shape)))
    b = np.clip(a + normal(f"{name}/noise", shape, 0.1), 0, 1)
    return jnp.asarray(a), jnp.asarray(b)


def replay_ssim(config: dict[str, Any], golden: Golden) -> Errors:
    images = len(golden["ssim_per_image"])
    a, b = pair("ssim", (images, SIZE, SIZE, 3))
    found = quality(a, b)
    return {
        "ssim_per_image": relative(found.ssim, golden["ssim_per_image"], 1e-4),
        "mse": relative(found.mse, golden["mse"], 1e-4),
        "psnr": relative(found.psnr, golden["psnr"], 1e-4),
    }


def replay_ressfl(config: dict[str, Any], golden: Golden) -> Errors:
    """The term of a simulated attacker that gives the images a as they are."""
    a, b = pair(f"ressfl{config['tag']}", (config["images"], SIZE, SIZE, 3))
    alpha, threshold, rows = config["alpha"], config["threshold"], jnp.ones(len(a), bool)
    mean, grad = jax.value_and_grad(lambda x: ssim(x, b).mean())(a)
    attacker = SimulatedAttacker(Shown(), a.shape[1:], alpha, threshold, 1e-3)
    state = attacker.init(jax.random.key(0))
    term_grad, _, metrics = called(attacker, state, b, a, rows, progress=0.0)
    term = alpha * max(0.0, metrics["attacker_ssim"][0] / len(a) - threshold)

    def stats(x: jax.Array) -> np.ndarray:
        x = np.asarray(x, np.float64)
        return np.array([x.sum(), np.linalg.norm(x)])

    # The term and its gradient may be 0: they are compared with what they are made of.
    scale = alpha * np.abs(golden["grad_stats"]).max()
    return {
        "ssim": relative(mean, golden["ssim"], 1e-4),
        "grad_stats": relative(stats(grad), golden["grad_stats"], 1e-4),
        "grad_slice": relative(grad[:, :3, :3], golden["grad_slice"], 1e-4),
        "term": absolute(term, golden["term"], 1e-4 * alpha),
        "term_grad_stats": absolute(stats(term_grad), golden["term_grad_stats"], 1e-4 * scale),
    }


def replay_decoder(config: dict[str, Any], golden: Golden) -> Errors:
    """The name of a file is that of its latents."""
    latents = np.maximum(normal(f"{config['path'].stem}/latents", tuple(config["latents"])), 0)
    shape = DecoderShape("res_norm", config["blocks"], config["channels"])
    decoder, rows = Decoder(shape, SIZE), jnp.ones(len(latents), bool)
    start = jax.jit(decoder.init, static_argnums=3)(jax.random.key(0), latents, rows, False)

    def named(path: tuple, x: jax.Array) -> jax.Array:
        return jnp.asarray(parameter("/".join(["decoder", *(k.key for k in path)]), x.shape))

    params = jax.tree_util.tree_map_with_path(named, start["params"])
    apply = jax.jit(decoder.apply, static_argnums=3)
    output = apply({**start, "params": params}, latents, rows, False)
    norm = np.linalg.norm(np.asarray(output, np.float64))
    return {
        "output_slice": relative(output[:, ::8, ::8], golden["output_slice"], 1e-4),
        "output_stats": relative(norm, golden["output_stats"][1], 1e-4),
        "params": exact(sum(x.size for x in jax.tree.leaves(params)), golden["params"]),
    }
