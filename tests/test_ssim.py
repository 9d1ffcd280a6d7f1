import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import structural_similarity

from mocosfl_jax.learning.ssim import ssim

BORDER = 10


def pair(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Two batches of images that resemble each other, float64 in [0, 1]."""
    rng = np.random.default_rng(height)
    a = rng.uniform(size=(2, height, width, 3)) ** 2
    return a, np.clip(a + 0.2 * rng.normal(size=a.shape), 0, 1)


def oracle(a_BHWC: np.ndarray, b_BHWC: np.ndarray) -> np.ndarray:
    """scikit-image's, which mirrors images at their border: here they have a border of zeros."""
    frame = [(0, 0), (BORDER, BORDER), (BORDER, BORDER), (0, 0)]

    def one(a: np.ndarray, b: np.ndarray) -> float:
        options = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
        _, full = structural_similarity(a, b, data_range=1.0, channel_axis=-1, full=True, **options)
        return full[BORDER:-BORDER, BORDER:-BORDER].mean()

    return np.array(
        [one(a, b) for a, b in zip(*(np.pad(x, frame) for x in (a_BHWC, b_BHWC)), strict=True)]
    )


@pytest.mark.parametrize("size", [(17, 13), (8, 8), (5, 24)], ids=str)
def test_it_is_that_of_scikit_image(size):
    a, b = pair(*size)
    found = ssim(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    np.testing.assert_allclose(found, oracle(a, b), rtol=0, atol=2e-6)


def test_the_window_is_computed_in_full_float32():
    """An accelerator's default would round pixels to 10 bits, and variances are differences."""
    image = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    products = [x for x in jax.jit(ssim).lower(image, image).as_text().splitlines() if "dot_g" in x]
    assert len(products) == 2 and all("HIGHEST" in line for line in products)


def test_an_image_is_like_itself_only():
    a, b = (jnp.asarray(x, jnp.float32) for x in pair(9, 12))
    np.testing.assert_allclose(ssim(a, a), 1, atol=1e-6)
    assert (ssim(a, b) < 0.95).all()


def test_its_gradient_is_the_slope():
    a, b = pair(11, 14)
    direction = np.random.default_rng(1).normal(size=a.shape)
    step = 1e-5
    slope = (oracle(a + step * direction, b) - oracle(a - step * direction, b)).sum() / (2 * step)
    grad = jax.grad(lambda x: ssim(x, jnp.asarray(b, jnp.float32)).sum())(
        jnp.asarray(a, jnp.float32)
    )
    assert np.sum(grad * direction) == pytest.approx(slope, rel=1e-3)
