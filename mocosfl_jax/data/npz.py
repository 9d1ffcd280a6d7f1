"""Arrays in one file: `npz:PATH`."""

import math
import os
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
from mocosfl_jax.data.fingerprint import fingerprint
from mocosfl_jax.data.pixels import square_arrays
from mocosfl_jax.errors import InputError
from mocosfl_jax.machine import machine_memory_bytes

T = TypeVar("T")

_NAMES = ("x_train", "y_train", "x_test", "y_test")
_SUFFIX = ".npy"


class _Header(NamedTuple):
    """shape, dtype: as the array says. num_bytes: of its data, and crc: as the zip file says."""

    shape: tuple[int, ...]
    dtype: np.dtype
    num_bytes: int
    crc: int

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}, CRC {self.crc:08x}"


class _File:
    """The arrays `_NAMES` of an npz file, whose every failure is an `InputError` that names it."""

    def __init__(self, path: Path):
        self.path = path
        self.members, self.headers = self._guard(self._read_headers)

    def array(self, name: str) -> NDArray[Any]:
        """Raises: InputError: a broken file, or an array larger than the machine's memory."""
        needed, machine = self.headers[name].num_bytes, machine_memory_bytes()
        fits = needed <= machine
        self.check(fits, name, f"{needed} bytes", f"the machine's memory has only {machine}")

        def read() -> NDArray[Any]:
            with zipfile.ZipFile(self.path) as archive, archive.open(name + _SUFFIX) as stream:
                return np.lib.format.read_array(stream, allow_pickle=False)

        return self._guard(read)

    def check(self, holds: bool, name: str, found: object, allowed: str) -> None:
        if not holds:
            raise InputError(f"{self.path}[{name}]", found, allowed)

    def check_length(self, name: str) -> None:
        """Raises: InputError: the header promises another number of bytes than there are."""
        header = self.headers[name]
        promised = math.prod(header.shape) * header.dtype.itemsize
        allowed = f"a header that fits the {header.num_bytes} bytes of the array is needed"
        found = f"{header.dtype} {header.shape}"
        self.check(promised == header.num_bytes, name, found, allowed)

    def _read_headers(self) -> tuple[list[str], dict[str, _Header]]:
        """Names of all arrays; of those that are read, the header."""
        if self.path.exists() and not self.path.is_file():  # a pipe would keep us waiting
            raise ValueError("no file")
        with zipfile.ZipFile(self.path) as archive:
            members = [name for name in archive.namelist() if name.endswith(_SUFFIX)]
            names = [member.removesuffix(_SUFFIX) for member in members]
            return names, {name: _read_header(archive, name) for name in _NAMES if name in names}

    def _guard(self, read: Callable[[], T]) -> T:
        try:
            return read()
        except Exception as error:  # of the file system, zip, zlib or the npy header
            reason = str(error) or type(error).__name__
            raise InputError(str(self.path), reason, "an intact npz file is needed") from None


def _read_header(archive: zipfile.ZipFile, name: str) -> _Header:
    """From the first bytes of the member and the table of the zip file."""
    member = archive.getinfo(name + _SUFFIX)
    with archive.open(member) as stream:
        if np.lib.format.read_magic(stream) == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        else:
            shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
        return _Header(shape, dtype, member.file_size - stream.tell(), member.CRC)


def prepare(request: Request) -> Prepared:
    """Checks shapes and dtypes from the headers, and reads the labels.

    The file holds x_train and, each optional, y_train, x_test and y_test. Labels are any integers
    from 0; they are mapped to 0, 1, ... in their order. Without x_test, a part is held out. All
    else in the file is ignored.

    Raises:
        InputError: no file, not an npz file, no x_train, a wrong shape, dtype, length or label, a
            header that does not fit its data, labels that do not fit memory; images of two sizes,
            unless `image_size` is set.
    """
    path = Path(os.path.expanduser(request.location))
    if not os.path.exists(path):
        raise InputError("config.dataset", request.dataset, "an existing file is needed")
    try:
        return _prepare(_File(path), request)
    except InputError as error:
        if str(error).startswith("config."):
            raise
        raise InputError("config.dataset", request.dataset, str(error)) from None


def _prepare(file: _File, request: Request) -> Prepared:
    """Raises: InputError: names the file, or a field."""
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
    fraction = 0.0 if has_test else request.fraction_held_out(labels.train is not None)
    train_ids, test_ids = hold_out(num_train, labels.train, fraction, request.seed, str(file.path))
    stored_test = file.headers["x_test"].shape[0] if has_test else 0
    arrays = {name: str(header) for name, header in file.headers.items()}
    info = DatasetInfo(
        name=request.dataset,
        num_train=len(train_ids),
        num_test=stored_test or len(test_ids),
        image_size=size,
        num_classes=labels.num_classes,
        class_names=labels.class_names,
        fingerprint=fingerprint("npz", num_train, stored_test, labels.class_names, arrays=arrays),
        held_out=len(test_ids) > 0,
    )

    def load() -> Dataset:
        train, test = Split(square_arrays(file.array("x_train"), size), labels.train), None
        if has_test:
            test = Split(square_arrays(file.array("x_test"), size), labels.test)
        elif len(test_ids):
            train, test = _part(train, train_ids), _part(train, test_ids)
        return Dataset(train, test, labels.class_names, info)

    train_labels = None if labels.train is None else labels.train[train_ids]
    return Prepared(info, load, lambda: train_labels)


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
    file.check(name in file.headers, name, None, f"this array is needed; found {file.members}")
    shape, dtype = file.headers[name].shape, file.headers[name].dtype
    file.check(dtype == np.uint8, name, str(dtype), "dtype uint8 is needed")
    holds = len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))
    allowed = "shape (n, h, w, 3), (n, h, w, 1) or (n, h, w), all above 0, is needed"
    file.check(holds and min(shape) > 0, name, shape, allowed)
    file.check_length(name)


def _read_labels(file: _File, split: str) -> NDArray[np.integer] | None:
    name, images = f"y_{split}", f"x_{split}"
    if name not in file.headers:
        return None
    shape, dtype = file.headers[name].shape, file.headers[name].dtype
    file.check(images in file.headers, name, shape, f"labels without images: {images} is needed")
    file.check(np.issubdtype(dtype, np.integer), name, str(dtype), "integers are needed")
    length = file.headers[images].shape[0]
    file.check(shape == (length,), name, shape, f"shape ({length},) is needed, one label an image")
    file.check_length(name)
    return file.array(name)
