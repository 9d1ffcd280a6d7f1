"""Image files in folders: `folder:PATH`."""

import errno
import os
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mocosfl_jax.data.dataset import Dataset, DatasetInfo, Prepared, Request, Split, hold_out
from mocosfl_jax.data.fingerprint import fingerprint
from mocosfl_jax.data.pixels import square_rgb
from mocosfl_jax.errors import InputError

_TRAIN = "train"
_TESTS = ("val", "validation", "test")  # the first that exists is the test split
_ALLOWED = "an image file that Pillow can read is needed"
_CHUNK = 64  # files that a thread takes at once
_NAMED = 5  # bad files that an error names


class _Picture(NamedTuple):
    """An image file and its size in bytes."""

    path: Path
    num_bytes: int


class _Files(NamedTuple):
    """pictures: of a split. labels: (n,) int32 or None. class_names: of the folders, or None."""

    pictures: list[_Picture]
    labels: NDArray[np.int32] | None
    class_names: tuple[str, ...] | None


def prepare(request: Request) -> Prepared:
    """Lists the images and reads all their headers.

    One of: PATH/train/<class>/... with PATH/val (else validation, else test)/<class>/...;
    PATH/<class>/...; or the same without class folders, which is a data set without labels. Without
    a test folder, a part is held out. Images may lie deeper in a class folder. Hidden files, files
    whose suffix is not one of Pillow's, and all that is neither a regular file nor a link to one
    are ignored.

    Raises:
        InputError: no image size, no images, images beside class folders, classes that differ
            between train and test, files that are no images.
    """
    size, root = _store_size(request), _root(request)
    try:
        train, test = _find_splits(root)
    except OSError as error:
        raise InputError(
            str(error.filename), error.strerror, "a readable folder is needed"
        ) from None
    listed = _fingerprint(root, train, test)  # before any are held out
    held_out = test is None
    if test is None:
        train, test = _hold_out(train, root, request)
    pictures, num_train = train.pictures + test.pictures, len(train.pictures)
    _for_each(pictures, root, _check_header)
    info = DatasetInfo(
        name=request.dataset,
        num_train=num_train,
        num_test=len(test.pictures),
        image_size=size,
        num_classes=len(train.class_names) if train.class_names else None,
        class_names=train.class_names,
        fingerprint=listed,
        held_out=held_out and len(test.pictures) > 0,
    )

    def load() -> Dataset:
        images = _decode(pictures, root, size)
        test_split = Split(images[num_train:], test.labels) if test.pictures else None
        return Dataset(Split(images[:num_train], train.labels), test_split, train.class_names, info)

    return Prepared(info, load, lambda: train.labels)


def _store_size(request: Request) -> int:
    if request.image_size is None:
        allowed = "the side of the stored squares is needed, e.g. 64"
        raise InputError("config.image_size", None, allowed)
    return request.image_size


def _root(request: Request) -> Path:
    root = Path(os.path.expanduser(request.location))
    if not os.path.isdir(root):
        raise InputError("config.dataset", request.dataset, "an existing folder is needed")
    return root


def _find_splits(root: Path) -> tuple[_Files, _Files | None]:
    names = {folder.name for folder in _folders(root)}
    _check_names(root, names)
    if _TRAIN not in names or not names <= {_TRAIN, *_TESTS}:
        return _list(root), None
    train = _list(root / _TRAIN)
    test_name = next((name for name in _TESTS if name in names), None)
    if test_name is None:
        return train, None
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


def _fingerprint(root: Path, train: _Files, test: _Files | None) -> dict[str, Any]:
    of_test = test.pictures if test else []
    pictures = {_name(picture, root): picture.num_bytes for picture in train.pictures + of_test}
    return fingerprint(
        "folder", len(train.pictures), len(of_test), train.class_names, pictures=pictures
    )


def _name(picture: _Picture, root: Path) -> str:
    return picture.path.relative_to(root).as_posix()


def _hold_out(files: _Files, root: Path, request: Request) -> tuple[_Files, _Files]:
    fraction = request.fraction_held_out(files.labels is not None)
    parts = hold_out(len(files.pictures), files.labels, fraction, request.seed, str(root))
    train, test = (
        _Files(
            [files.pictures[i] for i in ids],
            None if files.labels is None else files.labels[ids],
            files.class_names,
        )
        for ids in parts
    )
    return train, test


def _list(root: Path) -> _Files:
    """The images of one split, by class and name."""
    folders = _folders(root)
    loose = _pictures(root.iterdir())
    if loose and folders:
        raise InputError(
            str(root),
            f"{loose[0].path.name} beside the folder {folders[0].name}",
            "either images or class folders are needed",
        )
    if loose:
        return _Files(loose, None, None)
    if not folders:
        raise InputError(
            str(root), "no images", "images, or a folder of images a class, are needed"
        )
    pictures: list[_Picture] = []
    counts = []
    for folder in folders:
        of_class = _pictures(_walk(folder))
        if not of_class:
            raise InputError(str(folder), "no images", "a class folder needs at least one image")
        pictures += of_class
        counts.append(len(of_class))
    labels = np.repeat(np.arange(len(folders), dtype=np.int32), counts)
    return _Files(pictures, labels, tuple(folder.name for folder in folders))


def _folders(root: Path) -> list[Path]:
    return [path for path in sorted(root.iterdir()) if path.is_dir() and path.name[0] != "."]


def _walk(root: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise error

    for folder, subfolders, names in os.walk(root, onerror=fail):
        subfolders[:] = [name for name in subfolders if name[0] != "."]
        yield from (Path(folder, name) for name in names)


def _pictures(paths: Iterable[Path]) -> list[_Picture]:
    """The image files among the paths, sorted."""
    sizes = ((path, _num_bytes(path)) for path in sorted(filter(_has_image_name, paths)))
    return [_Picture(path, size) for path, size in sizes if size is not None]


def _has_image_name(path: Path) -> bool:
    file_format = Image.registered_extensions().get(path.suffix.lower())
    readable = file_format in Image.OPEN or file_format == "MPO"  # JPEG's reader takes these
    return path.name[0] != "." and readable


def _num_bytes(path: Path) -> int | None:
    """Size of a regular file; None for all else, as opening a FIFO would wait forever."""
    try:
        status = path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):  # a link that leads nowhere
            return None
        raise
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _decode(pictures: list[_Picture], root: Path, size: int) -> NDArray[np.uint8]:
    images = np.empty((len(pictures), size, size, 3), np.uint8)

    def store(place: int, picture: Image.Image) -> None:
        images[place] = square_rgb(picture, size)

    _for_each(pictures, root, store)
    return images


def _check_header(_: int, picture: Image.Image) -> None:
    if min(picture.size) < 1:
        raise ValueError(f"size {picture.size}")


def _for_each(
    pictures: list[_Picture], root: Path, use: Callable[[int, Image.Image], None]
) -> None:
    """Opens all pictures on a pool of threads and calls `use(place, image)`.

    Raises: InputError: names those that fail, once all have been tried.
    """

    def attempt(places: range) -> list[tuple[int, str]]:
        reasons = [(place, _failure(pictures[place].path, place, use)) for place in places]
        return [(place, reason) for place, reason in reasons if reason is not None]

    chunks = [
        range(start, min(start + _CHUNK, len(pictures)))
        for start in range(0, len(pictures), _CHUNK)
    ]
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice as many raise
        failures = [failure for chunk in pool.map(attempt, chunks) for failure in chunk]
    if failures:
        raise _unreadable(sorted((pictures[place], reason) for place, reason in failures), root)


def _failure(path: Path, place: int, use: Callable[[int, Image.Image], None]) -> str | None:
    """Why the picture cannot be used; None if it can."""
    try:
        with Image.open(path) as image:
            use(place, image)
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, struct.error, ...
        return str(error) or type(error).__name__
    return None


def _unreadable(failures: list[tuple[_Picture, str]], root: Path) -> InputError:
    picture, reason = failures[0]
    if len(failures) == 1:
        return InputError(str(picture.path), reason, _ALLOWED)
    names = [_name(picture, root) for picture, _ in failures[:_NAMED]]
    named = ", ".join(names if len(failures) <= _NAMED else [*names, "..."])
    allowed = f"cannot be read ({named}); the first fails with: {reason}; {_ALLOWED}"
    return InputError(str(root), f"{len(failures)} pictures", allowed)
