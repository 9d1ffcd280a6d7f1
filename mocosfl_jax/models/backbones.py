"""The table of backbones, and what follows from it: number of units and shapes of latents.

To add a backbone, write a file that makes its `Backbone` and add a line here.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mocosfl_jax.models.contract import OPTIONAL_FIELDS, Backbone, Network, NetworkError, Unit
from mocosfl_jax.models.mobilenetv2 import MOBILENETV2
from mocosfl_jax.models.resnet import BasicBlock, BottleneckBlock, resnet
from mocosfl_jax.models.vgg import vgg

BACKBONES: dict[str, Backbone] = {
    "resnet18": resnet((2, 2, 2, 2), BasicBlock),
    "resnet34": resnet((3, 4, 6, 3), BasicBlock),
    "resnet50": resnet((3, 4, 6, 3), BottleneckBlock),
    "resnet101": resnet((3, 4, 23, 3), BottleneckBlock),
    "resnet152": resnet((3, 8, 36, 3), BottleneckBlock),
    "vgg11": vgg((1, 1, 2, 2, 2)),
    "vgg13": vgg((2, 2, 2, 2, 2)),
    "vgg16": vgg((2, 2, 3, 3, 3)),
    "vgg19": vgg((2, 2, 4, 4, 4)),
    "mobilenetv2": MOBILENETV2,
}

_ANY_SIZE = 32
"""Image size for questions whose answer does not depend on it."""


def default_width(backbone: str) -> int:
    """`width` where the config sets none. Args: backbone: name in `BACKBONES`."""
    return BACKBONES[backbone].width


def default_fields(backbone: str, image_size: int) -> Mapping[str, Any]:
    """The optional fields that a backbone reads, and their values where the config sets none.

    Args:
      backbone: name in `BACKBONES`.
      image_size: side of the square images, in pixels.
    Returns: for a ResNet `blocks_per_stage` and `stem`. An optional field that is missing here is
      not read by the backbone, and stays None in a resolved config.
    """
    return BACKBONES[backbone].defaults(image_size)


def check_network(network: Network, cut: int) -> None:
    """Checks a network whose optional fields may be unset; cheap whatever the values are.

    Args:
      network: of a backbone in the table.
      cut: number of units of the client, at least 1.
    Raises: NetworkError: a field is set that the backbone does not read, has a value that the
      backbone does not allow, or the cut lies behind the last unit.
    """
    read = default_fields(network.backbone, _ANY_SIZE)
    for name in OPTIONAL_FIELDS:
        if name not in read and getattr(network, name) is not None:
            raise NetworkError(
                name, f"backbone {network.backbone!r} does not read it: leave it unset"
            )
    BACKBONES[network.backbone].check(_filled(network, _ANY_SIZE))
    units = num_units(network)
    if not 1 <= cut <= units:
        raise NetworkError("cut", f"the network has {units} units: 1 to {units}")


def units_of(network: Network, image_size: int) -> tuple[Unit, ...]:
    """The units of a network that passes `check_network`, in order.

    Args: image_size: side of the square images in pixels; it decides the fields that are unset.
    """
    return BACKBONES[network.backbone].units(_filled(network, image_size))


def num_units(network: Network) -> int:
    """How many units a network has that passes the check of its backbone; nothing is traced."""
    return len(units_of(network, _ANY_SIZE))


def latent_shape(network: Network, image_size: int, cut: int) -> tuple[int, int, int]:
    """(height, width, channels) of one image after `cut` units, before the bottleneck.

    Nothing is computed or compiled: shapes are traced, once for each kind of unit and input.

    Args:
      network: passes `check_network` with this cut; unset fields have their defaults.
      image_size: side of the square images, in pixels.
      cut: number of units, from 0 (the image itself) to `num_units(network)`.
    """
    x = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    for unit in units_of(network, image_size)[:cut]:
        x = _output(unit, x)
    _, height, width, channels = x.shape
    return height, width, channels


@functools.lru_cache(maxsize=1024)
def _output(unit: Unit, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a unit's output (B, h, w, c'), from those of its input (B, H, W, c)."""
    output, _ = jax.eval_shape(lambda x: unit.init_with_output(jax.random.key(0), x), x)
    return output


def _filled(network: Network, image_size: int) -> Network:
    """The network with the defaults of its backbone in the fields that are unset."""
    defaults = default_fields(network.backbone, image_size)
    unset = {name: value for name, value in defaults.items() if getattr(network, name) is None}
    return dataclasses.replace(network, **unset)
