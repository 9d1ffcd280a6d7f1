"""Arrays in one file: `npz:PATH`."""

import zipfile
from pathlib import Path
from typing import NamedTuple

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

_IMAGES = "uint8 of shape (n, h, w, 3), (n, h, w, 1) or (n, h, w) with n, h, w > 0"


class _Header(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype


class _File:
    """An npz file whose every failure is an `InputError` that names it."""

    def __init__(self, path: Path):
        self.path = path
        self.headers = self._guard(self._read_headers)

    def array(self, name: str) -> NDArray:
        def read() -> NDArray:
            with np.load(self.path, allow_pickle=False) as arrays:
                return arrays[name]

        return self._guard(read)

    def refuse(self, name: str, found: object, allowed: str) -> InputError:
        return InputError(f"{self.path}[{name}]", found, allowed)

    def _read_headers(self) -> dict[str, _Header]:
        """Shape and dtype of each array, from the first bytes of each member."""
        headers = {}
        with zipfile.ZipFile(self.path) as archive:
            for member in archive.namelist():
                with archive.open(member) as stream:
                    version = np.lib.format.read_magic(stream)
                    read = (
                        np.lib.format.read_array_header_1_0
                        if version == (1, 0)
                        else np.lib.format.read_array_header_2_0
                    )
                    shape, _, dtype = read(stream)
                headers[member.removesuffix(".npy")] = _Header(shape, dtype)
        return headers

    def _guard(self, read):
        try:
            return read()
        except Exception as error:  # of zip, zlib, the npy header or the file system
            raise InputError(
                str(self.path), str(error) or type(error).__name__, "an npz file is needed"
            ) from None


def prepare(request: Request) -> Prepared:
    """Checks shapes and dtypes from the headers, and reads the labels.

    The file holds x_train and, each optional, y_train, x_test and y_test. Labels are any integers;
    they are mapped to 0, 1, ... in their order. Without x_test, a part is held out. Other arrays
    are ignored.

    Raises:
        InputError: not an npz file, no x_train, a wrong shape, dtype, length or label; images of
            two sizes, unless `image_size` is set.
    """
    file = _File(Path(request.location).expanduser())
    sizes = [_check_images(file, "x_train")]
    if "x_test" in file.headers:
        sizes.append(_check_images(file, "x_test"))
    size = request.image_size
    if size is None:
        if len(set(sizes)) > 1:
            allowed = f"config.image_size, as x_train and x_test differ: {sizes[0]}, {sizes[1]}"
            raise InputError("config.image_size", None, allowed)
        size = min(sizes[0])
    labels = contiguous_labels(
        _labels(file, "y_train", "x_train"), _labels(file, "y_test", "x_test"), str(file.path)
    )
    return _prepared(file, labels, size, request)


def _prepared(file: _File, labels: Labels, size: int, request: Request) -> Prepared:
    num_train = file.headers["x_train"].shape[0]
    has_test = "x_test" in file.headers
    train_ids, test_ids = np.arange(num_train), None
    if not has_test:
        fraction, seed = request.holdout_fraction, request.seed
        train_ids, test_ids = hold_out(num_train, labels.train, fraction, seed, str(file.path))
    num_test = file.headers["x_test"].shape[0] if has_test else len(test_ids)
    info = DatasetInfo(request.dataset, len(train_ids), num_test, size, labels.num_classes)

    def load() -> Dataset:
        x_train = square_arrays(file.array("x_train"), size)
        if has_test:
            train = Split(x_train, labels.train)
            test = Split(square_arrays(file.array("x_test"), size), labels.test)
            return Dataset(train, test, labels.class_names, info)
        return Dataset(_part(x_train, labels.train, train_ids), None, labels.class_names, info)

    return Prepared(info, load)
