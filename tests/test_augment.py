"""The augmentation against plain-loop, colorsys and Pillow oracles, and its random numbers."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mocosfl_jax.data import augment as aug
from mocosfl_jax.errors import InputError
from tests.slow_augment import apply_oracle, box_oracle

SIZE = 8
CONFIG = aug.AugmentConfig(size=SIZE, blur_kernel_size=5)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
DRAWS = 20_000
ORDERS = list(itertools.permutations(range(4)))
FACTORS = {"brightness": 1.35, "contrast": 1.3, "saturation": 0.65, "hue": 0.09}

apply_jit = jax.jit(aug.apply, static_argnames="config")
two_views_jit = jax.jit(aug.two_views, static_argnames="config")


def image_of(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A random uint8 image whose top rows are bright and saturated enough for blends to clip."""
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image[0, 0], image[0, 1], image[1, 0] = (255, 0, 0), (90, 90, 90), (0, 0, 0)
    return image


def plain_params(**changes: object) -> aug.AugmentParams:
    """Numbers that change nothing but the size of a 9 x 13 image, and the given changes."""
    values = {"crop_y": 0, "crop_x": 0, "crop_h": 9, "crop_w": 13, "order": [0, 1, 2, 3]}
    values |= {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0, "sigma": 1.0}
    values |= dict.fromkeys(("jitter", "grey", "blur", "flip"), False) | changes
    typed = {bool: np.bool_, int: np.int32, float: np.float32, list: np.int32}
    return aug.AugmentParams(
        **{name: jnp.asarray(value, typed[type(value)]) for name, value in values.items()}
    )


def check_apply(
    params: aug.AugmentParams, image: np.ndarray | None = None, config: aug.AugmentConfig = CONFIG
) -> np.ndarray:
    image = image_of(9, 13) if image is None else image
    view = apply_jit(jnp.asarray(image), params, config=config)
    assert view.dtype == jnp.float32 and view.shape == (config.size, config.size, 3)
    np.testing.assert_allclose(view, apply_oracle(image, params, config), atol=1e-5)
    return np.asarray(view)


# --- applying fixed numbers ------------------------------------------------------------------

BOXES = [
    # y, x, h, w: shrinking, enlarging, mixed, at the far corner, one pixel, unscaled, whole
    (3, 5, 30, 21),
    (2, 7, 5, 3),
    (0, 1, 29, 4),
    (28, 30, 12, 7),
    (17, 4, 1, 1),
    (6, 9, SIZE, SIZE),
    (0, 0, 40, 37),
]


@pytest.mark.parametrize("box", BOXES)
def test_resized_crop_is_the_triangle_filter_inside_the_box(box: tuple[int, ...]) -> None:
    image = image_of(40, 37)
    y, x, h, w = box
    params = plain_params(crop_y=y, crop_x=x, crop_h=h, crop_w=w)
    view = check_apply(params, image)
    for channel in range(3):
        cropped = image[y : y + h, x : x + w, channel].astype(np.float32)
        resized = Image.fromarray(cropped).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(view[..., channel], np.asarray(resized) / 255, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"brightness": 0.6},
        {"brightness": 1.4},
        {"contrast": 0.6},
        {"contrast": 1.4},
        {"saturation": 0.6},
        {"saturation": 1.4},
        {"hue": 0.1},
        {"hue": -0.1},
        {"hue": 0.5},
    ],
    ids=str,
)
def test_each_jitter_part_alone(changes: dict[str, float]) -> None:
    view = check_apply(plain_params(jitter=True, **changes))
    assert np.abs(view - check_apply(plain_params())).max() > 0.05


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_jitter_in_every_order(order: Sequence[int]) -> None:
    check_apply(plain_params(jitter=True, order=list(order), **FACTORS))


def test_order_matters() -> None:
    views = [
        check_apply(plain_params(jitter=True, order=list(order), **FACTORS)).tobytes()
        for order in ORDERS
    ]
    assert len(set(views)) == len(views)


def test_jitter_flag_off_ignores_the_factors() -> None:
    view = check_apply(plain_params(brightness=0.6, contrast=0.7, saturation=0.8, hue=0.1))
    np.testing.assert_array_equal(view, check_apply(plain_params()))


def test_grey() -> None:
    view = check_apply(plain_params(grey=True))
    np.testing.assert_array_equal(view[..., 0], view[..., 1])
    np.testing.assert_array_equal(view[..., 0], view[..., 2])


@pytest.mark.parametrize("kernel_size", [5, 2 * SIZE - 1])
@pytest.mark.parametrize("sigma", [0.1, 0.8, 2.0])
def test_blur(sigma: float, kernel_size: int) -> None:
    config = aug.AugmentConfig(size=SIZE, blur_kernel_size=kernel_size)
    check_apply(plain_params(blur=True, sigma=sigma), config=config)


def test_flip_mirrors_columns() -> None:
    view = check_apply(plain_params(flip=True, crop_x=2, crop_w=9))
    np.testing.assert_allclose(
        view, check_apply(plain_params(crop_x=2, crop_w=9))[:, ::-1], atol=1e-6
    )


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0], [1, 0, 3, 2]], ids=str)
@pytest.mark.parametrize("grey", [False, True])
def test_everything_together(order: Sequence[int], grey: bool) -> None:
    box = {"crop_y": 1, "crop_x": 3, "crop_h": 6, "crop_w": 9}
    factors = {"brightness": 0.7, "contrast": 1.4, "saturation": 1.3, "hue": -0.07, "sigma": 1.2}
    flags = {"jitter": True, "grey": grey, "blur": True, "flip": True}
    check_apply(plain_params(order=order, **box, **factors, **flags))


def test_drawn_numbers_give_the_oracles_views() -> None:
    params = drawn(9, 13, CONFIG)
    for i in range(12):
        check_apply(aug.AugmentParams(*(jnp.asarray(field[i]) for field in params)))


def test_normalise() -> None:
    image = np.random.default_rng(1).random((4, 5, 3), np.float32)
    expected = np.stack([(image[..., c] - MEAN[c]) / STD[c] for c in range(3)], axis=-1)
    np.testing.assert_allclose(aug.normalise(jnp.asarray(image), MEAN, STD), expected, atol=1e-6)


# --- drawing ---------------------------------------------------------------------------------


@functools.lru_cache
def drawn(height: int, width: int, config: aug.AugmentConfig, seed: int = 0) -> Any:
    keys = jax.random.split(jax.random.key(seed), DRAWS)
    draw = jax.jit(jax.vmap(lambda key: aug.draw_params(key, height, width, config)))
    return jax.tree.map(np.asarray, draw(keys))


def largest_cdf_gap(sample: np.ndarray, other: np.ndarray) -> float:
    """The two-sample Kolmogorov-Smirnov distance."""
    values = np.union1d(sample, other)
    cdfs = [np.searchsorted(np.sort(s), values, side="right") / len(s) for s in (sample, other)]
    return np.abs(cdfs[0] - cdfs[1]).max()


# Of two samples of 20 000, the distance exceeds 0.0195 once in a thousand.
KS_LIMIT = 0.0195


def check_uniform(sample: np.ndarray, low: np.float32, high: np.float32) -> None:
    assert low <= sample.min() and sample.max() <= high
    assert largest_cdf_gap(sample, np.linspace(low, high, DRAWS)) < KS_LIMIT


def test_probabilities() -> None:
    params = drawn(32, 32, aug.AugmentConfig.for_version("v2", 32))
    for name, expected in {"jitter": 0.8, "grey": 0.2, "blur": 0.5, "flip": 0.5}.items():
        assert abs(getattr(params, name).mean() - expected) < 0.015


@pytest.mark.parametrize("probabilities", [(0.1, 0.3, 0.6, 0.85), (0.0, 1.0, 0.0, 1.0)])
def test_each_probability_sets_its_own_flag(probabilities: tuple[float, ...]) -> None:
    expected = dict(zip(("jitter", "grey", "blur", "flip"), probabilities, strict=True))
    fields: Any = {f"{name}_prob": p for name, p in expected.items()}
    config = aug.AugmentConfig(size=32, **fields)
    for name, probability in expected.items():
        assert abs(getattr(drawn(32, 32, config), name).mean() - probability) < 0.015


def test_ranges() -> None:
    config = aug.AugmentConfig(size=32, jitter=(0.4, 0.2, 1.3, 0.1), blur_sigma=(0.1, 2.0))
    params = drawn(32, 32, config)
    check_uniform(params.brightness, np.float32(0.6), np.float32(1.4))
    check_uniform(params.contrast, np.float32(0.8), np.float32(1.2))
    check_uniform(params.saturation, np.float32(0.0), np.float32(2.3))
    check_uniform(params.hue, np.float32(-0.1), np.float32(0.1))
    check_uniform(params.sigma, np.float32(0.1), np.float32(2.0))


def test_orders_are_equally_likely_permutations() -> None:
    orders = drawn(32, 32, CONFIG).order
    counts = [np.all(orders == p, axis=1).sum() for p in ORDERS]
    assert sum(counts) == DRAWS
    expected = DRAWS / 24
    chi_square = sum((count - expected) ** 2 / expected for count in counts)
    assert chi_square < 49.7  # 23 degrees of freedom, once in a thousand


def test_draws_are_independent_of_each_other() -> None:
    p = drawn(32, 32, CONFIG)
    first = (p.order == aug.HUE).argmax(axis=1)
    y_part = (p.crop_y + 0.5) / (32 - p.crop_h + 1)
    x_part = (p.crop_x + 0.5) / (32 - p.crop_w + 1)
    box = (p.crop_h * p.crop_w, p.crop_w / p.crop_h, y_part, x_part)
    columns = (*box, first, *p[p._fields.index("brightness") :], p.jitter)
    correlation = np.corrcoef(np.stack(columns).astype(np.float64)) - np.eye(len(columns))
    # Large boxes of an extreme ratio do not fit: area and ratio are independent only about 1.
    assert np.abs(correlation).max() < 0.04


@pytest.mark.parametrize(
    ("height", "width", "min_scale"),
    [(32, 32, 0.08), (20, 48, 0.3), (51, 24, 0.08), (224, 256, 0.2)],
)
def test_boxes_are_distributed_as_torchvisions(height: int, width: int, min_scale: float) -> None:
    params = drawn(height, width, aug.AugmentConfig(size=32, min_scale=min_scale))
    y, x, h, w = params.crop_y, params.crop_x, params.crop_h, params.crop_w
    assert min(y.min(), x.min()) >= 0 and min(h.min(), w.min()) >= 1
    assert (y + h).max() <= height and (x + w).max() <= width
    rng = np.random.default_rng(7)
    boxes = np.array([box_oracle(rng, height, width, min_scale) for _ in range(DRAWS)])
    oy, ox, oh, ow = boxes.T
    pairs = [(y, oy), (x, ox), (h, oh), (w, ow), (h * w, oh * ow), (w / h, ow / oh)]
    pairs += [(y + h, oy + oh), (x + w, ox + ow)]
    assert max(largest_cdf_gap(sample, other) for sample, other in pairs) < KS_LIMIT


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(10, 60, (0, 23, 10, 13)), (61, 10, (24, 0, 13, 10))],
)
def test_central_box_when_no_attempt_fits(height: int, width: int, box: tuple[int, ...]) -> None:
    params = drawn(height, width, aug.AugmentConfig(size=8, min_scale=1.0, blur_kernel_size=3))
    boxes = np.stack([params.crop_y, params.crop_x, params.crop_h, params.crop_w], axis=1)
    assert {tuple(row) for row in boxes.tolist()} == {box}


def test_whole_image_when_no_attempt_fits_an_allowed_ratio() -> None:
    params = drawn(4000, 5000, aug.AugmentConfig(size=8, min_scale=1.0, blur_kernel_size=3))
    assert np.mean((params.crop_h == 4000) & (params.crop_w == 5000)) > 0.95


# --- whole views -----------------------------------------------------------------------------


def batch() -> tuple[jax.Array, jax.Array]:
    images_BHWC = jnp.asarray(np.stack([image_of(11, 14, seed) for seed in range(3)]))
    return jax.random.split(jax.random.key(5), 3), images_BHWC


def test_batched_jitted_views_are_single_eager_views() -> None:
    keys_B, images_BHWC = batch()
    views = two_views_jit(keys_B, images_BHWC, config=CONFIG, mean=MEAN, std=STD)
    for view_index, views_BHWC in enumerate(views):
        assert views_BHWC.shape == (3, SIZE, SIZE, 3) and views_BHWC.dtype == jnp.float32
        for i in range(3):
            key = jax.random.split(keys_B[i])[view_index]
            single = aug.augment(key, images_BHWC[i], CONFIG, MEAN, STD)
            np.testing.assert_allclose(views_BHWC[i], single, atol=1e-5)


def test_views_are_functions_of_their_key() -> None:
    keys_B, images_BHWC = batch()
    views = functools.partial(two_views_jit, config=CONFIG, mean=MEAN, std=STD)
    first = views(keys_B, images_BHWC)
    np.testing.assert_array_equal(first, views(keys_B, images_BHWC))
    changed_keys_B = keys_B.at[1].set(jax.random.key(99))
    for before, after in zip(first, views(changed_keys_B, images_BHWC), strict=True):
        np.testing.assert_array_equal(before[::2], after[::2])
        assert np.abs(before[1] - after[1]).max() > 0.1


def test_the_two_views_differ() -> None:
    keys_B, images_BHWC = batch()
    query_BHWC, key_BHWC = two_views_jit(keys_B, images_BHWC, config=CONFIG, mean=MEAN, std=STD)
    assert np.abs(query_BHWC - key_BHWC).max(axis=(1, 2, 3)).min() > 0.1


def test_views_stay_in_range_before_normalising() -> None:
    _, images_BHWC = batch()
    for seed in range(20):
        keys_B = jax.random.split(jax.random.key(seed), 3)
        unit = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
        for views_BHWC in two_views_jit(keys_B, images_BHWC, config=CONFIG, **unit):
            assert views_BHWC.min() >= -1e-6 and views_BHWC.max() <= 1 + 1e-6


def test_v1_never_blurs_and_draws_all_else_as_v2() -> None:
    v1, v2 = (aug.AugmentConfig.for_version(version, 32) for version in ("v1", "v2"))
    params_v1, params_v2 = drawn(32, 32, v1), drawn(32, 32, v2)
    assert not params_v1.blur.any() and params_v2.blur.any()
    for ours, theirs in zip(params_v1._replace(blur=params_v2.blur), params_v2, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_no_blur_without_a_probability_of_it() -> None:
    config = dataclasses.replace(CONFIG, blur_prob=0.0)
    view = check_apply(plain_params(blur=True, sigma=2.0), config=config)
    np.testing.assert_allclose(view, check_apply(plain_params()), atol=1e-6)


@pytest.mark.parametrize("size", [1, 4, 32, 224])
def test_versions_fit_every_size(size: int) -> None:
    config = aug.AugmentConfig.for_version("v2", size)
    assert config.blur_kernel_size == min(13, 2 * size - 1)


def test_no_convolution_and_no_sort() -> None:
    """XLA on CPU runs both slowly inside a scan."""
    keys_B, images_BHWC = batch()
    traced = jax.make_jaxpr(lambda k, i: aug.two_views(k, i, CONFIG, MEAN, STD))
    program = str(traced(keys_B, images_BHWC))
    assert "conv_general" not in program and "sort[" not in program


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", 0),
        ("min_scale", 0.0),
        ("min_scale", 1.1),
        ("jitter", (0.4, -0.1, 0.4, 0.1)),
        ("jitter", (0.4, 0.4, 0.4, 0.6)),
        ("jitter", (0.4, 0.4, 0.4)),
        ("jitter_prob", 1.1),
        ("grey_prob", -0.1),
        ("blur_prob", 2.0),
        ("flip_prob", -1.0),
        ("blur_sigma", (0.0, 2.0)),
        ("blur_sigma", (2.0, 1.0)),
        ("blur_sigma", (1.0,)),
        ("blur_kernel_size", 4),
        ("blur_kernel_size", 17),
    ],
)
def test_bad_settings_are_named(field: str, value: object) -> None:
    fields: Any = {"size": SIZE, "blur_kernel_size": 5} | {field: value}
    with pytest.raises(InputError, match=rf"augment\.{field} = "):
        aug.AugmentConfig(**fields)


def test_unknown_version_is_named() -> None:
    with pytest.raises(InputError, match=r"augment\.version = 'v3'"):
        aug.AugmentConfig.for_version("v3", 32)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((9, 9, 3), np.float32), ((9, 9), np.uint8), ((9, 9, 1), np.uint8)]
)
def test_other_images_are_refused(shape: tuple[int, ...], dtype: Any) -> None:
    image = np.zeros(shape, dtype)
    with pytest.raises(InputError, match=r"augment\.image_HWC"):
        aug.augment(jax.random.key(0), jnp.asarray(image), CONFIG, MEAN, STD)
