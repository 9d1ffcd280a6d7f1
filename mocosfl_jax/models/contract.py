"""What a backbone is: a list of units, and the few facts about a family that others ask for.

Unit k of a network has the name `unit{k}`. Cutting the network at depth `cut` gives the first `cut`
units to the client and the rest to the server, under the same names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn

Unit = nn.Module
"""A Flax module, not yet bound, that maps (B, H, W, c) to (B, h, w, c'). Flax compares modules by
their fields, which must be hashable: networks with equal units are equal and compile once."""


@dataclass(frozen=True)
class Network:
    """The fields of a config that describe a backbone; hashable.

    backbone: name in `BACKBONES`. width: channels of the first unit, which those of the others grow
    with. blocks_per_stage, stem: None if unset, or if the backbone does not read them.
    compute_dtype: float32 or bfloat16.
    """

    backbone: str
    width: int
    blocks_per_stage: tuple[int, ...] | None = None
    stem: str | None = None
    compute_dtype: str = "float32"


OPTIONAL_FIELDS = ("blocks_per_stage", "stem")
"""The fields of `Network` that only some backbones read."""


class NetworkError(ValueError):
    """A network that cannot be built.

    field: the field of the config to blame, such as `width`. allowed: what is allowed instead.
    """

    def __init__(self, field: str, allowed: str):
        super().__init__(f"{field}: {allowed}")
        self.field = field
        self.allowed = allowed


@dataclass(frozen=True)
class Backbone:
    """One row of the table `BACKBONES`.

    Attributes:
      units: the units of a network whose fields are all filled in. Parameters are float32 and the
        computation has the dtype of the network.
      defaults: from the side of the images in pixels to the values of the optional fields that this
        backbone reads, where the config leaves them unset.
      check: raises `NetworkError` for a network that is absurdly large or cannot be built. It must
        be cheap: it runs before any unit is made. Fields that are unset have their defaults.
      expansion: what the hidden width of a projection head is multiplied with, for heads whose
        width grows with the backbone.
      width: channels of the first unit where the config sets none: those of the published network.
    """

    units: Callable[[Network], tuple[Unit, ...]]
    defaults: Callable[[int], Mapping[str, Any]]
    check: Callable[[Network], None]
    expansion: int = 1
    width: int = 64
