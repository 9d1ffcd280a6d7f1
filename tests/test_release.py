"""What a client does to its latents before it sends them, against NumPy, image by image."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.privacy.release import Release, kept_values, quantize

SHAPE = (5, 3, 4, 2)
SIZE = math.prod(SHAPE[1:])


def latents() -> np.ndarray:
    """Rows of different size and sign; the last is 0, and one has zeros among its values."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=SHAPE) * np.array([0.1, 1, 4, 2, 0]).reshape(-1, 1, 1, 1) + 0.02
    x[3] = np.maximum(x[3], 0)
    x[4] = 0
    return x.astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def apply(release: Release, x: jax.Array, key: jax.Array) -> jax.Array:
    return release(x, key)


def released(release: Release, x: np.ndarray, key: int = 0) -> np.ndarray:
    return np.asarray(apply(release, x, jax.random.key(key)))


def gradient(release: Release, x: np.ndarray, weight: np.ndarray | float, key: int = 0):
    """Of the weighted sum of what is released."""
    product = jax.jit(jax.grad(lambda x: (release(x, jax.random.key(key)) * weight).sum()))
    return np.asarray(product(x))


def rows(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), -1)


# ---------------------------------------------------------------------------------------- clipping


def test_clipping_scales_large_images_down_and_no_others():
    x, norm = latents(), 3.0
    got = released(Release(clip_norm=norm), x)
    norms = np.linalg.norm(rows(x), axis=1)
    assert (norms > norm).tolist() == [False, True, True, True, False]
    for row, clipped, length in zip(x, got, norms, strict=True):
        if length <= norm:
            np.testing.assert_array_equal(clipped, row)
        else:
            np.testing.assert_allclose(clipped, row * (norm / length), rtol=1e-6)


def test_the_gradient_of_clipping_is_that_of_the_formula():
    x, norm = latents(), 3.0
    weight = np.random.default_rng(4).normal(size=SHAPE).astype(np.float32)
    got = gradient(Release(clip_norm=norm), x, weight)
    for row, w, result in zip(rows(x), rows(weight), rows(got), strict=True):
        length = np.linalg.norm(row)
        expected = w
        if length > norm:  # d (norm x / |x|) / dx = norm (1 / |x| - x x^T / |x|^3)
            expected = norm * (w / length - row * (row @ w) / length**3)
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------- pruning


def test_top_k_keeps_the_largest_magnitudes_of_each_image():
    x = latents()
    got = rows(released(Release(dropped=0.7), x))
    kept = 7  # of 24: 7.2 are not dropped
    assert kept_values(SIZE, 0.7) == kept
    for row, pruned in zip(rows(x), got, strict=True):
        order = np.argsort(-np.abs(row), kind="stable")
        expected = np.zeros_like(row)
        expected[order[:kept]] = row[order[:kept]]
        np.testing.assert_array_equal(pruned, expected)


def test_the_gradient_of_pruning_is_that_of_what_is_kept():
    x = latents()[:3]
    for release, factor in (
        (Release(dropped=0.7), 1),
        (Release(dropped=0.7, pruning="random"), 0.3),
    ):
        kept = released(release, x, key=5) != 0
        np.testing.assert_allclose(gradient(release, x, 1.0, key=5), kept / factor, rtol=1e-6)


def test_random_pruning_drops_a_share_and_scales_the_rest():
    x = np.random.default_rng(1).uniform(1, 2, (400, 4, 5, 2)).astype(np.float32)
    release = Release(dropped=0.75, pruning="random")
    got = released(release, x)
    kept = got != 0
    np.testing.assert_allclose(got[kept], x[kept] * 4, rtol=1e-6)
    assert set(rows(kept).sum(axis=1)) == {10}
    often = rows(kept).mean(axis=0)  # of 400 images, each value of an image is kept at 1 in 4
    assert np.abs(often - 0.25).max() < 5 * math.sqrt(0.25 * 0.75 / 400)
    assert np.abs(got.mean() - x.mean()) < 0.02  # unbiased
    np.testing.assert_array_equal(got, released(release, x))  # whoever has the key, has the mask
    assert not np.array_equal(got, released(release, x, key=1))


# ------------------------------------------------------------------------------------------- noise


def test_noise_has_its_deviation_and_no_image_shares_it():
    x = np.zeros((300, 4, 5, 2), np.float32)
    noise = released(Release(clip_norm=2.0, noise_std=6.0), x)
    assert abs(noise.std() - 6) < 6 * 5 / math.sqrt(2 * noise.size)
    assert abs(noise.mean()) < 6 * 5 / math.sqrt(noise.size)
    assert len(np.unique(noise)) > 0.99 * noise.size
    kurtosis = np.mean((noise / noise.std()) ** 4)
    assert abs(kurtosis - 3) < 0.3


def test_noise_comes_after_clipping_and_pruning():
    x, key = latents(), 7
    for pruning in ("top_k", "random"):
        clean = Release(clip_norm=1.0, dropped=0.5, pruning=pruning)
        noisy = Release(clip_norm=1.0, dropped=0.5, pruning=pruning, noise_std=0.3)
        base, got = released(clean, x, key), released(noisy, x, key)
        noise = got - base
        if pruning == "random":  # what the server knows to be dropped is not sent
            assert ((got != 0).sum(axis=(1, 2, 3)) == SIZE // 2).all()
            assert np.all(noise[got == 0] == 0)
        else:  # nothing tells which values were kept
            assert (noise != 0).all()


def test_no_image_exceeds_the_norm_that_the_noise_is_measured_by():
    x = np.zeros((1, 1, 1, 4), np.float32)
    x[..., :2] = 1e3  # random pruning may keep all that an image has, and scales it up
    release = Release(clip_norm=2.0, dropped=0.5, pruning="random")
    norms = [np.linalg.norm(released(release, x, key)) for key in range(30)]
    assert release.largest_norm() == 4.0
    assert max(norms) == pytest.approx(4.0, rel=1e-5)
    assert Release(clip_norm=2.0, dropped=0.5).largest_norm() == 2.0
    assert Release(bits=8).largest_norm() is None


# ---------------------------------------------------------------------------------------- rounding


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_rounding_gives_the_nearest_level(bits):
    x = latents()
    got = rows(released(Release(bits=bits), x)).astype(np.float64)
    for row, rounded in zip(rows(x).astype(np.float64), got, strict=True):
        levels = np.linspace(row.min(), row.max(), 2**bits)
        nearest = levels[np.abs(row[:, None] - levels[None]).argmin(axis=1)]
        scale = np.abs(row).max() + 1e-30
        np.testing.assert_allclose(rounded, nearest, rtol=0, atol=2e-6 * scale)
        assert len(np.unique(rounded)) <= 2**bits


def test_the_gradient_passes_the_rounding():
    weight = np.random.default_rng(4).normal(size=SHAPE).astype(np.float32)
    np.testing.assert_array_equal(gradient(Release(bits=4), latents(), weight), weight)


def test_what_is_dropped_has_no_part_in_the_rounding():
    x = np.float32([[5, 6, 7.1, -0.5, 0.25, 0.1]])
    kept = np.abs(x) > 1
    got = np.asarray(jax.jit(quantize, static_argnums=1)(x, 4, kept))
    step = 2.1 / 15
    expected = [5, 5 + round(1 / step) * step, 7.1, -0.5, 0.25, 0.1]
    np.testing.assert_allclose(got[0], expected, rtol=1e-6)
    pruned = released(Release(dropped=0.5, bits=4), x.reshape(1, 2, 3, 1))
    np.testing.assert_allclose(pruned.reshape(-1), [*expected[:3], 0, 0, 0], rtol=1e-6)


# ------------------------------------------------------------------------------------ all together


def test_the_stages_follow_one_another():
    x, key = latents(), jax.random.key(2)
    prune_key, noise_key = jax.random.split(key)
    y = rows(released(Release(clip_norm=1.5), x))
    mask = np.asarray(jax.random.uniform(prune_key, y.shape))
    kept = mask >= np.sort(mask, axis=1)[:, [SIZE - 18]]
    y = np.where(kept, y / 0.75, 0)
    y = np.where(kept, y + 0.2 * np.asarray(jax.random.normal(noise_key, y.shape)), 0)
    y = np.asarray(jax.jit(quantize, static_argnums=1)(np.float32(y), 8, kept))
    release = Release(clip_norm=1.5, dropped=0.25, pruning="random", noise_std=0.2, bits=8)
    got = rows(np.asarray(apply(release, x, key)))
    np.testing.assert_allclose(got, y, rtol=0, atol=1e-5)


def test_evaluation_leaves_out_what_is_random():
    every = Release(clip_norm=1.0, dropped=0.5, noise_std=1.0, bits=8)
    assert every.is_random
    assert every.deterministic() == Release(clip_norm=1.0, dropped=0.5, bits=8)
    random = Release(dropped=0.5, pruning="random", bits=4)
    assert random.is_random
    rest = random.deterministic()
    assert rest is not None and (rest.dropped, rest.bits, rest.is_random) == (0, 4, False)
    assert Release(clip_norm=1.0, dropped=0.5, bits=8).is_random is False
    assert Release(dropped=0.5, pruning="random").deterministic() is None
    x = latents()
    np.testing.assert_array_equal(apply(rest, x, None), released(Release(bits=4), x))


def test_bfloat16_stays_bfloat16():
    x = jnp.asarray(latents(), jnp.bfloat16)
    release = Release(clip_norm=1.0, dropped=0.5, noise_std=0.1, bits=8)
    got = apply(release, x, jax.random.key(0))
    assert got.dtype == jnp.bfloat16


# -------------------------------------------------------------------------------------- on the wire

RANDOM = {"dropped": 0.7, "pruning": "random"}


@pytest.mark.parametrize(
    ("release", "bytes_an_image"),
    [
        (Release(clip_norm=1.0), 4 * 24),
        (Release(dropped=0.7), 4 * 7 + 3),  # 24 bits say which
        (Release(dropped=0.7, noise_std=1.0), 4 * 24),  # noise is on all of them
        (Release(**RANDOM), 4 * 7),
        (Release(**RANDOM, noise_std=1.0), 4 * 7),
        (Release(bits=16), 2 * 24 + 8),
        (Release(bits=4), 12 + 8),
        (Release(dropped=0.7, bits=4), 4 + 3 + 8),  # 28 bits are four bytes
        (Release(**RANDOM, bits=8), 7 + 8),
        (Release(dropped=0.7, noise_std=1.0, bits=8), 24 + 8),
    ],
)
def test_bytes_on_the_wire(release, bytes_an_image):
    sent = release.on_wire(jax.ShapeDtypeStruct(SHAPE, jnp.float32))
    leaves = jax.tree.leaves(sent)
    assert sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves) == 5 * bytes_an_image
    # As many values are not 0 as are counted.
    x = np.random.default_rng(0).uniform(1, 2, SHAPE).astype(np.float32)
    nonzero = int((released(release, x) != 0).sum())
    if release.bits == 32:
        assert math.prod(sent.values.shape) == nonzero
