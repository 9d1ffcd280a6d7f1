"""Data sets by name: the one entry to all sources.

`synthetic`, `folder:PATH`, `npz:PATH`, else the name of a prepared TensorFlow data set.
"""

from typing import TypedDict, Unpack

from mocosfl_jax.data import folder, npz, synthetic, tfds
from mocosfl_jax.data.dataset import Dataset, DatasetInfo, Prepared, Request, Split, channel_stats
from mocosfl_jax.errors import InputError
from mocosfl_jax.machine import machine_memory_bytes

__all__ = [
    "Dataset",
    "DatasetInfo",
    "Options",
    "Prepared",
    "Split",
    "channel_stats",
    "check_memory",
    "inspect_dataset",
    "load_dataset",
    "prepare_dataset",
]


class Options(TypedDict):
    """How a data set is read; all are needed."""

    data_dir: str | None  # where TFDS data sets lie, None: TFDS's default; others do not use it
    train_split: str | None  # TFDS only; slices allowed (`train[:5000]`); None: `train`
    test_split: str | None  # TFDS only; None: `test`, else `validation`
    image_size: int | None  # side S of the stored square, pixels; None: the images' own short side
    # of a folder or npz without a test split, in [0, 1); None: 0.1 with labels, else no test split
    holdout_fraction: float | None
    seed: int  # of the hold-out


def prepare_dataset(dataset: str, **options: Unpack[Options]) -> Prepared:
    """Checks everything that can be checked without decoding an image's pixels.

    Args:
        dataset: `synthetic` (`synthetic.synthetic_split`), `folder:PATH` (`folder.prepare`),
            `npz:PATH` (`npz.prepare`), or the name of a prepared TFDS data set (`tfds.prepare`).
        **options: see `Options`.

    Returns: what is known, and how to read the rest. `load` resizes images of another size by
        their short side and crops their centre (`pixels.square_rgb`); it raises `InputError` for
        an image that cannot be decoded, or more than fits memory.

    Raises:
        InputError: names the field or file that cannot be used.
    """
    scheme, _, path = dataset.partition(":")
    is_file = scheme in ("folder", "npz")
    request = Request(dataset=dataset, location=path if is_file else dataset, **options)
    is_tfds = not is_file and dataset != "synthetic"
    _check(request, is_tfds)
    sources = {"folder": folder, "npz": npz, "synthetic": synthetic}
    prepared = (tfds if is_tfds else sources[scheme]).prepare(request)

    def load() -> Dataset:
        check_memory(prepared.info)
        return prepared.load()

    return prepared._replace(load=load)


def inspect_dataset(dataset: str, **options: Unpack[Options]) -> DatasetInfo:
    """`prepare_dataset(...).info`."""
    return prepare_dataset(dataset, **options).info


def load_dataset(dataset: str, **options: Unpack[Options]) -> Dataset:
    """`prepare_dataset(...).load()`."""
    return prepare_dataset(dataset, **options).load()


def check_memory(info: DatasetInfo) -> None:
    """Raises: InputError: the decoded images take more than the machine's memory."""
    number, size = info.num_train + info.num_test, info.image_size
    needed, machine = number * size**2 * 3, machine_memory_bytes()
    if needed > machine:
        allowed = f"{number} images take {needed / 1e9:.0f} GB, the machine has {machine / 1e9:.0f}"
        raise InputError("config.image_size", size, allowed)


def _check(request: Request, is_tfds: bool) -> None:
    if not request.location:
        raise InputError("config.dataset", request.dataset, "a name, or folder:PATH, or npz:PATH")
    if request.image_size is not None and request.image_size < 1:
        raise InputError("config.image_size", request.image_size, "at least 1 pixel is needed")
    fraction = request.holdout_fraction
    if fraction is not None and not 0 <= fraction < 1:
        allowed = "a number in [0, 1), or None for the rule, is needed"
        raise InputError("config.holdout_fraction", fraction, allowed)
    for field in ("train_split", "test_split"):
        value = getattr(request, field)
        if value is not None and not is_tfds:
            allowed = (
                f"{request.dataset} is no TFDS data set: its splits have no names; leave it unset"
            )
            raise InputError(f"config.{field}", value, allowed)
