"""The file of a trained encoder: its weights, and what one needs to know to use them."""

import dataclasses
import json
import os
import reprlib
from collections.abc import Collection
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import jax
import numpy as np
import xxhash
from safetensors import safe_open
from safetensors.numpy import save

from mocosfl_jax import __version__
from mocosfl_jax.config import Config, Resolved
from mocosfl_jax.config.checks import check_fields
from mocosfl_jax.config.defences import DEFENCES, EVALUATED
from mocosfl_jax.config.network import model_of
from mocosfl_jax.config.stored import config_from_json
from mocosfl_jax.errors import InputError
from mocosfl_jax.machine import machine_memory_bytes
from mocosfl_jax.models.backbones import default_fields
from mocosfl_jax.models.contract import OPTIONAL_FIELDS
from mocosfl_jax.models.split import SplitModel, Variables
from mocosfl_jax.run.storage import write_bytes

FILE_NAME = "encoder.safetensors"

_METADATA = "mocosfl_jax"  # the one key, as safetensors writes several in random order
_FIELDS = (
    "backbone",
    "blocks_per_stage",
    "width",
    "stem",
    "cut",
    "bottleneck",
    "head",
    "head_width",
    "image_size",
    "compute_dtype",
    "mean",
    "std",
)
"""The fields of `Config` that say how an encoder answers. Its file holds these and no others, but
for the sections `EVALUATED` that are not off."""

_HEAD = "server/head/"
_ANY_HEAD = {"head": "V1", "head_width": 128}
"""Stands for the fields of a file without a head, whatever they say: none is read."""


class EncoderFile(NamedTuple):
    """What an encoder file holds.

    config: a config that holds in the fields that encoding needs. model: its network. variables:
    None for each leaf of a head that is missing. step: training steps behind it; None: the file
    says none. headless: whether the head is missing; its fields in `config` then mean nothing.
    """

    config: Config
    model: SplitModel
    variables: Variables
    step: int | None
    headless: bool


class _Description(NamedTuple):
    """What the metadata of a file says. fields: of `Config`, by name. step: of training. version:
    of the package that wrote it; both None in a file of version 0.1.0."""

    fields: dict[str, Any]
    step: int | None
    version: str | None


def save_encoder(path: Path, config: Resolved, variables: Variables, step: int) -> None:
    """Replaces an encoder file at once: a reader sees the old one or the new one.

    It holds the weights (float32, named `client/unit0/conv/kernel` and so on; HWIO kernels) and, as
    metadata, what encoding needs: the fields of the network, mean and std, the step, the version.

    Args:
      path: of the file.
      config: of the run.
      variables: of the trained network.
      step: training steps behind it.
    Raises: StorageError: the file cannot be written; the one that was there stays.
    """
    fields = {name: getattr(config, name) for name in _FIELDS} | _sections_of(config)
    description = _Description(fields, step, __version__)
    tensors = {name: np.ascontiguousarray(leaf) for name, leaf in by_name(variables).items()}
    content = save(tensors, {_METADATA: json.dumps(description._asdict())})
    write_bytes(path, content)


def _sections_of(config: Config) -> dict[str, dict[str, Any]]:
    """Values of the sections that an encoder depends on, by name, without those that are off."""
    found: dict[str, Any] = {name: config.section_or_default(DEFENCES[name]) for name in EVALUATED}
    return {
        name: dataclasses.asdict(section)
        for name, section in found.items()
        if section != DEFENCES[name]()
    }


def read_encoder(path: str | Path, headless: bool = False, field: str | None = None) -> EncoderFile:
    """Reads the encoder of a run, of this version or an earlier one.

    Args:
      path: a run's folder, or an `encoder.safetensors` file.
      headless: whether the file may lack the head.
      field: of the config that has the path, which errors name; None: they name the file.
    Raises: InputError: there is none, it is damaged, or only a newer version can read it.
    """
    file = file_of(path)

    def refused(found: str, allowed: str) -> InputError:
        return (
            InputError(str(file), found, allowed)
            if field is None
            else InputError(field, str(path), f"{file} is {found}: {allowed}")
        )

    if os.path.exists(file) and not os.path.isfile(file):  # a pipe would keep us waiting
        raise refused("no regular file", "an encoder file is needed")
    try:
        with safe_open(file, framework="numpy") as stored:
            description = _description_in(stored.metadata())
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        if headless and not any(name.startswith(_HEAD) for name in tensors):
            description = description._replace(fields={**description.fields, **_ANY_HEAD})
        else:
            headless = False
        config = _config_of(description)
        model = model_of(config)
        variables = _arrange(tensors, model, _HEAD if headless else None)
    except FileNotFoundError:
        raise refused("missing", "a run writes it with its checkpoints") from None
    except Exception as error:  # of safetensors, JSON, checks, or JAX tracing what cannot be
        reason = str(error) or type(error).__name__
        allowed = f"an encoder of this version or an earlier one is needed: {reason}"
        raise refused("unusable", allowed) from error
    return EncoderFile(config, model, variables, description.step, headless)


def file_of(path: str | Path) -> Path:
    """The encoder file of a run's folder, or the file itself."""
    path = Path(os.path.expanduser(path))
    return path / FILE_NAME if os.path.isdir(path) else path


def encoder_step(path: Path) -> int | None:
    """The training step of an encoder file; None: no such file, or one that says none.

    Reads the file's metadata alone.
    """
    try:
        with safe_open(path, framework="numpy") as stored:
            return _description_in(stored.metadata()).step
    except Exception:  # whatever is wrong with it, it says no step
        return None


def weights_digest(path: Path) -> str | None:
    """Of the names and bytes of an encoder file's tensors, 16 hexadecimal digits; None: no such
    file, or one that cannot be read."""
    total = xxhash.xxh3_64()
    try:
        with safe_open(path, framework="numpy") as stored:
            for name in sorted(stored.keys()):
                total.update(name.encode())
                total.update(stored.get_tensor(name).tobytes())
    except Exception:  # whatever is wrong with it, it is not what was written
        return None
    return total.hexdigest()


def _description_in(metadata: dict[str, str] | None) -> _Description:
    """Raises: ValueError: the metadata do not describe an encoder."""
    texts = metadata or {}
    if _METADATA in texts:
        values = json.loads(texts[_METADATA])
    else:  # version 0.1.0 stored the whole config of the run
        config = json.loads(texts.get("config", "{}"))
        values = {"fields": {name: config[name] for name in _FIELDS if name in config}}
    fields, step, version = (values.get(name) for name in _Description._fields)
    if not fields or not isinstance(fields, dict) or type(step) not in (int, NoneType):
        raise ValueError("its metadata do not describe an encoder")
    return _Description(fields, step, version)


def _config_of(description: _Description) -> Config:
    """A config that holds in the fields that encoding needs; the others have no meaning.

    Raises: ValueError: a field is unknown, missing, or of an impossible value.
    """
    fields, version = description.fields, description.version
    for name in fields:
        if name not in (*_FIELDS, *EVALUATED):
            versions = f"{version}, this is {__version__}"
            raise ValueError(f"a newer version wrote the field {name!r} ({versions})")
    config = config_from_json(fields, "metadata")
    _check_present(config, set(_FIELDS) - set(OPTIONAL_FIELDS))
    check_fields(config)
    _check_present(config, default_fields(config.backbone, config.image_size).keys())
    if 12 * config.image_size**2 > machine_memory_bytes():
        raise ValueError(f"field 'image_size' is {config.image_size}: no image of it fits memory")
    return config


def _check_present(config: Config, names: Collection[str]) -> None:
    """Raises: ValueError: names a field that is unset."""
    for name in sorted(names):
        if getattr(config, name) is None:
            raise ValueError(f"field {name!r} is missing")


def _arrange(
    tensors: dict[str, np.ndarray], model: SplitModel, without: str | None = None
) -> Variables:
    """The variables of a network.

    Args: without: prefix of names that need not be there; their leaves are None.
    Raises: ValueError: names the first tensor of another name, shape or dtype than the network's.
    """
    needed = model.shapes()
    named = by_name(needed)
    left_out = {name for name in named if without is not None and name.startswith(without)}
    for name in sorted((named.keys() - left_out) | tensors.keys()):
        found, wanted = (
            brief(part[name]) if name in part else "no tensor" for part in (tensors, named)
        )
        if found != wanted:
            raise ValueError(f"{name} is {found}, the network needs {wanted}")
    return jax.tree.unflatten(jax.tree.structure(needed), [tensors.get(name) for name in named])


def by_name(variables: Variables) -> dict[str, Any]:
    """The leaves, in order, under names such as `client/unit0/conv/kernel`."""
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}


def brief(value: Any) -> str:
    """A value in a few words: dtype and shape of an array."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype} {tuple(value.shape)}"
    return reprlib.repr(value)
