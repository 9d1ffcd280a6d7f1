"""Several extra gradients of a client as one."""

from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Together:
    """The sum of several extra gradients, each with its own state and key.

    parts: at least one `ExtraGradient` of MocoSFL's client; no two have a metric of the same name.
    """

    parts: tuple[Any, ...]

    def init(self, key: jax.Array) -> tuple[Any, ...]:
        keys = jax.random.split(key, len(self.parts))
        return tuple(part.init(own) for part, own in zip(self.parts, keys, strict=True))

    def working_set(self, pixels: jax.ShapeDtypeStruct, latents: jax.ShapeDtypeStruct) -> Any:
        """Shapes of what exists beside the state; see `ExtraGradient`."""
        return [part.working_set(pixels, latents) for part in self.parts]

    def __call__(
        self,
        state: tuple[Any, ...],
        pixels: jax.Array,
        latents: jax.Array,
        mask: jax.Array,
        key: jax.Array,
        progress: jax.Array,
    ) -> tuple[jax.Array, tuple[Any, ...], dict[str, tuple[jax.Array, jax.Array]]]:
        """The gradient by the latents; see `ExtraGradient`."""
        keys = jax.random.split(key, len(self.parts))
        results = [
            part(own, pixels, latents, mask, own_key, progress)
            for part, own, own_key in zip(self.parts, state, keys, strict=True)
        ]
        gradients, states, metrics = zip(*results, strict=True)
        merged = {name: total for part in metrics for name, total in part.items()}
        return sum(gradients[1:], gradients[0]), states, merged
