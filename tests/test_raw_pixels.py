"""kNN on raw pixels, against Pillow and a NumPy search of the whole bank."""

import numpy as np
import pytest
from PIL import Image

from mocosfl_jax.errors import InputError
from mocosfl_jax.evaluation import raw_pixels
from mocosfl_jax.evaluation.raw_pixels import raw_pixel_features, raw_pixel_top1

MEAN, STD = (0.1, 0.4, 0.7), (0.2, 0.3, 0.5)
CLASSES = 4


def images(n: int, height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(height)
    return rng.integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def normalised(images: np.ndarray) -> np.ndarray:
    return (images / 255.0 - np.array(MEAN)) / np.array(STD)


def reduced(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """By Pillow, whose linear filter is as wide as the reduction asks; a channel at a time."""
    channels = [Image.fromarray(channel.astype(np.float32)) for channel in np.moveaxis(image, 2, 0)]
    smaller = [channel.resize((width, height), Image.Resampling.BILINEAR) for channel in channels]
    return np.stack([np.asarray(channel) for channel in smaller], axis=2)


@pytest.mark.parametrize("height, width", [(5, 4), (32, 32)])
def test_small_images_are_taken_as_they_are(height, width):
    found = raw_pixel_features(images(3, height, width), MEAN, STD, batch_size=2)
    assert found.dtype == np.float32 and found.shape == (3, height * width * 3)
    expected = normalised(images(3, height, width)).reshape(3, -1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("height, width", [(64, 64), (48, 40), (75, 20)])
def test_larger_ones_are_reduced_without_aliasing(height, width):
    found = raw_pixel_features(images(3, height, width), MEAN, STD, batch_size=2)
    sides = min(height, 32), min(width, 32)
    expected = [reduced(image, *sides) for image in normalised(images(3, height, width))]
    np.testing.assert_allclose(found, np.reshape(expected, (3, -1)), rtol=1e-4, atol=1e-4)


def labelled(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy images around one centre a class, and labels of unequal counts."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(CLASSES, n, p=[0.4, 0.3, 0.2, 0.1])
    centres = np.random.default_rng(0).normal(128, 12, (CLASSES, 4, 5, 3))
    noisy = centres[labels] + rng.normal(0, 40, (n, 4, 5, 3))
    return noisy.clip(0, 255).astype(np.uint8), labels


def search(queries, labels, bank, bank_labels, k: int, temperature: float) -> float:
    """Top-1 in percent from all similarities at once."""

    def unit(images: np.ndarray) -> np.ndarray:
        rows = normalised(images).reshape(len(images), -1)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    similarity = unit(queries) @ unit(bank).T
    scores = np.zeros((len(queries), CLASSES))
    for row, nearest in enumerate(np.argsort(-similarity, axis=1)[:, :k]):
        np.add.at(scores[row], bank_labels[nearest], np.exp(similarity[row, nearest] / temperature))
    return 100 * np.mean(scores.argmax(axis=1) == labels)


@pytest.mark.parametrize(
    "k, temperature, block", [(1, 0.1, 20), (9, 0.5, 7), (9, 0.5, 1000), (200, 0.1, 20)]
)
def test_blocks_find_what_a_search_of_the_whole_bank_finds(k, temperature, block, monkeypatch):
    monkeypatch.setattr(raw_pixels, "BLOCK", block)
    data = (*labelled(33, 1), *labelled(62, 2))
    expected = search(*data, k, temperature)
    assert 30 < expected < 90
    found = raw_pixel_top1(*data, CLASSES, mean=MEAN, std=STD, k=k, temperature=temperature)
    assert found == pytest.approx(expected)


def test_no_more_than_a_block_of_features_exists(monkeypatch):
    encoded = []

    def counted(images, *arguments, **named):
        encoded.append(len(images))
        return raw_pixel_features(images, *arguments, **named)

    monkeypatch.setattr(raw_pixels, "BLOCK", 7)
    monkeypatch.setattr(raw_pixels, "raw_pixel_features", counted)
    raw_pixel_top1(*labelled(10, 1), *labelled(16, 2), CLASSES, mean=MEAN, std=STD)
    assert encoded == [7, 7, 7, 2, 3, 7, 7, 2]


def test_it_can_be_stopped_between_batches():
    calls = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise InterruptedError

    data = (*labelled(10, 1), *labelled(16, 2))
    with pytest.raises(InterruptedError):
        raw_pixel_top1(*data, CLASSES, mean=MEAN, std=STD, batch_size=4, before_batch=stop)
    assert len(calls) == 3


@pytest.mark.parametrize("change, named", [({"k": 0}, "k"), ({"temperature": 0.0}, "temperature")])
def test_bad_input_is_named(change, named):
    data = (*labelled(3, 1), *labelled(5, 2))
    with pytest.raises(InputError, match=rf"^{named} = "):
        raw_pixel_top1(*data, CLASSES, mean=MEAN, std=STD, **change)
