"""Arrays in one file: what is read, what is refused before it is read."""

import io
import os
import zipfile

import numpy as np
import pytest

from mocosfl_jax.data.sources import (
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
    assert str(error.value).startswith(f"config.dataset = 'npz:{tmp_path}/bad.npz': ")
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
    missing = rf"^config\.dataset = 'npz:{tmp_path}/b\.npz': an existing file is needed$"
    with pytest.raises(InputError, match=missing):
        inspect(f"npz:{tmp_path}/b.npz")
