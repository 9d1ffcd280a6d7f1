"""Prepared TensorFlow data sets, written here in a few records."""

import json

import numpy as np
import pytest
from PIL import Image

from mocosfl_jax.errors import InputError
from tests.data_files import (
    inspect,
    load,
    numbered,
    prepare,
    random_images,
)


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
