"""A network cut in two: what a client runs, and what the server runs."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from mocosfl_jax.models.backbones import BACKBONES, latent_shape, units_of
from mocosfl_jax.models.bottleneck import BottleneckShape
from mocosfl_jax.models.client_net import ClientNet
from mocosfl_jax.models.contract import Network
from mocosfl_jax.models.heads import HEADS, Head
from mocosfl_jax.models.server_net import ServerNet

Params = Any
"""Pytree of float32 arrays."""


def bytes_of(tree: Any) -> int:
    """Args: tree: of arrays or their shapes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


class Variables(NamedTuple):
    """All that a trained network consists of; see `SplitModel`."""

    client: Params
    server: Params
    stats: Params


class Encoded(NamedTuple):
    """features: (B, F) float32, pooled backbone features. embedding: (B, D) float32, head output
    before normalisation."""

    features: jax.Array
    embedding: jax.Array


@dataclass(frozen=True)
class SplitModel:
    """Pure functions of the cut network; hashable, so it may be a static argument of jit.

    Server parameters are one tree: the server's units by name, and `head`. `stats` are the running
    statistics of a BatchNorm head, an empty dict for the other heads.

    release: what evaluation does to latents before the server sees them, (B, h, w, c) to the same
      shape; None: nothing. It takes no part in `latents`.
    """

    client: ClientNet
    server: ServerNet
    head: Head
    image_size: int
    release: Callable[[jax.Array], jax.Array] | None = None

    def init(self, key: jax.Array) -> Variables:
        """Random variables, initialised as docs/method.md says."""
        client_key, server_key, head_key = jax.random.split(key, 3)
        images = jnp.zeros((1, self.image_size, self.image_size, 3))
        client = self.client.init(client_key, images)["params"]
        latents = self.client.apply({"params": client}, images)
        server = dict(self.server.init(server_key, latents).get("params", {}))
        features = self.server.apply({"params": server}, latents)
        head = self.head.init(head_key, features, jnp.ones((1,), bool), False)
        return Variables(client, {**server, "head": head["params"]}, head.get("batch_stats", {}))

    def shapes(self) -> Variables:
        """Shapes and dtypes of what `init` returns; nothing is computed."""
        return jax.tree.map(lambda x: x, _shapes(replace(self, release=None)))

    def latents(self, client_params: Params, images_BHWC: jax.Array) -> jax.Array:
        """What a client makes, (B, h, w, c), of normalised float32 images (B, H, W, 3)."""
        return cast(jax.Array, self.client.apply({"params": client_params}, images_BHWC))

    def features(self, server_params: Params, latents_RHWC: jax.Array) -> jax.Array:
        """Pooled backbone features (R, F), float32: what a linear probe sees."""
        return cast(jax.Array, self.server.apply({"params": server_params}, latents_RHWC))

    def embed(
        self,
        server_params: Params,
        stats: Params,
        features_RF: jax.Array,
        mask_R: jax.Array,
        train: bool,
    ) -> tuple[jax.Array, Params]:
        """Unnormalised embeddings (R, D) and the new head statistics."""
        variables = {"params": server_params["head"], "batch_stats": stats}
        if not (train and self.head.batch_norm):
            return cast(jax.Array, self.head.apply(variables, features_RF, mask_R, train)), stats
        embedding, updated = self.head.apply(
            variables, features_RF, mask_R, train, mutable=["batch_stats"]
        )
        return embedding, updated["batch_stats"]

    def encode(self, variables: Variables, images_BHWC: jax.Array) -> Encoded:
        """The whole network in evaluation, of normalised float32 images (B, H, W, 3)."""
        latents = self.latents(variables.client, images_BHWC)
        return self.encode_sent(variables, self.release(latents) if self.release else latents)

    def encode_sent(self, variables: Variables, latents_BHWC: jax.Array) -> Encoded:
        """The server's part in evaluation, of what it was sent, (B, h, w, c)."""
        features = self.features(variables.server, latents_BHWC)
        rows = jnp.ones(latents_BHWC.shape[0], bool)
        embedding, _ = self.embed(variables.server, variables.stats, features, rows, train=False)
        return Encoded(features, embedding)


@functools.lru_cache(maxsize=64)  # each trace of a deep network takes a tenth of a second
def _shapes(model: SplitModel) -> Variables:
    return jax.eval_shape(model.init, jax.random.key(0))


def build_model(
    network: Network,
    *,
    cut: int,
    bottleneck: BottleneckShape | None,
    head: str,
    head_width: int,
    image_size: int,
    row_axes: tuple[str, ...] = (),
    release: Callable[[jax.Array], jax.Array] | None = None,
) -> SplitModel:
    """The split network of a resolved config (see `mocosfl_jax.config` for the fields).

    Models of equal arguments are equal, so a function that is compiled for one serves the other.

    Args:
      bottleneck: parsed shape, or None.
      image_size: side of the square input, in pixels.
      row_axes: mesh axes over which server rows are spread, none without a mesh.
      release: see `SplitModel`.
    """
    dtype = jnp.dtype(network.compute_dtype)
    units = units_of(network, image_size)
    *_, channels = latent_shape(network, image_size, cut)
    shape, expansion = HEADS[head], BACKBONES[network.backbone].expansion
    hidden = head_width * shape.hidden * (expansion if shape.expands else 1)
    return SplitModel(
        client=ClientNet(units[:cut], bottleneck, dtype),
        server=ServerNet(units[cut:], cut, bottleneck, channels, dtype),
        head=Head(head_width, hidden, shape.batch_norm, dtype, row_axes),
        image_size=image_size,
        release=release,
    )
