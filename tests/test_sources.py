import hashlib
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from mocosfl_jax.data import synthetic
from mocosfl_jax.data.sources import channel_stats, inspect_dataset, load_dataset
from mocosfl_jax.errors import InputError

OPTIONS = {
    "data_dir": None,
    "train_split": None,
    "test_split": None,
    "image_size": None,
    "holdout_fraction": 0.25,
    "seed": 0,
}


def inspect(dataset, **options):
    return inspect_dataset(str(dataset), **{**OPTIONS, **options})


def load(dataset, **options):
    """Loads a data set and checks that `inspect_dataset` had foretold it."""
    loaded = load_dataset(str(dataset), **{**OPTIONS, **options})
    assert loaded.info == inspect(dataset, **options)
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


# ----------------------------------------------------------------------------------------- npz


def write_npz(path, compress=False, **arrays):
    (np.savez_compressed if compress else np.savez)(path, **arrays)
    return f"npz:{path}"


@pytest.mark.parametrize("compress", [False, True])
def test_npz_round_trip(tmp_path, compress):
    x_train, x_test = random_images(7, 6, 6, 3), random_images(4, 6, 6, 3)
    y_train, y_test = np.array([2, 0, 1, 1, 0, 2, 2]), np.array([1, 2, 0, 1], np.uint8)
    dataset = write_npz(
        tmp_path / "a.npz",
        compress,
        x_train=x_train,
        y_train=y_train,
        x_test=x_test,
        y_test=y_test,
    )
    loaded = load(dataset)
    np.testing.assert_array_equal(loaded.train.images, x_train)
    np.testing.assert_array_equal(loaded.test.images, x_test)
    assert loaded.train.labels.tolist() == y_train.tolist()
    assert loaded.test.labels.tolist() == y_test.tolist()
    assert loaded.class_names is None
    assert (loaded.info.name, loaded.info.num_classes) == (dataset, 3)


@pytest.mark.parametrize("shape", [(5, 6, 6), (5, 6, 6, 1)])
def test_npz_grey_becomes_rgb(tmp_path, shape):
    grey = random_images(*shape)
    loaded = load(write_npz(tmp_path / "a.npz", x_train=grey), holdout_fraction=0.0)
    np.testing.assert_array_equal(loaded.train.images, np.stack([grey.reshape(5, 6, 6)] * 3, -1))
    assert loaded.test is None
    assert not loaded.info.labelled


def test_npz_labels_are_mapped_in_their_order(tmp_path):
    x = random_images(6, 4, 4, 3)
    y = np.array([30, 5, 9, 9, 5, 30])
    loaded = load(write_npz(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x[:2], y_test=y[2:4]))
    assert loaded.train.labels.tolist() == [2, 0, 1, 1, 0, 2]
    assert loaded.test.labels.tolist() == [1, 1]
    assert loaded.class_names == ("5", "9", "30")


def test_npz_negative_labels_mean_none(tmp_path):
    x = random_images(6, 4, 4, 3)
    loaded = load(write_npz(tmp_path / "a.npz", x_train=x, y_train=np.full(6, -1)))
    assert loaded.info.num_classes is None


def test_hold_out_takes_its_part_of_each_class(tmp_path):
    """A quarter of 12, 5 and 2 images is 3, 1 (rounded) and 1 (the least)."""
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [12, 5, 2]))
    images = numbered(random_images(19, 4, 4, 3))
    dataset = write_npz(tmp_path / "a.npz", x_train=images, y_train=labels)
    loaded = load(dataset)
    train_ids, test_ids = loaded.train.images[:, 0, 0, 0], loaded.test.images[:, 0, 0, 0]
    assert sorted([*train_ids, *test_ids]) == list(range(19))
    assert np.bincount(loaded.test.labels).tolist() == [3, 1, 1]
    np.testing.assert_array_equal(loaded.train.labels, labels[train_ids])
    np.testing.assert_array_equal(loaded.test.labels, labels[test_ids])
    np.testing.assert_array_equal(load(dataset).test.images, loaded.test.images)
    assert not np.array_equal(load(dataset, seed=1).test.images, loaded.test.images)


def test_npz_images_are_resized_and_cropped(tmp_path):
    """A ramp along the width stays a ramp; the crop takes its middle."""
    ramp = np.broadcast_to(2 * np.arange(60, dtype=np.uint8)[None, :, None], (30, 60, 3))
    dataset = write_npz(tmp_path / "a.npz", x_train=ramp[None], x_test=ramp[None, :, :40])
    loaded = load(dataset, image_size=15)
    # Pixel j of the width of 30 (then 20) lies at 2j + 1/2; 7.5 (2.5) columns go at the left.
    for split, left in ((loaded.train, round(7.5)), (loaded.test, round(2.5))):
        expected = 2 * (2 * (np.arange(15) + left) + 0.5)
        difference = split.images[0] - expected[None, :, None]
        assert np.abs(difference).max() <= 1


def test_npz_own_size_is_the_short_side(tmp_path):
    x = random_images(3, 8, 14, 3)
    loaded = load(write_npz(tmp_path / "a.npz", x_train=x), holdout_fraction=0.0)
    np.testing.assert_array_equal(loaded.train.images, x[:, :, 3:11])


GOOD = {"x_train": random_images(4, 5, 5, 3), "y_train": np.array([0, 1, 1, 0])}


@pytest.mark.parametrize(
    ("arrays", "where", "words"),
    [
        ({"x_test": GOOD["x_train"]}, "[x_train]", ["None", "x_test"]),
        ({"x_train": GOOD["x_train"].astype(np.float32)}, "[x_train]", ["float32", "uint8"]),
        ({"x_train": GOOD["x_train"][0, 0]}, "[x_train]", ["(5, 3)"]),
        ({"x_train": random_images(4, 5, 5, 2)}, "[x_train]", ["(4, 5, 5, 2)"]),
        ({"x_train": random_images(0, 5, 5, 3)}, "[x_train]", ["(0, 5, 5, 3)"]),
        ({"x_train": np.array([{}, None])}, "[x_train]", ["object"]),
        ({**GOOD, "y_train": np.array([0, 1, 1])}, "[y_train]", ["(3,)", "(4,)"]),
        ({**GOOD, "y_train": np.eye(4, dtype=int)}, "[y_train]", ["(4, 4)"]),
        ({**GOOD, "y_train": np.zeros(4)}, "[y_train]", ["float64"]),
        ({**GOOD, "y_train": np.array([0, 1, -1, 0])}, " train labels", ["-1"]),
        ({**GOOD, "y_test": np.zeros(4, int)}, "[y_test]", ["x_test"]),
        (
            {**GOOD, "x_test": GOOD["x_train"], "y_test": np.array([0, 1, 2, 0])},
            " test labels",
            ["2"],
        ),
        ({**GOOD, "y_train": np.array([0, 1, 1, 1])}, "", ["1 image of class 0"]),
    ],
)
def test_bad_npz_names_file_and_array(tmp_path, arrays, where, words):
    dataset = write_npz(tmp_path / "bad.npz", **arrays)
    with pytest.raises(InputError) as error:
        inspect(dataset)
    for word in (f"{tmp_path}/bad.npz{where} = ", *words):
        assert word in str(error.value)


def test_npz_of_two_sizes_needs_a_store_size(tmp_path):
    dataset = write_npz(tmp_path / "a.npz", x_train=GOOD["x_train"], x_test=random_images(2, 6, 5))
    with pytest.raises(InputError, match=r"^config.image_size = None"):
        inspect(dataset)
    assert load(dataset, image_size=5).test.images.shape == (2, 5, 5, 3)


def test_inspecting_an_npz_reads_no_pixels(tmp_path):
    """Pixels that cannot be read are found when they are loaded."""
    path = tmp_path / "a.npz"
    dataset = write_npz(path, **{**GOOD, "x_train": random_images(4, 64, 64, 3)})
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("x_train.npy").header_offset
    with path.open("r+b") as file:
        file.seek(offset + 20_000)
        file.write(bytes(100))
    assert inspect(dataset).num_train == 2
    with pytest.raises(InputError, match=r"a\.npz = .*CRC"):
        load_dataset(dataset, **OPTIONS)


@pytest.mark.parametrize("content", [b"", b"not a zip file", b"PK\x03\x04 torn"])
def test_file_that_is_no_npz(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.npz = "):
        inspect(f"npz:{tmp_path}/a.npz")
    with pytest.raises(InputError, match=r"b\.npz = "):
        inspect(f"npz:{tmp_path}/b.npz")


# -------------------------------------------------------------------------------------- folder


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


def test_folder_with_train_and_val(tmp_path):
    write_classes(tmp_path / "train", {"dog": 3, "ant": 5})
    write_classes(tmp_path / "val", {"ant": 2, "dog": 4})
    write_classes(tmp_path / "test", {"unlabelled": 1})  # as ImageNet's; val goes first
    loaded = load(f"folder:{tmp_path}", image_size=6)
    assert loaded.class_names == ("ant", "dog")
    assert loaded.train.labels.tolist() == [0] * 5 + [1] * 3
    assert loaded.test.labels.tolist() == [0] * 2 + [1] * 4
    assert loaded.train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    np.testing.assert_array_equal(loaded.train.images[:5], numbered(random_images(5, 6, 6, 3)))


def test_folder_without_test_holds_out(tmp_path):
    write_classes(tmp_path, {"a": 8, "b": 4})
    loaded = load(f"folder:{tmp_path}", image_size=6)
    assert np.bincount(loaded.train.labels).tolist() == [6, 3]
    assert np.bincount(loaded.test.labels).tolist() == [2, 1]
    for label, count in ((0, 8), (1, 4)):
        splits = (loaded.train, loaded.test)
        ids = np.concatenate([s.images[s.labels == label, 0, 0, 0] for s in splits])
        assert sorted(ids) == list(range(count))
    assert load(f"folder:{tmp_path}", image_size=6, holdout_fraction=0.0).test is None


def test_folder_of_images_has_no_labels(tmp_path):
    write_classes(tmp_path, {".": 9})
    loaded = load(f"folder:{tmp_path}", image_size=6)
    assert (loaded.info.num_train, loaded.info.num_test) == (7, 2)
    assert loaded.class_names is None


def test_folder_named_train_may_be_a_class(tmp_path):
    write_classes(tmp_path, {"train": 4, "bus": 4})
    assert inspect(f"folder:{tmp_path}", image_size=6).num_classes == 2


def test_folder_ignores_what_is_no_image(tmp_path):
    write_classes(tmp_path, {"a": 4, "b/deeper": 4, ".cache": 3, "b/.thumbnails": 2})
    for name in ("a/Thumbs.db", "a/notes.txt", "a/.000.png", "README", "a/no_suffix"):
        (tmp_path / name).write_bytes(b"no image")
    (tmp_path / "a" / "000.png").rename(tmp_path / "a" / "000.PNG")
    info = inspect(f"folder:{tmp_path}", image_size=6)
    assert (info.num_train, info.num_test, info.num_classes) == (6, 2, 2)


def read_one(tmp_path, name, pixels, **options):
    """The pixels that come out of a folder with one image."""
    size = options.pop("image_size", 6)
    save(tmp_path / name, pixels, **options)
    loaded = load(f"folder:{tmp_path}", image_size=size, holdout_fraction=0.0)
    return loaded.train.images[0]


GREY = random_images(6, 6)
RGB = random_images(6, 6, 3)


def test_grey_file(tmp_path):
    np.testing.assert_array_equal(read_one(tmp_path, "a.png", GREY), np.stack([GREY] * 3, -1))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bit_file_keeps_the_upper_byte(tmp_path, suffix):
    deep = GREY.astype(np.uint16) * 256 + 77
    np.testing.assert_array_equal(read_one(tmp_path, f"a.{suffix}", deep), np.stack([GREY] * 3, -1))


def test_palette_file(tmp_path):
    image = Image.frombytes("P", (6, 6), (GREY // 86).tobytes())
    palette = np.array([[250, 1, 2], [3, 240, 4], [5, 6, 230]], np.uint8)
    image.putpalette(palette.tobytes())
    out = read_one(tmp_path, "a.png", image, transparency=b"\x00\x80")
    np.testing.assert_array_equal(out, palette[GREY // 86])


def test_transparency_is_dropped(tmp_path):
    rgba = np.concatenate([RGB, random_images(6, 6, 1)], axis=-1)
    np.testing.assert_array_equal(read_one(tmp_path, "a.png", rgba), RGB)


def test_exif_orientation_is_applied(tmp_path):
    """Orientation 6: the camera was turned, the picture is upright after a quarter turn right."""
    exif = Image.Exif()
    exif[0x0112] = 6
    out = read_one(tmp_path, "a.png", RGB, exif=exif)
    np.testing.assert_array_equal(out, np.rot90(RGB, -1))


def test_jpeg_is_cropped_at_its_centre(tmp_path):
    """Thirds of red, green and blue: the centre is green, but for the errors of JPEG."""
    thirds = np.zeros((20, 60, 3), np.uint8)
    for i in range(3):
        thirds[:, 20 * i : 20 * i + 20, i] = 255
    out = read_one(tmp_path, "a.jpg", thirds, image_size=20, quality=95, subsampling=0)
    assert np.abs(out.astype(int) - [0, 255, 0])[:, 4:-4].max() < 8


def test_float_pixels_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"a\.tif = .*16 bits"):
        read_one(tmp_path, "a.tif", GREY.astype(np.float32))


def test_broken_header_is_found_before_any_pixel(tmp_path):
    write_classes(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "b" / "001.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(InputError, match=r"b/001\.png = .*: an image file"):
        inspect(f"folder:{tmp_path}", image_size=6)


def test_torn_file_is_found_when_it_is_decoded(tmp_path):
    write_classes(tmp_path, {"a": 3, "b": 3}, size=40)
    torn = tmp_path / "b" / "002.png"
    torn.write_bytes(torn.read_bytes()[:2000])
    inspect(f"folder:{tmp_path}", image_size=6)
    with pytest.raises(InputError, match=r"b/002\.png = .*: an image file"):
        load_dataset(f"folder:{tmp_path}", **{**OPTIONS, "image_size": 6})


@pytest.mark.parametrize(
    ("layout", "where"),
    [
        ({}, ""),
        ({"train/a": 2}, "/val"),
        ({"train/a": 2, "train/b": 2, "val/a": 2}, "/val"),
        ({"train/a": 2, "val/a": 2, "val/b": 2}, "/val"),
        ({"train/a": 2, "val": 2}, "/val"),
        ({"a": 2, "b": 0}, "/b"),
        ({".": 2, "b": 2}, ""),
        ({"a": 2, "b": 1}, ""),
        ({".": 1}, ""),
    ],
)
def test_bad_layout_names_the_folder(tmp_path, layout, where):
    for name, count in layout.items():
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        write_classes(tmp_path, {name: count})
    if where:
        (tmp_path / where[1:]).mkdir(exist_ok=True)
    with pytest.raises(InputError) as error:
        inspect(f"folder:{tmp_path}", image_size=6)
    assert str(error.value).startswith(f"{tmp_path}{where} = ")


# ---------------------------------------------------------------------------------------- TFDS


@pytest.fixture(scope="module")
def tfds():
    return pytest.importorskip("tensorflow_datasets")


def write_tfds(tfds, data_dir, name, splits):
    """Has the official builder write images and labels, without TensorFlow."""
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")

    def examples(images, labels):
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            example = {"image": Image.fromarray(image.squeeze()), "label": label}
            if "id" in builder.info.features:
                example["id"] = str(index)
            yield index, example

    builder._split_generators = lambda _: {k: examples(*v) for k, v in splits.items()}
    builder.download_and_prepare(
        download_dir=data_dir / "downloads",
        download_config=tfds.download.DownloadConfig(try_download_gcs=False),
    )
    return builder


CIFAR = {
    "train": (numbered(random_images(30, 32, 32, 3)), [i * 7 % 10 for i in range(30)]),
    "test": (numbered(random_images(8, 32, 32, 3)), [i * 3 % 10 for i in range(8)]),
}


@pytest.fixture(scope="module")
def data_dir(tfds, tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    write_tfds(tfds, path, "cifar10", CIFAR)
    stl = {
        "train": (numbered(random_images(6, 96, 96, 3)), [3, 1, 4, 1, 5, 9]),
        "unlabelled": (numbered(random_images(9, 96, 96, 3)), [-1] * 9),
    }
    write_tfds(tfds, path, "stl10", stl)
    write_tfds(tfds, path, "mnist", {"train": (random_images(4, 28, 28, 1), [0, 1, 2, 3])})
    return str(path)


def test_tfds_round_trip(data_dir, capfd):
    loaded = load("cifar10", data_dir=data_dir)
    assert (loaded.info.num_train, loaded.info.num_test, loaded.info.num_classes) == (30, 8, 10)
    assert len(loaded.class_names) == 10
    for name, split in (("train", loaded.train), ("test", loaded.test)):
        images, labels = CIFAR[name]
        ids = split.images[:, 0, 0, 0]
        assert sorted(ids) == list(range(len(labels)))
        np.testing.assert_array_equal(split.images, images[ids])
        np.testing.assert_array_equal(split.labels, np.array(labels)[ids])
    assert capfd.readouterr() == ("", "")


def test_tfds_slices_and_sizes(data_dir):
    whole = load("cifar10", data_dir=data_dir)
    part = load("cifar10", data_dir=data_dir, train_split="train[5:12]", test_split="train[12:]")
    np.testing.assert_array_equal(part.train.images, whole.train.images[5:12])
    np.testing.assert_array_equal(part.test.labels, whole.train.labels[12:])
    assert load("cifar10", data_dir=data_dir, image_size=20).test.images.shape == (8, 20, 20, 3)


def test_tfds_unlabelled_split(data_dir):
    loaded = load("stl10", data_dir=data_dir, train_split="unlabelled", test_split="train")
    assert loaded.info.num_classes is None
    assert loaded.class_names is None
    assert sorted(loaded.test.labels) == [1, 1, 3, 4, 5, 9]


def test_tfds_without_test_split(data_dir):
    loaded = load("stl10", data_dir=data_dir)
    assert loaded.test is None
    assert loaded.info.num_classes == 10


def test_tfds_grey_becomes_rgb(data_dir):
    loaded = load("mnist", data_dir=data_dir)
    grey = {image.tobytes() for image in random_images(4, 28, 28, 1)}
    assert {image[..., c].tobytes() for image in loaded.train.images for c in range(3)} == grey


@pytest.mark.parametrize("split", ["nope", "train[abc]", "train[:0]"])
def test_unknown_tfds_split(data_dir, split):
    for field in ("train_split", "test_split"):
        with pytest.raises(InputError, match=rf"^config\.{field} = .*train, test"):
            inspect("cifar10", data_dir=data_dir, **{field: split})


def test_tfds_that_is_not_prepared(data_dir, capfd):
    with pytest.raises(InputError, match=r"^config\.dataset = 'cifar100'") as error:
        inspect("cifar100", data_dir=data_dir)
    for word in (
        f"not prepared under {data_dir}",
        f"tfds.builder('cifar100', data_dir='{data_dir}', file_format='array_record')",
        ".download_and_prepare()",
    ):
        assert word in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_unknown_tfds_version(data_dir):
    with pytest.raises(InputError, match=r"^config\.dataset = 'cifar10:9\.9\.9'.*only: 3"):
        inspect("cifar10:9.9.9", data_dir=data_dir)


def test_tfds_in_other_files(tfds, tmp_path):
    """As if prepared as TFRecord, which cannot be read without TensorFlow."""
    builder = write_tfds(tfds, tmp_path, "mnist", {"train": (random_images(2, 28, 28, 1), [0, 1])})
    for path in list(builder.data_path.glob("*array_record*")):
        path.rename(path.with_name(path.name.replace("array_record", "tfrecord")))
    info = builder.data_path / "dataset_info.json"
    facts = json.loads(info.read_text())
    facts["fileFormat"] = "tfrecord"
    for split in facts["splits"]:
        split["filepathTemplate"] = split["filepathTemplate"].replace("array_record", "tfrecord")
    info.write_text(json.dumps(facts))
    with pytest.raises(InputError, match=r"^config\.dataset = 'mnist'.*array_record"):
        inspect("mnist", data_dir=str(tmp_path))


def test_tfds_with_broken_files(tfds, tmp_path):
    builder = write_tfds(tfds, tmp_path, "mnist", {"train": (random_images(2, 28, 28, 1), [0, 1])})
    (file,) = builder.data_path.glob("*array_record*")
    file.write_bytes(file.read_bytes()[:-100])
    for _ in ("torn", "missing"):
        with pytest.raises(InputError, match=r"mnist/3.* = .*prepare the data set again"):
            inspect("mnist", data_dir=str(tmp_path))
        file.unlink(missing_ok=True)


def test_tfds_without_images(tfds, tmp_path):
    class Words(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict({"word": tfds.features.Text()})
            )

        def _split_generators(self, dl_manager):
            return {"train": iter([(0, {"word": "a"})])}

        def _generate_examples(self):
            raise NotImplementedError

    builder = Words(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    with pytest.raises(InputError, match=r"^config\.dataset = 'words'.*its features are word"):
        inspect("words", data_dir=str(tmp_path))


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
