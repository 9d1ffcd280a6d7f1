"""Prepared TensorFlow Datasets, read without TensorFlow: `cifar10`, `stl10`, ..."""

import difflib
import io
import os
import re
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mocosfl_jax.data.dataset import Dataset, DatasetInfo, Prepared, Request, Split, known_labels
from mocosfl_jax.data.fingerprint import fingerprint
from mocosfl_jax.data.pixels import square_arrays
from mocosfl_jax.errors import InputError, quiet_logs

_NAME = re.compile(r"[a-z]\w*(/[\w.+-]+)?(:\d+\.\d+\.\d+)?")
_BATCH = 500  # records decoded at once


class _Part(NamedTuple):
    """A split as TFDS names it, such as `train[:5000]`.

    source: its records, in their order. undecoded: the same, their images still compressed.
    num_records: how many. folder: where its files lie.
    """

    name: str
    source: Any
    undecoded: Any
    num_records: int
    folder: str
    image_key: str
    label_key: str | None

    def batches(self, source: Any) -> Iterator[list[dict[str, Any]]]:
        """All records of one of the two sources.

        Raises: InputError: files that are missing or broken.
        """
        for start in range(0, self.num_records, _BATCH):
            yield self._records(source, range(start, min(start + _BATCH, self.num_records)))

    def first_label(self) -> int:
        """-1 if the data set has no classes. Opens the files.

        Raises: InputError: files that are missing or broken.
        """
        return self.labels_of(self._records(self.source, range(1)))[0]

    def labels_of(self, records: list[dict[str, Any]]) -> list[int]:
        key = self.label_key
        return [-1 if key is None else int(record[key]) for record in records]

    def known(self, labels: list[int]) -> NDArray[np.int32] | None:
        return known_labels(np.array(labels, np.int32), f"labels of {self.name}")

    def _records(self, source: Any, ids: range) -> list[dict[str, Any]]:
        try:
            return source.__getitems__(ids)
        except Exception as error:  # RuntimeError of ArrayRecord, any of the image decoders
            reason = str(error) or type(error).__name__
            allowed = "intact files are needed: delete the folder and prepare the data set again"
            raise InputError(self.folder, reason, allowed) from None


def prepare(request: Request) -> Prepared:
    """Checks that the data set is prepared and holds the splits, and reads one label of each.

    A split whose labels are all negative has none. Without `test`, `validation` is the test split;
    without both there is none.

    Raises:
        InputError: an unknown name, a data set that is not prepared, not in ArrayRecord files or
            not of 8-bit images, an unknown or empty split, images of many sizes, unless
            `image_size` is set.
    """
    # TFDS speaks, on stdout as well, of packages that are not needed here.
    with quiet_logs(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        builder = _find_builder(request)
        image_key, label_key = _keys(builder, request)
        parts = [
            _open(builder, name, field, request, image_key, label_key)
            for name, field in _split_names(builder, request)
        ]
        first_labels = [part.first_label() for part in parts]
    classes = builder.info.features[label_key] if first_labels[0] >= 0 else None
    class_names = tuple(classes.names) if classes else None
    info = DatasetInfo(
        name=request.dataset,
        num_train=parts[0].num_records,
        num_test=parts[1].num_records if len(parts) > 1 else 0,
        image_size=_store_size(builder.info.features[image_key].shape, request),
        num_classes=classes.num_classes if classes else None,
        class_names=class_names,
        fingerprint=_fingerprint(builder, parts, class_names),
    )

    def load() -> Dataset:
        splits = [_read(part, info.image_size) for part in parts]
        test = splits[1] if len(splits) > 1 else None
        return Dataset(splits[0], test, class_names, info)

    return Prepared(info, load, lambda: _read_labels(parts[0]))


def _fingerprint(
    builder: Any, parts: list[_Part], class_names: tuple[str, ...] | None
) -> dict[str, Any]:
    config = builder.builder_config
    counts = [part.num_records for part in parts] + [0]
    return fingerprint(
        "tfds",
        counts[0],
        counts[1],
        class_names,
        name=f"{builder.name}/{config.name}" if config else builder.name,
        version=str(builder.version),
        splits=dict(zip(("train", "test"), (part.name for part in parts), strict=False)),
    )


def _import() -> ModuleType:
    import tensorflow_datasets  # here, as it takes a second

    return tensorflow_datasets


def _find_builder(request: Request) -> Any:
    tfds = _import()
    if not _NAME.fullmatch(request.location):
        raise _unknown(request)
    try:
        builder = tfds.builder(request.location, data_dir=_data_dir(request))
    except tfds.core.DatasetNotFoundError:
        raise _unknown(request) from None
    except (AssertionError, ImportError, ValueError) as error:  # no such version, config, package
        reason = str(error).partition("\n")[0]
        raise InputError("config.dataset", request.dataset, reason) from None
    if not builder.is_prepared():
        raise InputError(
            "config.dataset",
            request.dataset,
            f"not prepared under {_how_to_prepare(builder, request)}",
        )
    return builder


def _unknown(request: Request) -> InputError:
    names = _import().list_builders(with_community_datasets=False)
    close = difflib.get_close_matches(request.dataset.lower(), ["synthetic", *names], n=3)
    hint = f"; close names: {', '.join(close)}" if close else ""
    allowed = "`synthetic`, `folder:PATH`, `npz:PATH` or a name of TensorFlow Datasets is needed"
    return InputError("config.dataset", request.dataset, allowed + hint)


def _how_to_prepare(builder: Any, request: Request) -> str:
    data_dir = f"data_dir='{_data_dir(request)}', " if request.data_dir else ""
    return (
        f'{builder.data_dir}: run `python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{request.location}', {data_dir}file_format='array_record')"
        '.download_and_prepare()"`'
    )


def _data_dir(request: Request) -> str | None:
    """TFDS does not expand `~` itself."""
    return os.path.expanduser(request.data_dir) if request.data_dir else None


def _keys(builder: Any, request: Request) -> tuple[str, str | None]:
    """The features that hold the image and, if any, the class."""
    tfds = _import()
    features: dict[str, Any] = dict(builder.info.features.items())
    keys = builder.info.supervised_keys or ("image", "label")
    image, label = (features.get(key) if isinstance(key, str) else None for key in keys[:2])
    holds = isinstance(image, tfds.features.Image) and image.np_dtype == np.uint8
    if not holds or features[keys[0]].shape[-1] not in (1, 3):
        found = ", ".join(features)
        allowed = f"a data set of 8-bit grey or RGB images is needed; its features are {found}"
        raise InputError("config.dataset", request.dataset, allowed)
    return keys[0], keys[1] if isinstance(label, tfds.features.ClassLabel) else None


def _split_names(builder: Any, request: Request) -> list[tuple[str, str]]:
    """Split and config field, of the train and, if there is one, the test split."""
    names = list(builder.info.splits)
    by_rule = next((name for name in ("test", "validation") if name in names), None)
    test = request.test_split or by_rule
    splits = [(request.train_split or "train", "config.train_split")]
    return splits + ([(test, "config.test_split")] if test else [])


def _open(
    builder: Any, split: str, field: str, request: Request, image_key: str, label_key: str | None
) -> _Part:
    try:
        count = builder.info.splits[split].num_examples
    except (KeyError, ValueError):
        count = 0
    if not count:
        names = ", ".join(builder.info.splits)
        allowed = f"a split of {names}, or a slice of one that is not empty, is needed"
        raise InputError(field, split, allowed)
    skip = {image_key: _import().decode.SkipDecoding()}
    try:
        source, undecoded = (
            builder.as_data_source(split=split, decoders=decoders) for decoders in (None, skip)
        )
    except NotImplementedError:
        allowed = (
            f"in {builder.data_dir} are no array_record files; with another config.data_dir, "
            "prepare it as array_record"
        )
        raise InputError("config.dataset", request.dataset, allowed) from None
    return _Part(split, source, undecoded, count, str(builder.data_dir), image_key, label_key)


def _store_size(shape: tuple[int | None, ...], request: Request) -> int:
    """`image_size`, or the short side that all images have."""
    if request.image_size is not None:
        return request.image_size
    height, width = shape[:2]
    if height is None or width is None:
        allowed = "images of many sizes: the side of the stored squares is needed, e.g. 64"
        raise InputError("config.image_size", None, allowed)
    return min(height, width)


def _read(part: _Part, size: int) -> Split:
    images = np.empty((part.num_records, size, size, 3), np.uint8)
    labels: list[int] = []
    for records in part.batches(part.source):
        squares = _squares([record[part.image_key] for record in records], size)
        images[len(labels) : len(labels) + len(records)] = squares
        labels += part.labels_of(records)
    return Split(images, part.known(labels))


def _read_labels(part: _Part) -> NDArray[np.int32] | None:
    if part.label_key is None:
        return None
    batches = part.batches(part.undecoded)
    return part.known([label for records in batches for label in part.labels_of(records)])


def _squares(images: list[NDArray[np.uint8]], size: int) -> NDArray[np.uint8]:
    if len({image.shape for image in images}) == 1:
        return square_arrays(np.stack(images), size)
    return np.concatenate([square_arrays(image[None], size) for image in images])
