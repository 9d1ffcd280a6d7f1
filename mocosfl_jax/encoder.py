"""A trained encoder as one file, and as a function from images to features."""

import dataclasses
import json
import os
import reprlib
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import jax
import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save

from mocosfl_jax import __version__
from mocosfl_jax.config import Config, Resolved
from mocosfl_jax.config.checks import check_fields
from mocosfl_jax.config.network import model_of
from mocosfl_jax.config.stored import config_from_json
from mocosfl_jax.data.pixels import square_rgb
from mocosfl_jax.errors import InputError
from mocosfl_jax.evaluation.features import encode
from mocosfl_jax.machine import machine_memory_bytes
from mocosfl_jax.models.backbones import default_fields
from mocosfl_jax.models.contract import OPTIONAL_FIELDS
from mocosfl_jax.models.split import Encoded, SplitModel, Variables
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
"""The fields of `Config` that say how an encoder answers; its file holds these and no others."""

AnyImage = str | os.PathLike[str] | Image.Image | np.ndarray


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A trained network; call it on images to get features.

    model, variables: the network. mean, std: of each channel, in [0, 1], of its training images.
    batch_size: images encoded at once. step: training steps behind it; None: the file says none.
    """

    model: SplitModel
    variables: Variables
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch_size: int = 256
    step: int | None = None

    def __call__(self, images: Sequence[AnyImage] | np.ndarray) -> np.ndarray:
        """Pooled backbone features (n, F), float32.

        Args:
          images: a sequence of at least one image of any size, or uint8 RGB (n, H, W, 3). An image
            is the path of a file, a Pillow image, or a uint8 array: RGB (H, W, 3), RGBA (H, W, 4)
            or grey (H, W) or (H, W, 1). Each is made a square of the training size as training
            itself makes it: upright, 8-bit RGB, resized by its short side, centre-cropped.
        Raises: InputError: names an image that is none of these, or a file that cannot be read.
        """
        return np.asarray(self._encode(images).features)

    def embed(self, images: Sequence[AnyImage] | np.ndarray) -> np.ndarray:
        """Unit embeddings (n, D), float32: what training contrasts, for similarity search.

        Args, Raises: those of a call.
        """
        embedding = np.asarray(self._encode(images).embedding)
        return embedding / np.linalg.norm(embedding, axis=1, keepdims=True)

    def _encode(self, images: Sequence[AnyImage] | np.ndarray) -> Encoded:
        _check_several(images)
        size = self.model.image_size
        squares = [_square(f"images[{i}]", image, size) for i, image in enumerate(images)]
        return encode(
            self.model.encode,
            self.variables,
            np.stack(squares),
            self.mean,
            self.std,
            self.batch_size,
        )


# --------------------------------------------------------------------------------------- images


def _check_several(images: Any) -> None:
    """Refuses one image, no image, and what is neither a sequence nor an array."""
    if isinstance(images, Sequence) and not isinstance(images, str | bytes | memoryview):
        several = len(images) > 0
    else:
        several = getattr(images, "ndim", 0) in (1, 4) and len(images) > 0
    if not several:
        allowed = "a sequence of at least one image, or an array (n, H, W, 3), is needed"
        raise InputError("images", _brief(images), allowed)


def _square(where: str, image: Any, size: int) -> NDArray[np.uint8]:
    """uint8 (size, size, 3) of one image; `where` names it unless it is a file."""
    try:
        if isinstance(image, str | os.PathLike):
            where = os.fspath(image)
            if not os.path.isfile(image):  # a pipe would keep us waiting
                raise ValueError("no such file")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # as in training
                with Image.open(image) as picture:
                    return _square_picture(picture, size)
        if isinstance(image, Image.Image):
            return _square_picture(image, size)
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, struct.error, ...
        found = str(error) or type(error).__name__
        raise InputError(where, found, "an image that Pillow can read is needed") from None
    return _square_array(where, image, size)


def _square_picture(picture: Image.Image, size: int) -> NDArray[np.uint8]:
    if min(picture.size) < 1:
        raise ValueError(f"size {picture.size}")
    return square_rgb(picture, size)


def _square_array(where: str, image: Any, size: int) -> NDArray[np.uint8]:
    try:
        array = np.asarray(image)
    except Exception:  # rows of different lengths, a tensor on another device, ...
        array = np.empty(0)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    channels = array.shape[2:] or (1,)
    if array.dtype != np.uint8 or array.ndim < 2 or channels not in ((1,), (3,), (4,)):
        allowed = "a path, a Pillow image or uint8 (H, W, 3), (H, W, 4) or (H, W) is needed"
        raise InputError(where, _brief(image), allowed)
    if 0 in array.shape:
        raise InputError(where, _brief(image), "at least one pixel is needed")
    if array.shape == (size, size, 3):
        return array
    return square_rgb(Image.fromarray(array), size)


def _brief(value: Any) -> str:
    """A value in a few words: dtype and shape of an array."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype} {tuple(value.shape)}"
    return reprlib.repr(value)


# ----------------------------------------------------------------------------------------- file


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
    description = _Description({name: getattr(config, name) for name in _FIELDS}, step, __version__)
    tensors = {name: np.ascontiguousarray(leaf) for name, leaf in _by_name(variables).items()}
    content = save(tensors, {_METADATA: json.dumps(description._asdict())})
    write_bytes(path, content)


def load_encoder(path: str | Path) -> Encoder:
    """Loads the encoder of a run, of this version or an earlier one.

    Args: path: a run's folder, or an `encoder.safetensors` file.
    Raises: InputError: there is none, it is damaged, or only a newer version can read it.
    """
    path = Path(os.path.expanduser(path))
    file = path / FILE_NAME if os.path.isdir(path) else path
    if os.path.exists(file) and not os.path.isfile(file):  # a pipe would keep us waiting
        raise InputError(str(file), "no regular file", "an encoder file is needed")
    try:
        with safe_open(file, framework="numpy") as stored:
            description = _description_in(stored.metadata())
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        config = _config_of(description)
        model = model_of(config)
        variables = _arrange(tensors, model)
    except FileNotFoundError:
        raise InputError(str(file), "missing", "a run writes it with its checkpoints") from None
    except Exception as error:  # of safetensors, JSON, checks, or JAX tracing what cannot be
        reason = str(error) or type(error).__name__
        allowed = f"an encoder of this version or an earlier one is needed: {reason}"
        raise InputError(str(file), "unusable", allowed) from error
    return Encoder(model, variables, config.mean, config.std, step=description.step)


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
        if name not in _FIELDS:
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


def _arrange(tensors: dict[str, np.ndarray], model: SplitModel) -> Variables:
    """The variables of a network.

    Raises: ValueError: names the first tensor of another name, shape or dtype than the network's.
    """
    needed = jax.eval_shape(model.init, jax.random.key(0))
    named = _by_name(needed)
    for name in sorted(named.keys() | tensors.keys()):
        found, wanted = (
            _brief(part[name]) if name in part else "no tensor" for part in (tensors, named)
        )
        if found != wanted:
            raise ValueError(f"{name} is {found}, the network needs {wanted}")
    return jax.tree.unflatten(jax.tree.structure(needed), [tensors[name] for name in named])


def _by_name(variables: Variables) -> dict[str, Any]:
    """The leaves, in order, under names such as `client/unit0/conv/kernel`."""
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}
