"""A trained encoder as one file, and as a function from images to features."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mocosfl_jax.build import model_of
from mocosfl_jax.config import Config, config_from_json
from mocosfl_jax.data.pixels import square_rgb
from mocosfl_jax.errors import InputError
from mocosfl_jax.evaluation.features import encode
from mocosfl_jax.models.split import Encoded, Params, SplitModel, Variables

FILE_NAME = "encoder.safetensors"
_SEPARATOR = "/"


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A trained network; call it on images to get features.

    model, variables: the network. mean, std: of each channel, in [0, 1], of its training images.
    batch_size: images encoded at once.
    """

    model: SplitModel
    variables: Variables
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch_size: int = 256

    def __call__(self, images: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
        """Pooled backbone features (n, F), float32.

        Args:
          images: uint8 RGB (n, H, W, 3), or a sequence of (H, W, 3) or grey (H, W) arrays of any
            sizes; each is resized by its short side and centre-cropped to the training size.
        Raises: InputError: other shapes or types.
        """
        return np.asarray(self._encode(images).features)

    def embed(self, images: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
        """Unit embeddings (n, D), float32: what training contrasts, for similarity search."""
        embedding = np.asarray(self._encode(images).embedding)
        return embedding / np.linalg.norm(embedding, axis=1, keepdims=True)

    def _encode(self, images: np.ndarray | Sequence[np.ndarray]) -> Encoded:
        size = self.model.image_size
        if len(images) == 0 or (isinstance(images, np.ndarray) and images.ndim == 3):
            allowed = "a stack (n, H, W, 3) or a sequence of at least one image is needed"
            raise InputError("images", np.shape(images), allowed)
        stacked = np.stack([_to_square(np.asarray(image), size) for image in images])
        batch_size = min(self.batch_size, len(stacked))
        return encode(self.model.encode, self.variables, stacked, self.mean, self.std, batch_size)


def _to_square(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 (size, size, 3) from uint8 (H, W, 3), (H, W, 1) or (H, W)."""
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        found = f"{image.dtype} {image.shape}"
        raise InputError("images", found, "uint8 images of shape (H, W, 3) or (H, W) are needed")
    if image.shape == (size, size, 3):
        return image
    grey = image.ndim == 3 and image.shape[-1] == 1
    picture = Image.fromarray(image[..., 0] if grey else image).convert("RGB")
    return square_rgb(picture, size)


def save_encoder(path: Path, config: Config, variables: Variables) -> None:
    """Writes weights (float32, named `client/unit0/conv/kernel` and so on; HWIO kernels) and, as
    metadata, the resolved config as JSON."""
    leaves = jax.tree_util.tree_flatten_with_path(variables._asdict())[0]
    tensors = {
        _SEPARATOR.join(key.key for key in keys): np.ascontiguousarray(leaf)
        for keys, leaf in leaves
    }
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, {"config": json.dumps(dataclasses.asdict(config))})
    partial.replace(path)


def load_encoder(path: str | Path) -> Encoder:
    """Loads the encoder of a run.

    Args: path: a run's folder, or an `encoder.safetensors` file.
    Raises: InputError: there is none, or it is no such file.
    """
    path = Path(path).expanduser()
    file = path / FILE_NAME if path.is_dir() else path
    try:
        with safe_open(file, framework="numpy") as stored:
            values = json.loads(stored.metadata()["config"])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise InputError(str(file), "missing", "a run writes it with its checkpoints") from None
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(str(file), "unreadable", f"not an encoder file: {error}") from None
    config = config_from_json(values)
    tree = _unflatten(tensors)
    variables = Variables(tree["client"], tree["server"], tree.get("stats", {}))
    return Encoder(model_of(config), variables, config.mean, config.std)


def _unflatten(tensors: dict[str, np.ndarray]) -> Params:
    tree: Params = {}
    for name, value in tensors.items():
        *folders, leaf = name.split(_SEPARATOR)
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = value
    return tree
