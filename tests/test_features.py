"""Encoding whole data sets, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.errors import InputError
from mocosfl_jax.evaluation import features
from mocosfl_jax.evaluation.features import check_labelled, encode

MEAN, STD = (0.1, 0.4, 0.7), (0.2, 0.3, 0.5)


def images(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, 4, 5, 3), dtype=np.uint8)


def weight() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(60, 2)), jnp.float32)


def apply_fn(weight: jax.Array, images_BHWC: jax.Array) -> dict[str, jax.Array]:
    flat_BP = images_BHWC.reshape(images_BHWC.shape[0], -1)
    return {"row": images_BHWC[:, 1, 2], "product": flat_BP @ weight}


@pytest.mark.parametrize("n, batch_size", [(7, 3), (6, 3), (2, 5), (1, 1)])
def test_encode_equals_numpy_and_does_not_show_the_padding(n, batch_size):
    out = encode(apply_fn, weight(), images(n), MEAN, STD, batch_size)
    normalised = (images(n) / 255.0 - np.array(MEAN)) / np.array(STD)
    assert isinstance(out["row"], np.ndarray) and out["row"].dtype == np.float32
    np.testing.assert_allclose(out["row"], normalised[:, 1, 2], rtol=1e-5, atol=1e-6)
    product = normalised.reshape(n, -1) @ np.asarray(weight())
    np.testing.assert_allclose(out["product"], product, rtol=1e-4, atol=1e-4)


def test_encode_traces_once_for_all_sizes_calls_and_params():
    traced = []

    def counted(params, images_BHWC):
        traced.append((images_BHWC.shape, images_BHWC.dtype))
        return apply_fn(params, images_BHWC)

    for n, scale in ((7, 1.0), (4, 2.0), (2, 3.0)):
        encode(counted, weight() * scale, images(n), MEAN, STD, batch_size=4)
    assert traced == [((4, 4, 5, 3), jnp.float32)]


@pytest.mark.parametrize(
    "n, batch_size, rows",
    [(1, 10**6, 1), (5, 10**6, 8), (5, 6, 6), (129, 10**6, 256), (301, 10**6, 301), (301, 7, 7)],
)
def test_encode_pads_to_no_more_rows_than_images_need(n, batch_size, rows):
    traced = []

    def counted(params, images_BHWC):
        traced.append(len(images_BHWC))
        return apply_fn(params, images_BHWC)

    assert len(encode(counted, weight(), images(n), MEAN, STD, batch_size)["row"]) == n
    assert traced == [rows]


def test_encode_asks_before_each_batch_and_launches_nothing_after_a_stop(monkeypatch):
    events = []
    launch = features._encode_batch

    def logged(*args):
        events.append("launch")
        return launch(*args)

    def ask():
        events.append("ask")
        if len(events) > 4:
            raise InterruptedError

    monkeypatch.setattr(features, "_encode_batch", logged)
    with pytest.raises(InterruptedError):
        encode(apply_fn, weight(), images(11), MEAN, STD, 3, before_batch=ask)
    assert events == ["ask", "launch", "ask", "launch", "ask"]


def test_encode_uses_the_params_of_the_call():
    once = encode(apply_fn, weight(), images(3), MEAN, STD, 2)["product"]
    twice = encode(apply_fn, 2.0 * weight(), images(3), MEAN, STD, 2)["product"]
    np.testing.assert_allclose(twice, 2.0 * once, rtol=1e-5)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"images_nHWC": images(3).astype(np.float32)}, "images.dtype"),
        ({"images_nHWC": images(3)[0]}, "images.shape"),
        ({"images_nHWC": images(0)}, "images.shape"),
        ({"mean": (0.5, 0.5)}, "mean"),
        ({"std": (0.5, 0.5)}, "std"),
        ({"std": (0.5, 0.0, 0.5)}, "std"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_encode_names_what_is_wrong(change, named):
    arguments = {"images_nHWC": images(3), "mean": MEAN, "std": STD, "batch_size": 2} | change
    with pytest.raises(InputError, match=f"^{named} = "):
        encode(apply_fn, weight(), **arguments)


@pytest.mark.parametrize(
    "features, labels, named",
    [
        (np.zeros((3,)), np.arange(3), "bank_features.shape"),
        (np.zeros((0, 2)), np.arange(0), "bank_features.shape"),
        (np.array([[0.0, 1.0], [0.0, np.nan]]), np.arange(2), "bank_features = '1 rows"),
        (np.zeros((3, 2)), np.arange(2), "bank_labels.shape"),
        (np.zeros((3, 2)), np.arange(3.0), "bank_labels.dtype"),
        (np.zeros((3, 2)), np.array([0, -1, 2]), "bank_labels range"),
        (np.zeros((3, 2)), np.array([0, 3, 2]), "bank_labels range"),
    ],
)
def test_check_labelled_names_what_is_wrong(features, labels, named):
    with pytest.raises(InputError, match=f"^{named}"):
        check_labelled("bank", features, labels, num_classes=3)
