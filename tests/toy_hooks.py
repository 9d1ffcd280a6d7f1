"""Toy hooks of a MocoSFL client, and a cohort with padding to try them on."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from mocosfl_jax.federated.contract import Batch, Normalisation, StepResult
from mocosfl_jax.federated.state import PADDING, TrainState, begin_round, create_state
from mocosfl_jax.methods.mocosfl.client import ExtraGradient, Release
from mocosfl_jax.methods.mocosfl.method import MocoSFL
from tests.test_sides import (
    BATCH,
    SIZE,
    method_of,
    moved,
)

CLIENTS, SLOTS = 5, 4
IDS = [3, 0, 4, PADDING]
MASK = [[True, True], [True, False], [True, True], [False, False]]
MEAN, STD = np.float32([0.5, 0.4, 0.3]), np.float32([0.2, 0.25, 0.3])
EMA, TEMPERATURE = 0.7, 0.2  # those of `method_of`


# -------------------------------------------------------------------------------------- toy hooks


@dataclasses.dataclass(frozen=True)
class ToyRelease:
    """A release that is sent as it is."""

    change: Callable[[jax.Array, jax.Array], jax.Array]

    def __call__(self, latents: jax.Array, key: jax.Array) -> jax.Array:
        return self.change(latents, key)

    def on_wire(self, latents: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return latents


@ToyRelease
def doubled(latents: jax.Array, key: jax.Array) -> jax.Array:
    """Twice the latents, and noise."""
    return 2 * latents + jax.random.normal(key, latents.shape)


@ToyRelease
def pooled(latents: jax.Array, key: jax.Array) -> jax.Array:
    """A release of another shape: half as high and half as wide."""
    count, height, width, channels = latents.shape
    return latents.reshape(count, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))


@ToyRelease
def identity(latents: jax.Array, key: jax.Array) -> jax.Array:
    return latents


class Seen(flax.struct.PyTreeNode):
    """The arguments of a client's last step; bits are drawn with its key."""

    pixels: jax.Array
    latents: jax.Array
    mask: jax.Array
    bits: jax.Array
    progress: jax.Array


@dataclasses.dataclass(frozen=True)
class Recorder:
    """Adds nothing, and keeps what it is given. rows: B'."""

    rows: int

    def init(self, key: jax.Array) -> Seen:
        return Seen(
            pixels=jnp.zeros((self.rows, SIZE, SIZE, 3)),
            latents=jnp.zeros((self.rows, SIZE, SIZE, 8)),
            mask=jnp.zeros(self.rows, bool),
            bits=jnp.zeros((), jnp.uint32),
            progress=jnp.zeros(()),
        )

    def __call__(self, state, pixels, latents, mask, key, progress):
        seen = Seen(pixels, latents, mask, jax.random.bits(key), progress)
        return jnp.zeros_like(latents), seen, {}


class Centre(flax.struct.PyTreeNode):
    """The state of `Pull`. value: () float32; steps: () int32."""

    value: jax.Array
    steps: jax.Array


@dataclasses.dataclass(frozen=True)
class Pull:
    """Pulls latents towards a centre, which follows the mean pixel of the client's images."""

    strength: float = 0.25

    def init(self, key: jax.Array) -> Centre:
        return Centre(jax.random.normal(key), jnp.zeros((), jnp.int32))

    def __call__(self, state, pixels, latents, mask, key, progress):
        counts = mask.astype(jnp.float32)
        total, rows = (pixels.mean(axis=(1, 2, 3)) * counts).sum(), counts.sum()
        shift = jax.random.normal(key)
        gradient = self.strength * (latents - state.value - shift) * counts.reshape(-1, 1, 1, 1)
        value = 0.5 * state.value + 0.5 * total / jnp.maximum(rows, 1)
        squares = (jnp.square(latents).mean(axis=(1, 2, 3)) * counts).sum()
        metrics = {"brightness": (total, rows), "energy": (squares, rows)}
        return gradient, Centre(value, state.steps + 1), metrics


# ---------------------------------------------------------------------------------------- settings


def hooked(
    release: Release | None = None,
    extra: ExtraGradient | None = None,
    loss: str = "one_way",
    chunks: int = 1,
) -> MocoSFL:
    method = method_of(loss, align=False, private=False)
    side = dataclasses.replace(method.client, release=release, extra_gradient=extra)
    return dataclasses.replace(method, client=side, chunks=chunks)


@functools.cache
def started(extra: ExtraGradient | None = None) -> TrainState:
    """In the first round of the cohort `IDS`; what clients keep differs.

    All methods of `hooked` with this extra gradient take it.
    """
    method = hooked(extra=extra)

    @jax.jit
    def create() -> TrainState:
        return create_state(method, jax.random.key(0), jax.random.key(1), CLIENTS, SLOTS)

    return begin_round(method, moved(create()), jnp.asarray(IDS, jnp.int32))


def pixels_of(seed: int) -> np.ndarray:
    """Both views, (2, C, B, S, S, 3) in [0, 1]."""
    rng = np.random.default_rng(seed)
    return rng.uniform(size=(2, SLOTS, BATCH, SIZE, SIZE, 3)).astype(np.float32)


def batch_of(seed: int, pixels: np.ndarray | None = None) -> Batch:
    views = ((pixels_of(seed) if pixels is None else pixels) - MEAN) / STD
    return Batch(
        views=(jnp.asarray(views[0]), jnp.asarray(views[1])),
        labels=None,
        mask=jnp.asarray(MASK),
        weight=jnp.asarray([1.0, 2.0, 0.5, 0.0]),
        sync=jnp.asarray(False),
        rate_factor=jnp.float32(0.5),
        progress=jnp.float32(0.25),
        keys=jax.random.split(jax.random.key(seed), SLOTS),
        normalisation=Normalisation(jnp.asarray(MEAN), jnp.asarray(STD)),
    )


@functools.partial(jax.jit, static_argnums=0)
def step(method: MocoSFL, server: Any, cohort: Any, batch: Batch) -> StepResult:
    return method.step(server, cohort, batch, messages=True)


def keys_of(batch: Batch, slot: int) -> jax.Array:
    """For query latents, key latents and extra gradient of one client."""
    return jax.random.split(batch.keys[slot], 3)
