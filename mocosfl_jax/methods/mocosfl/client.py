"""What one client computes. No client axis, no server, no mesh: a process may be this and no more.

A step is `forward`, then `update` with the gradient that the server sent; a sync is `upload`, then
`receive` with the average (docs/method.md, steps 1, 5 and 6).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from mocosfl_jax.learning.divergence import divergence, own_share
from mocosfl_jax.learning.ema import ema_update
from mocosfl_jax.learning.sgd import sgd_update
from mocosfl_jax.methods.mocosfl.messages import ClientModel, LatentGradient, Latents, Params

Totals = dict[str, tuple[jax.Array, jax.Array]]
"""Metrics of one client by name: a total and its weight, () float32 each."""


class Release(Protocol):
    """What is done to latents, query and key alike, before they are sent. Hashable."""

    def __call__(self, latents: jax.Array, key: jax.Array, /) -> jax.Array:
        """What the server gets instead of latents (B', h, w, c), of the same shape or another.

        Differentiated. Args: key: a PRNG key, one a call.
        """

    def on_wire(self, latents: jax.ShapeDtypeStruct, /) -> Any:
        """Shapes of what travels for what the server gets; a pytree of `jax.ShapeDtypeStruct`."""


class ExtraGradient(Protocol):
    """A gradient that the client adds to the server's. Hashable.

    Its state belongs to the client, which keeps it between rounds.
    """

    def init(self, key: jax.Array) -> Any:
        """The state before a client's first step."""

    def working_set(self, pixels: jax.ShapeDtypeStruct, latents: jax.ShapeDtypeStruct, /) -> Any:
        """Shapes of what exists beside the state during a call, for the estimate of memory: what
        backward passes keep, gradients, a new state; a pytree of `jax.ShapeDtypeStruct`.

        Args: pixels, latents: of a call.
        """

    def __call__(
        self,
        state: Any,
        pixels: jax.Array,
        latents: jax.Array,
        mask: jax.Array,
        key: jax.Array,
        progress: jax.Array,
    ) -> tuple[jax.Array, Any, Totals]:
        """The gradient with respect to the query latents, the new state, and metrics.

        Args:
          state: after the client's last step.
          pixels: (B', S, S, 3) float32, of the query rows, in [0, 1].
          latents: (B', h, w, c), of the query rows, as they were sent.
          mask: (B',) bool, rows that count. The gradient of other rows must be 0, and metrics must
            leave them out: all rows of a padding slot are such rows.
          key: a PRNG key of this client and step.
          progress: () float32, the share of the training's steps that are done.
        Returns: the gradient, (B', h, w, c); the new state, of the same form; metrics with the same
          names in every step, other than `loss` and `accuracy`.
        """


@dataclass(frozen=True)
class ClientSide:
    """What a client computes with, fixed for a run; hashable.

    net: from images to latents. optimizer: see `sgd`. ema: decay of the key encoder.
    both_views: each encoder sees both views, 2B rows (MonAcoSFL). frozen: the model is not trained.
    release: what is done to latents before they are sent; None: nothing.
    extra_gradient: what the client adds to the gradient that it is sent; None: nothing.
    tau: of divergence-aware averaging, see `own_share`; 0: a sync gives the client the average.
    Raises: ValueError: an extra gradient, or a tau, for a model that is not trained.
    """

    net: nn.Module
    optimizer: optax.GradientTransformation
    ema: float
    both_views: bool = False
    frozen: bool = False
    release: Release | None = None
    extra_gradient: ExtraGradient | None = None
    tau: float = 0.0

    def __post_init__(self) -> None:
        if self.frozen and self.extra_gradient is not None:
            raise ValueError("a frozen client has no use for an extra gradient")
        if self.frozen and self.tau:
            raise ValueError("a frozen client has nothing of its own to keep at a sync")

    @property
    def needs_key(self) -> bool:
        """Whether a step needs a PRNG key."""
        return self.release is not None or self.extra_gradient is not None


class ClientState(flax.struct.PyTreeNode):
    """One client within a round.

    params: the online model. key_params: the key encoder. opt_state: of SGD. extra: the state of
    `ClientSide.extra_gradient`, else None. scale: lambda of divergence-aware averaging, () float32,
    0 before the first sync; None without it.
    """

    params: Params
    key_params: Params
    opt_state: optax.OptState
    extra: Any = None
    scale: jax.Array | None = None


class Pending(NamedTuple):
    """What a client holds until the gradient of its query latents arrives.

    backward: from that gradient to the gradient of its parameters; None if it is frozen.
    sent: the query latents, query images and mask for `extra_gradient`, else None.
    """

    backward: Callable[[jax.Array], tuple[Params]] | None
    sent: tuple[jax.Array, jax.Array, jax.Array] | None


def forward(
    side: ClientSide,
    state: ClientState,
    query_BHWC: jax.Array,
    key_BHWC: jax.Array,
    mask_B: jax.Array,
    rng: jax.Array | None = None,
) -> tuple[ClientState, Latents, Pending]:
    """Query latents; the key encoder moves towards the online model as it is; key latents.

    Args:
      query_BHWC, key_BHWC: two views of the client's images, normalised float32.
      mask_B: bool, images that count.
      rng: a PRNG key of this client and step, for `release`.
    """
    if side.both_views:
        query_BHWC, key_BHWC = (
            jnp.concatenate([query_BHWC, key_BHWC]),
            jnp.concatenate([key_BHWC, query_BHWC]),
        )
        mask_B = jnp.concatenate([mask_B, mask_B])
    query_rng, key_rng, _ = (None, None, None) if rng is None else jax.random.split(rng, 3)
    if side.frozen:
        query, backward = latents(side, state.params, query_BHWC, query_rng), None
    else:
        query, backward = jax.vjp(lambda p: latents(side, p, query_BHWC, query_rng), state.params)
    key_params = ema_update(state.key_params, state.params, side.ema)
    key = latents(side, key_params, key_BHWC, key_rng)
    sent = None if side.extra_gradient is None else (query, query_BHWC, mask_B)
    return (
        state.replace(key_params=key_params),
        Latents(query, key, mask_B),
        Pending(backward, sent),
    )


def latents(
    side: ClientSide, params: Params, images_BHWC: jax.Array, rng: jax.Array | None
) -> jax.Array:
    """What is sent of these images, (B', h, w, c)."""
    made = cast(jax.Array, side.net.apply({"params": params}, images_BHWC))
    if side.release is None:
        return made
    assert rng is not None, "what is released is drawn with a key"
    return side.release(made, rng)


def update(
    side: ClientSide,
    state: ClientState,
    pending: Pending,
    gradient: LatentGradient,
    rate: jax.Array,
    to_pixels: Callable[[jax.Array], jax.Array] | None = None,
    rng: jax.Array | None = None,
    progress: jax.Array | None = None,
) -> tuple[ClientState, Totals]:
    """One step of SGD with the gradient that the server sent, and with the client's own.

    Args:
      pending: of `forward` in this step.
      rate: () float32, the client's learning rate.
      to_pixels: from normalised images to pixels in [0, 1], for `extra_gradient`.
      rng: a PRNG key of this client and step, for the same.
      progress: () float32, the share of the training's steps that are done, for the same.
    """
    if pending.backward is None:
        return state, {}
    grad = gradient.query
    metrics: Totals = {}
    if side.extra_gradient is not None:
        assert pending.sent is not None and to_pixels is not None
        assert rng is not None and progress is not None
        sent, images, mask = pending.sent
        *_, own_rng = jax.random.split(rng, 3)
        pixels = to_pixels(images)
        own, extra, metrics = side.extra_gradient(
            state.extra, pixels, sent, mask, own_rng, progress
        )
        grad, state = grad + own, state.replace(extra=extra)
    (param_grad,) = pending.backward(grad)
    params, opt_state = sgd_update(side.optimizer, state.params, state.opt_state, param_grad, rate)
    return state.replace(params=params, opt_state=opt_state), metrics


def upload(state: ClientState, aligned: bool) -> ClientModel:
    """What the client sends at a sync. aligned: whether key encoders are averaged too."""
    return ClientModel(state.params, state.key_params if aligned else None)


def receive(side: ClientSide, state: ClientState, average: ClientModel) -> ClientState:
    """The client with the average; optimizer state and unaligned key encoders stay.

    In divergence-aware averaging it keeps a share of its own online model, and of an aligned key
    encoder, which follows the online model.
    """
    model, scale = average, state.scale
    if side.tau:
        assert scale is not None, "clients have a scale where there is a tau"
        share, scale = own_share(side.tau, scale, divergence(state.params, average.params))
        own = upload(state, average.key_params is not None)
        model = jax.tree.map(lambda x, mean: share * x + (1 - share) * mean, own, average)
    key_params = state.key_params if model.key_params is None else model.key_params
    return state.replace(params=model.params, key_params=key_params, scale=scale)
