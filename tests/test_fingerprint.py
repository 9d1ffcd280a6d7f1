import json
import shutil
import zipfile

import numpy as np
import pytest

from mocosfl_jax.data.fingerprint import difference
from tests.data_files import inspect, random_images, save, write_classes, write_npz


def fingerprint(dataset, **options):
    """As it comes back from a JSON file."""
    found = inspect(dataset, **options).fingerprint
    stored = json.loads(json.dumps(found))
    assert stored == found
    assert difference(stored, found) is None
    return stored


# ---------------------------------------------------------------------------------- the folder


def of_folder(root, **options):
    return fingerprint(f"folder:{root}", **{"image_size": 6, **options})


@pytest.fixture
def root(tmp_path):
    return write_classes(tmp_path / "set", {"a": 4, "b": 3})


def test_fingerprint_of_a_folder(root):
    sizes = {
        f"{path.parent.name}/{path.name}": path.stat().st_size for path in root.glob("*/*.png")
    }
    assert of_folder(root) == {
        "kind": "folder",
        "images": {"train": 7, "test": 0},
        "class_names": ["a", "b"],
        "pictures": sizes,
    }


def test_fingerprint_of_two_splits(tmp_path):
    write_classes(tmp_path, {"train/a": 4, "train/b": 3, "val/a": 1, "val/b": 2})
    found = of_folder(tmp_path)
    assert found["images"] == {"train": 7, "test": 3}
    assert {"train/a/003.png", "val/b/001.png"} < found["pictures"].keys()
    (tmp_path / "val" / "b" / "001.png").unlink()
    assert difference(found, of_folder(tmp_path)) == (
        "10 -> 9 pictures (first missing: val/b/001.png)"
    )


def test_fingerprint_depends_on_no_config_field_and_on_no_place(root, tmp_path):
    found = of_folder(root)
    assert of_folder(root, holdout_fraction=0.0, image_size=9, seed=5) == found
    assert of_folder(shutil.copytree(root, tmp_path / "elsewhere")) == found


def grow(path):
    path.write_bytes(path.read_bytes() + bytes(17))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda root: (root / "a/002.png").unlink(), "7 -> 6 pictures (first missing: a/002.png)"),
        (
            lambda root: save(root / "b/00.png", random_images(6, 6, 3)),
            "7 -> 8 pictures (first new: b/00.png)",
        ),
        (
            lambda root: (root / "a/002.png").rename(root / "b/\n.png"),
            r"7 -> 7 pictures (first missing: a/002.png, first new: b/\n.png)",
        ),
        (lambda root: grow(root / "b/001.png"), "b/001.png: {0} -> {1} bytes"),
    ],
)
def test_changed_folders(root, change, expected):
    size = (root / "b" / "001.png").stat().st_size
    before = of_folder(root)
    change(root)
    assert difference(before, of_folder(root)) == expected.format(size, size + 17)


# ------------------------------------------------------------------------------ the other kinds

ARRAYS = {"x_train": random_images(5, 4, 4, 3), "y_train": np.array([0, 1, 1, 0, 0])}


def test_fingerprint_of_an_npz(tmp_path):
    """The CRCs are those of the zip file; what is not read does not count."""
    dataset = write_npz(tmp_path / "a.npz", **ARRAYS)
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        crcs = {name: archive.getinfo(f"{name}.npy").CRC for name in ARRAYS}
    found = fingerprint(dataset)
    assert found == {
        "kind": "npz",
        "images": {"train": 5, "test": 0},
        "class_names": None,
        "arrays": {
            "x_train": f"uint8 (5, 4, 4, 3), CRC {crcs['x_train']:08x}",
            "y_train": f"int64 (5,), CRC {crcs['y_train']:08x}",
        },
    }
    other = write_npz(tmp_path / "b.npz", compress=True, **ARRAYS, notes=np.array(["new"]))
    assert fingerprint(other, holdout_fraction=0.0, image_size=2, seed=3) == found


def test_changed_npz(tmp_path):
    before = fingerprint(write_npz(tmp_path / "a.npz", **ARRAYS))
    pixel = ARRAYS["x_train"].copy()
    pixel[4, 3, 2, 1] ^= 1
    for arrays, start in (
        ({"x_train": pixel}, "array x_train: uint8 (5, 4, 4, 3), CRC "),
        ({"y_train": np.array([0, 1, 1, 0, 1])}, "array y_train: int64 (5,), CRC "),
        ({"x_test": pixel[:2]}, "array x_test: missing -> uint8 (2, 4, 4, 3), CRC "),
        ({"y_train": np.array([5, 9, 9, 5, 5])}, "0 -> 2 classes (first new: 5)"),
    ):
        found = fingerprint(write_npz(tmp_path / "a.npz", **{**ARRAYS, **arrays}))
        assert difference(before, found).startswith(start)


def test_fingerprint_of_synthetic(root):
    found = fingerprint("synthetic", image_size=9)
    assert found == fingerprint("synthetic", seed=2)
    assert found["images"] == {"train": 10_000, "test": 2_000}
    assert difference(of_folder(root), found) == "kind: folder -> synthetic"


# -------------------------------------------------------------------------------- all by hand

TFDS = {
    "kind": "tfds",
    "images": {"train": 50, "test": 9},
    "class_names": ["ant", "bee"],
    "name": "insects",
    "version": "3.0.2",
    "splits": {"train": "train[:50]", "test": "test"},
}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"name": "pets"}, "name: pets -> insects"),
        ({"version": "3.0.1"}, "version: 3.0.1 -> 3.0.2"),
        ({"splits": {"train": "train", "test": "test"}}, "train split: train -> train[:50]"),
        ({"splits": {"train": "train[:50]"}}, "test split: missing -> test"),
        ({"images": {"train": 50, "test": 8}}, "test images: 8 -> 9"),
        ({"class_names": ["ant"]}, "1 -> 2 classes (first new: bee)"),
        ({"class_names": ["bee", "ant"]}, "class 0: bee -> ant"),
        ({"kind": None}, "kind: None -> tfds"),
        ({"class_names": "ant"}, "0 -> 2 classes (first new: ant)"),
        ({"class_names": [["ant"], 3]}, "2 -> 2 classes (first missing: another list, first"),
        ({"images": [50, 9]}, "train images: missing -> 50"),
        ({"version": ["3", "0"]}, "version: another list -> 3.0.2"),
        ({"pictures": {"a.png": 3}}, "1 -> 0 pictures (first missing: a.png)"),
        ({"more": "of\u2028it"}, r"more: of\u2028it -> missing"),
    ],
)
def test_difference_names_what_changed(changed, expected):
    assert difference({**TFDS, **changed}, TFDS).startswith(expected)


@pytest.mark.parametrize("stored", [{}, None, [], 3, "tfds", {"kind": {}}, {"images": None}])
def test_difference_of_damaged_fingerprints(stored):
    text = difference(stored, TFDS)
    assert text.isprintable() and "tfds" in text
    assert difference(TFDS, stored)
