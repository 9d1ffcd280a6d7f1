"""Arrays in one file: `npz:PATH`."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from mocosfl_jax.data.dataset import (
    Dataset,
    DatasetInfo,
    Labels,
    Prepared,
    Request,
    Split,
    contiguous_labels,
    hold_out,
)
from mocosfl_jax.data.pixels import square_arrays
from mocosfl_jax.errors import InputError

T = TypeVar("T")


class _Header(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype


class _File:
    """An npz file whose every failure is an `InputError` that names it."""

    def __init__(self, path: Path):
        self.path = path
        self.headers: dict[str, _Header] = self._guard(self._read_headers)

    def array(self, name: str) -> NDArray[Any]:
        def read() -> NDArray[Any]:
            with np.load(self.path, allow_pickle=False) as arrays:
                return arrays[name]

        return self._guard(read)

    def check(self, holds: bool, name: str, found: object, allowed: str) -> None:
        if not holds:
            raise InputError(f"{self.path}[{name}]", found, allowed)

    def _read_headers(self) -> dict[str, _Header]:
        """Shape and dtype of each array, from the first bytes of each member."""
        headers = {}
        with zipfile.ZipFile(self.path) as archive:
            for member in archive.namelist():
                with archive.open(member) as stream:
                    if np.lib.format.read_magic(stream) == (1, 0):
                        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
                    else:
                        shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
                headers[member.removesuffix(".npy")] = _Header(shape, dtype)
        return headers

    def _guard(self, read: Callable[[], T]) -> T:
        try:
            return read()
        except Exception as error:  # of the file system, zip, zlib or the npy header
            reason = str(error) or type(error).__name__
            raise InputError(str(self.path), reason, "an intact npz file is needed") from None


def prepare(request: Request) -> Prepared:
    """Checks shapes and dtypes from the headers, and reads the labels.

    The file holds x_train and, each optional, y_train, x_test and y_test. Labels are any integers
    from 0; they are mapped to 0, 1, ... in their order. Without x_test, a part is held out. Other
    arrays are ignored.

    Raises:
        InputError: not an npz file, no x_train, a wrong shape, dtype, length or label; images of
            two sizes, unless `image_size` is set.
    """
    file = _File(Path(request.location).expanduser())
    _check_images(file, "x_train")
    has_test = "x_test" in file.headers
    if has_test:
        _check_images(file, "x_test")
    labels = contiguous_labels(
        _read_labels(file, "train"), _read_labels(file, "test"), str(file.path)
    )
    return _prepare_checked(file, labels, has_test, _store_size(file, request), request)


def _prepare_checked(
    file: _File, labels: Labels, has_test: bool, size: int, request: Request
) -> Prepared:
    num_train = file.headers["x_train"].shape[0]
    fraction = 0.0 if has_test else request.holdout_fraction
    train_ids, test_ids = hold_out(num_train, labels.train, fraction, request.seed, str(file.path))
    num_test = file.headers["x_test"].shape[0] if has_test else len(test_ids)
    info = DatasetInfo(request.dataset, len(train_ids), num_test, size, labels.num_classes)

    def load() -> Dataset:
        train, test = Split(square_arrays(file.array("x_train"), size), labels.train), None
        if has_test:
            test = Split(square_arrays(file.array("x_test"), size), labels.test)
        elif num_test:
            train, test = _part(train, train_ids), _part(train, test_ids)
        return Dataset(train, test, labels.class_names, info)

    return Prepared(info, load)


def _part(split: Split, ids: NDArray[np.int64]) -> Split:
    return Split(split.images[ids], None if split.labels is None else split.labels[ids])


def _store_size(file: _File, request: Request) -> int:
    """`image_size`, or the short side that all images have."""
    if request.image_size is not None:
        return request.image_size
    sizes = {
        file.headers[name].shape[1:3] for name in ("x_train", "x_test") if name in file.headers
    }
    if len(sizes) > 1:
        allowed = f"the side of stored squares is needed: x_train and x_test have {sorted(sizes)}"
        raise InputError("config.image_size", None, allowed)
    return min(sizes.pop())


def _check_images(file: _File, name: str) -> None:
    file.check(
        name in file.headers, name, None, f"this array is needed; found {list(file.headers)}"
    )
    shape, dtype = file.headers[name]
    file.check(dtype == np.uint8, name, str(dtype), "dtype uint8 is needed")
    holds = len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))
    allowed = "shape (n, h, w, 3), (n, h, w, 1) or (n, h, w), all above 0, is needed"
    file.check(holds and min(shape) > 0, name, shape, allowed)


def _read_labels(file: _File, split: str) -> NDArray[np.integer] | None:
    name, images = f"y_{split}", f"x_{split}"
    if name not in file.headers:
        return None
    shape, dtype = file.headers[name]
    file.check(images in file.headers, name, shape, f"labels without images: {images} is needed")
    file.check(np.issubdtype(dtype, np.integer), name, str(dtype), "integers are needed")
    length = file.headers[images].shape[0]
    file.check(shape == (length,), name, shape, f"shape ({length},) is needed, one label an image")
    return file.array(name)
