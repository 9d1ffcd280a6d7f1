"""Small data sets of every source, as files, and how they are read."""

import numpy as np
from PIL import Image

from mocosfl_jax.data.sources import prepare_dataset

OPTIONS = {
    "data_dir": None,
    "train_split": None,
    "test_split": None,
    "image_size": None,
    "holdout_fraction": 0.25,
    "seed": 0,
}


def prepare(dataset, **options):
    return prepare_dataset(str(dataset), **{**OPTIONS, **options})


def inspect(dataset, **options):
    return prepare(dataset, **options).info


def load(dataset, **options):
    """Loads a data set and checks all that was foretold."""
    prepared = prepare(dataset, **options)
    labels, loaded = prepared.train_labels(), prepared.load()
    assert loaded.info == prepared.info == inspect(dataset, **options)
    assert loaded.class_names == loaded.info.class_names
    assert labels is None or labels.dtype == np.int32
    np.testing.assert_array_equal(labels, loaded.train.labels)
    splits = {"train": loaded.train, **({"test": loaded.test} if loaded.test else {})}
    for name, split in splits.items():
        shape = (getattr(loaded.info, f"num_{name}"), *[loaded.info.image_size] * 2, 3)
        assert (split.images.dtype, split.images.shape) == (np.uint8, shape)
        if split.labels is not None:
            assert (split.labels.dtype, split.labels.shape) == (np.int32, shape[:1])
    assert (loaded.test is None) == (loaded.info.num_test == 0)
    assert loaded.info.labelled == (loaded.train.labels is not None)
    return loaded


def random_images(*shape):
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, np.uint8)


def numbered(images, start=0):
    """Images whose first pixel tells their index."""
    images = images.copy()
    images[:, 0, 0] = np.arange(start, start + len(images))[:, None]
    return images


def write_npz(path, compress=False, **arrays):
    (np.savez_compressed if compress else np.savez)(path, **arrays)
    return f"npz:{path}"


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)


def write_classes(root, counts, size=6):
    """Folders of PNG files whose first pixel tells their index within the class."""
    for name, count in counts.items():
        for index, pixels in enumerate(numbered(random_images(count, size, size, 3))):
            save(root / name / f"{index:03d}.png", pixels)
    return root
