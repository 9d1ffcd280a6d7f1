"""Image files in folders: `folder:PATH`."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mocosfl_jax.data.dataset import Dataset, DatasetInfo, Prepared, Request, Split, hold_out
from mocosfl_jax.data.pixels import square_rgb
from mocosfl_jax.errors import InputError

_TRAIN = "train"
_TESTS = ("val", "validation", "test")  # the first that exists is the test split
_ALLOWED = "an image file that Pillow can read is needed"
_CHUNK = 64  # files that a thread takes at once


class _Files(NamedTuple):
    """paths: the image files. labels: (n,) int32 or None. class_names: of the folders, or None."""

    paths: list[Path]
    labels: NDArray[np.int32] | None
    class_names: tuple[str, ...] | None


def prepare(request: Request) -> Prepared:
    """Lists the images and reads all their headers.

    One of: PATH/train/<class>/... with PATH/val (else validation, else test)/<class>/...;
    PATH/<class>/...; or the same without class folders, which is a data set without labels. Without
    a test folder, a part is held out. Images may lie deeper in a class folder. Hidden files and
    files whose suffix is not one of Pillow's are ignored.

    Raises:
        InputError: no image size, no images, images beside class folders, classes that differ
            between train and test, a file that is no image.
    """
    if request.image_size is None:
        raise InputError(
            "config.image_size",
            None,
            "the side of the stored squares is needed, e.g. 64",
        )
    root = Path(request.location).expanduser()
    if not root.is_dir():
        raise InputError("config.dataset", request.dataset, "an existing folder is needed")
    try:
        train, test = _find_splits(root, request)
    except OSError as error:
        raise InputError(
            str(error.filename), error.strerror, "a readable folder is needed"
        ) from None
    for _ in _in_threads(_check_header, train.paths + (test.paths if test else [])):
        pass
    size = request.image_size
    info = DatasetInfo(
        name=request.dataset,
        num_train=len(train.paths),
        num_test=len(test.paths) if test else 0,
        image_size=size,
        num_classes=len(train.class_names) if train.class_names else None,
    )

    def load() -> Dataset:
        test_split = _decode(test, size) if test else None
        return Dataset(_decode(train, size), test_split, train.class_names, info)

    return Prepared(info, load)


def _find_splits(root: Path, request: Request) -> tuple[_Files, _Files | None]:
    names = {folder.name for folder in _folders(root)}
    _check_names(root, names)
    if _TRAIN not in names or not names <= {_TRAIN, *_TESTS}:
        return _hold_out(_list(root), root, request)
    train = _list(root / _TRAIN)
    test_name = next((name for name in _TESTS if name in names), None)
    if test_name is None:
        return _hold_out(train, root / _TRAIN, request)
    test = _list(root / test_name)
    if train.class_names != test.class_names:
        differing = sorted(set(train.class_names or ()) ^ set(test.class_names or ()))
        raise InputError(
            str(root / test_name),
            differing[0],
            f"the class folders of {root / _TRAIN} are needed, no more and no fewer",
        )
    return train, test


def _check_names(root: Path, names: set[str]) -> None:
    """Splits must not pass for classes: no other folder, and no other spelling, beside them.

    Raises: InputError: names such a folder.
    """
    spelled = {name.lower() for name in names}
    if _TRAIN not in spelled or not spelled & set(_TESTS):
        return
    strays = sorted(names - {_TRAIN, *_TESTS})
    if strays:
        allowed = f"beside {_TRAIN} only {' or '.join(_TESTS)}, in lower case, or classes alone"
        raise InputError(str(root / strays[0]), "a folder", allowed)


def _hold_out(files: _Files, where: Path, request: Request) -> tuple[_Files, _Files | None]:
    fraction, seed = request.holdout_fraction, request.seed
    parts = hold_out(len(files.paths), files.labels, fraction, seed, str(where))
    train, test = (
        _Files(
            [files.paths[i] for i in ids],
            None if files.labels is None else files.labels[ids],
            files.class_names,
        )
        for ids in parts
    )
    return train, test if test.paths else None


def _list(root: Path) -> _Files:
    """The images of one split, by class and name."""
    folders = _folders(root)
    loose = [path for path in sorted(root.iterdir()) if path.is_file() and _is_image(path.name)]
    if loose and folders:
        raise InputError(
            str(root),
            f"{loose[0].name} beside the folder {folders[0].name}",
            "either images or class folders are needed",
        )
    if loose:
        return _Files(loose, None, None)
    if not folders:
        raise InputError(
            str(root), "no images", "images, or a folder of images a class, are needed"
        )
    paths: list[Path] = []
    counts = []
    for folder in folders:
        of_class = sorted(_walk(folder))
        if not of_class:
            raise InputError(str(folder), "no images", "a class folder needs at least one image")
        paths += of_class
        counts.append(len(of_class))
    labels = np.repeat(np.arange(len(folders), dtype=np.int32), counts)
    return _Files(paths, labels, tuple(folder.name for folder in folders))


def _folders(root: Path) -> list[Path]:
    return [path for path in sorted(root.iterdir()) if path.is_dir() and path.name[0] != "."]


def _walk(root: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise error

    for folder, subfolders, names in os.walk(root, onerror=fail):
        subfolders[:] = [name for name in subfolders if name[0] != "."]
        yield from (Path(folder, name) for name in names if _is_image(name))


def _is_image(name: str) -> bool:
    file_format = Image.registered_extensions().get(os.path.splitext(name)[1].lower())
    return name[0] != "." and file_format in Image.OPEN


def _in_threads(work: Callable[[Path], Any], paths: list[Path]) -> Iterator[Any]:
    """Applies `work` to each path, in order, on a pool of threads."""
    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
    with ThreadPoolExecutor() as pool:
        for results in pool.map(lambda chunk: [work(path) for path in chunk], chunks):
            yield from results


def _decode(files: _Files, size: int) -> Split:
    images = np.empty((len(files.paths), size, size, 3), np.uint8)

    def read(path: Path) -> NDArray[np.uint8]:
        return _open(path, lambda image: square_rgb(image, size))

    for target, image in zip(images, _in_threads(read, files.paths), strict=True):
        target[...] = image
    return Split(images, files.labels)


def _check_header(path: Path) -> None:
    def check(image: Image.Image) -> None:
        if min(image.size) < 1:
            raise ValueError(f"size {image.size}")

    _open(path, check)


def _open(path: Path, use: Callable[[Image.Image], Any]) -> Any:
    """use(image), any failure as an `InputError` that names the file."""
    try:
        with Image.open(path) as image:
            return use(image)
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, struct.error, ...
        raise InputError(str(path), str(error) or type(error).__name__, _ALLOWED) from None
