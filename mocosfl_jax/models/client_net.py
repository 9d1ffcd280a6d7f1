"""The client's network: the units before the cut and the client half of the bottleneck."""

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from mocosfl_jax.models.bottleneck import BottleneckEncoder, BottleneckShape
from mocosfl_jax.models.contract import Unit


class ClientNet(nn.Module):
    """Units before the cut, and the client half of the bottleneck.

    Attributes: units: those before the cut; bottleneck: its shape, or None; dtype: of the
    computation.
    """

    units: tuple[Unit, ...]
    bottleneck: BottleneckShape | None
    dtype: DTypeLike

    @nn.compact
    def __call__(self, images_BHWC: jax.Array) -> jax.Array:
        """Latents (B, h, w, c) of normalised images (B, H, W, 3)."""
        x = images_BHWC
        for index, unit in enumerate(self.units):
            x = unit.clone(parent=self, name=f"unit{index}")(x)
        if self.bottleneck is not None:
            x = BottleneckEncoder(self.bottleneck, self.dtype, name="bottleneck")(x)
        return x
