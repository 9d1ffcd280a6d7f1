"""The entry to all sources, the synthetic images, and the statistics of pixels."""

import hashlib

import numpy as np
import pytest

from mocosfl_jax.data import synthetic
from mocosfl_jax.data.dataset import DatasetInfo
from mocosfl_jax.data.sources import (
    channel_stats,
    check_memory,
    inspect_dataset,
    load_dataset,
)
from mocosfl_jax.errors import InputError
from tests.data_files import (
    OPTIONS,
    inspect,
    load,
    prepare,
    random_images,
    write_npz,
)

# -------------------------------------------------------------------------------- the dispatch


@pytest.mark.parametrize(
    ("dataset", "options", "field", "words"),
    [
        ("cifar11", {}, "dataset", ["folder:PATH", "close names: cifar10"]),
        ("cifar-10", {}, "dataset", ["close names: cifar10"]),
        ("", {}, "dataset", []),
        ("folder:", {"image_size": 8}, "dataset", ["PATH"]),
        ("folder:/nowhere", {"image_size": 8}, "dataset", ["existing folder"]),
        ("folder:/nowhere", {}, "image_size", ["side of the stored squares"]),
        ("synthetic", {"image_size": 0}, "image_size", []),
        ("synthetic", {"holdout_fraction": 1.0}, "holdout_fraction", []),
        ("synthetic", {"train_split": "train[:9]"}, "train_split", ["TFDS"]),
        ("npz:x", {"test_split": "test"}, "test_split", ["TFDS"]),
    ],
)
def test_bad_fields_are_named(dataset, options, field, words):
    with pytest.raises(InputError, match=rf"^config\.{field} = ") as error:
        inspect(dataset, **options)
    for word in words:
        assert word in str(error.value)


def test_wrappers_of_prepare_dataset(tmp_path):
    dataset = write_npz(tmp_path / "a.npz", x_train=random_images(5, 4, 4, 3))
    whole, info = load(dataset), inspect_dataset(dataset, **OPTIONS)
    assert info == whole.info
    again = load_dataset(dataset, **OPTIONS)
    np.testing.assert_array_equal(again.train.images, whole.train.images)


def test_images_beyond_memory_are_refused_before_they_are_read(monkeypatch):
    """12,000 images of 16 x 16 x 3 bytes are 9,216,000."""
    prepared = prepare("synthetic", image_size=16)
    monkeypatch.setattr("mocosfl_jax.data.sources.machine_memory_bytes", lambda: 9_215_999)
    for refused in (prepared.load, lambda: check_memory(prepared.info)):
        with pytest.raises(InputError, match=r"^config\.image_size = 16: 12000 images take"):
            refused()
    check_memory(DatasetInfo("smaller", 9_999, 2_000, 16, None))


@pytest.mark.parametrize("end", ["\n", "\r", "\v", "\x85", "\u2028", "\x1b", "\udcff", "\ud800"])
def test_a_message_is_one_printable_line(end):
    """Only what is not printable is escaped, wherever it stands."""
    message = str(InputError(f"dätä/{end}\\x", f"größe{end}", f"größer {end} als 1"))
    escape = end.encode("unicode_escape").decode()
    assert message == f"dätä/{escape}\\x = 'größe{escape}': größer {escape} als 1"
    assert message.isprintable()
    message.encode()


# ----------------------------------------------------------------------------------- synthetic


@pytest.fixture(scope="module")
def drawn():
    return load("synthetic")


def test_synthetic_images_are_fixed(drawn):
    digest = hashlib.sha256(drawn.train.images.tobytes()).hexdigest()
    assert digest == "400842f9f3df7054aec8589315ef9af18a1a74d5fa264079fa5c391d2483b5f0"


def test_synthetic_splits(drawn):
    assert drawn.class_names == synthetic.CLASS_NAMES
    assert len(drawn.train.images) == 10_000
    assert np.bincount(drawn.train.labels).tolist() == [1000] * 10
    assert np.bincount(drawn.test.labels).tolist() == [200] * 10
    assert not (drawn.train.images[:2000] == drawn.test.images).all(axis=(1, 2, 3)).any()


def test_synthetic_class_is_not_in_the_pixels(drawn):
    """Neighbours by raw pixels, or by mean and deviation of each channel, do not tell the class."""
    bank = drawn.train.images[:3000].astype(np.float32)
    query = drawn.test.images[:300].astype(np.float32)

    def statistics(images):
        return np.hstack([images.mean(axis=(1, 2)), images.std(axis=(1, 2))])

    assert 10 < knn_accuracy(bank.reshape(3000, -1), query.reshape(300, -1), drawn) < 50
    assert knn_accuracy(statistics(bank), statistics(query), drawn) < 30


def knn_accuracy(bank, query, dataset, k=60):
    """Plain weighted kNN on cosines of standardised features, percent."""
    mean, std = bank.mean(axis=0), bank.std(axis=0)
    bank, query = (bank - mean) / std, (query - mean) / std
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    query /= np.linalg.norm(query, axis=1, keepdims=True)
    cosine = query @ bank.T
    near = np.argsort(-cosine, axis=1)[:, :k]
    weight = np.exp(np.take_along_axis(cosine, near, axis=1) / 0.1)
    votes = [(weight * (dataset.train.labels[near] == c)).sum(axis=1) for c in range(10)]
    return 100 * np.mean(np.argmax(votes, axis=0) == dataset.test.labels[: len(query)])


def test_synthetic_scenes_do_not_depend_on_the_size(drawn, monkeypatch):
    monkeypatch.setattr(synthetic, "NUM_TEST", 40)
    images, labels = synthetic.synthetic_split("test", 64)
    small, _ = synthetic.synthetic_split("test", 32)
    assert images.shape == (40, 64, 64, 3)
    assert labels.tolist() == list(range(10)) * 4
    halved = images.reshape(40, 32, 2, 32, 2, 3).mean(axis=(2, 4))
    difference = np.abs(halved - small).mean(axis=(1, 2, 3))
    others = np.abs(halved - np.roll(small, 10, axis=0)).mean(axis=(1, 2, 3))
    assert difference.max() < 25 < others.min()


# -------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("shape", [(3, 5, 5, 3), (300, 70, 70, 3)])
def test_channel_stats(shape):
    """The larger stack takes more than one chunk."""
    images = random_images(*shape)
    images[..., 1] //= 3
    images[..., 2] = images[..., 2] // 2 + 100
    mean, std = channel_stats(images)
    pixels = images.astype(np.float64) / 255
    # NumPy's own sums of millions of squares are off by a few 1e-12.
    np.testing.assert_allclose(mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-10)
    np.testing.assert_allclose(std, pixels.std(axis=(0, 1, 2)), rtol=1e-10)
