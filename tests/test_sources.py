import hashlib
import io
import json
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

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
    numbered,
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


# ----------------------------------------------------------------------------------------- npz


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
    assert not loaded.info.held_out


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


def test_npz_labels_need_no_pixels(tmp_path):
    path = tmp_path / "a.npz"
    dataset = write_npz(
        path, x_train=random_images(5, 64, 64, 3), y_train=np.array([7, 9, 7, 9, 9])
    )
    path.write_bytes(
        path.read_bytes().replace(random_images(5, 64, 64, 3)[2].tobytes(), b"?" * 12288)
    )
    prepared = prepare(dataset, holdout_fraction=0.0)
    assert prepared.train_labels().tolist() == [0, 1, 0, 1, 1]
    with pytest.raises(InputError, match="CRC"):
        prepared.load()


def test_npz_hold_out_by_rule(tmp_path):
    """A tenth of labelled images; without labels nothing, unless a fraction is set."""
    images, labels = random_images(40, 4, 4, 3), np.repeat([0, 1], 20)
    labelled = write_npz(tmp_path / "a.npz", x_train=images, y_train=labels)
    unlabelled = write_npz(tmp_path / "b.npz", x_train=images, y_train=np.full(40, -1))
    infos = [
        inspect(dataset, holdout_fraction=fraction)
        for dataset in (labelled, unlabelled)
        for fraction in (None, 0.3, 0.0)
    ]
    assert [info.num_test for info in infos] == [4, 12, 0, 0, 12, 0]
    assert [info.held_out for info in infos] == [True, True, False, False, True, False]
    by_rule, set_ = (load(labelled, holdout_fraction=fraction) for fraction in (None, 0.1))
    np.testing.assert_array_equal(by_rule.test.images, set_.test.images)


def test_npz_ignores_what_it_does_not_read(tmp_path):
    """A text, an object array and a torn array, none of which has a header that can be read."""
    dataset = write_npz(tmp_path / "a.npz", **GOOD, objects=np.array([{}, None]))
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("readme.txt", "not an array")
        archive.writestr("torn.npy", b"\x93NUMPY\x01")
    np.testing.assert_array_equal(load(dataset, holdout_fraction=0.0).train.images, GOOD["x_train"])


def write_header(path, name, shape, descr, data):
    """Replaces an array of GOOD by one of any header and any bytes."""
    member = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, header)
    write_npz(path, **{key: array for key, array in GOOD.items() if key != name})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{name}.npy", member.getvalue() + data)
    return f"npz:{path}"


@pytest.mark.parametrize(
    ("name", "shape", "descr", "num_bytes"),
    [
        ("x_train", (2**62, 4, 4, 3), "|u1", 192),
        ("x_train", (4, 2**40, 2**40, 3), "|u1", 300),
        ("x_train", (4, 5, 5, 3), "|u1", 299),
        ("x_train", (4, 5, 5, 3), "|u1", 301),
        ("x_train", (4, 5, 5, 3), "|u1", 0),
        ("y_train", (4,), "<i8", 16),
    ],
)
def test_npz_header_must_fit_its_bytes(tmp_path, name, shape, descr, num_bytes):
    dataset = write_header(tmp_path / "a.npz", name, shape, descr, bytes(num_bytes))
    with pytest.raises(InputError, match=rf"a\.npz\[{name}\] = .* fits the {num_bytes} bytes"):
        inspect(dataset)


def test_npz_beyond_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    """Whatever the size of the stored squares; the labels are the first to be read."""
    dataset = write_npz(tmp_path / "a.npz", x_train=random_images(4, 9, 9, 3))
    labelled = write_npz(tmp_path / "b.npz", **GOOD)
    prepared = prepare(dataset, image_size=1)
    monkeypatch.setattr("mocosfl_jax.data.npz.machine_memory_bytes", lambda: 31)
    with pytest.raises(InputError, match=r"a\.npz\[x_train\] = '972 bytes'.* memory .* 31$"):
        prepared.load()
    with pytest.raises(InputError, match=r"b\.npz\[y_train\] = '32 bytes'.* memory .* 31$"):
        inspect(labelled)


def test_a_pipe_is_no_npz(tmp_path):
    os.mkfifo(tmp_path / "a.npz")
    with pytest.raises(InputError, match=r"a\.npz = 'no file'"):
        inspect(f"npz:{tmp_path}/a.npz")


@pytest.mark.parametrize("content", [b"", b"not a zip file", b"PK\x03\x04 torn"])
def test_file_that_is_no_npz(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.npz = "):
        inspect(f"npz:{tmp_path}/a.npz")
    with pytest.raises(InputError, match=r"b\.npz = "):
        inspect(f"npz:{tmp_path}/b.npz")


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


def test_tfds_fingerprint(data_dir):
    options = {"data_dir": data_dir, "train_split": "train[3:]"}
    before, smaller = (inspect("cifar10", image_size=size, **options) for size in (32, 20))
    assert smaller.fingerprint == before.fingerprint
    assert before.fingerprint == {
        "kind": "tfds",
        "images": {"train": 27, "test": 8},
        "class_names": list(before.class_names),
        "name": "cifar10",
        "version": "3.0.2",
        "splits": {"train": "train[3:]", "test": "test"},
    }
    whole = inspect("stl10", data_dir=data_dir).fingerprint
    assert (whole["images"], whole["splits"]) == ({"train": 6, "test": 0}, {"train": "train"})


def test_tfds_labels_need_no_pixels(tfds, data_dir, monkeypatch):
    expected = load("cifar10", data_dir=data_dir, train_split="train[3:]").train.labels
    prepared = prepare("cifar10", data_dir=data_dir, train_split="train[3:]")

    def undecodable(*_):
        raise OSError("an image was decoded")

    monkeypatch.setattr(tfds.features.Image, "decode_example_np", undecodable)
    assert prepared.train_labels().tolist() == expected.tolist()
    with pytest.raises(InputError, match="an image was decoded"):
        prepared.load()


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
