"""A trained encoder as a function from images to features."""

import dataclasses
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mocosfl_jax.data.pixels import square_rgb
from mocosfl_jax.errors import InputError
from mocosfl_jax.evaluation.features import encode
from mocosfl_jax.models.split import Encoded, SplitModel, Variables
from mocosfl_jax.run.encoder_file import brief, read_encoder

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
        raise InputError("images", brief(images), allowed)


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
        raise InputError(where, brief(image), allowed)
    if 0 in array.shape:
        raise InputError(where, brief(image), "at least one pixel is needed")
    if array.shape == (size, size, 3):
        return array
    return square_rgb(Image.fromarray(array), size)


# ----------------------------------------------------------------------------------------- file


def load_encoder(path: str | Path) -> Encoder:
    """Loads the encoder of a run, of this version or an earlier one.

    Args: path: a run's folder, or an `encoder.safetensors` file.
    Raises: InputError: there is none, it is damaged, or only a newer version can read it.
    """
    found = read_encoder(path)
    mean, std = found.config.mean, found.config.std
    return Encoder(found.model, found.variables, mean, std, step=found.step)
