"""Gradients of every convolution of the configs, against autodiff of the plain one in float64.

    python -m tests.conv_gradients [--batches 1,7,100] [--only NAME] [--least-side 0]

Convolutions are those that the networks of configs/*.py and configs/baselines/*.py trace, and the
decoders of the attack for their latents; each is differentiated for one kernel and, with `vmap`,
for two kernels on images of their own. Prints the largest error of each over the largest value of
that gradient, and exits with 1 if one is above 1e-5. Where a batch of large maps would take more
than some GB, it is smaller. All of them take half an hour on two cores.
"""

import argparse
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mocosfl_jax.config import Resolved, check_types, resolve
from mocosfl_jax.config.network import model_of
from mocosfl_jax.data.dataset import DatasetInfo
from mocosfl_jax.models import conv as conv_module
from mocosfl_jax.models import depthwise
from mocosfl_jax.models.conv import conv, conv_transpose2x
from mocosfl_jax.models.decoder import Decoder, parse_decoder
from mocosfl_jax.models.depthwise import depthwise_conv

ROOT = Path(__file__).parent.parent
BOUND = 1e-5
CLIENTS = 2
MOST_VALUES = 2**26  # of the images of one client, or of their outputs
DIMENSIONS = ("NHWC", "HWIO", "NHWC")
Pair = tuple[jax.Array, jax.Array]
ATTACKERS = ("res_normN4C64", "conv_normN4C64")


class Layer(NamedTuple):
    """kind: a name in KINDS. stride: of the images; 2 of a transposed one."""

    kind: str
    height: int
    width: int
    kernel: tuple[int, ...]
    stride: int


def plain(x: jax.Array, kernel: jax.Array, stride: int, groups: int = 1) -> jax.Array:
    pad = (kernel.shape[0] // 2,) * 2
    return lax.conv_general_dilated(
        *(x, kernel, (stride, stride), [pad, pad]),
        dimension_numbers=DIMENSIONS,
        feature_group_count=groups,
    )


def plain_transposed(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return lax.conv_general_dilated(
        *(x, jnp.flip(kernel, (0, 1)), (1, 1), [(1, 2), (1, 2)]),
        lhs_dilation=(stride, stride),
        dimension_numbers=DIMENSIONS,
    )


def plain_depthwise(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return plain(x, kernel, stride, groups=x.shape[-1])


KINDS: dict[str, tuple[Callable, Callable]] = {
    "conv": (conv, plain),
    "transposed": (lambda x, kernel, stride: conv_transpose2x(x, kernel), plain_transposed),
    "depthwise": (depthwise_conv, plain_depthwise),
}


def configs() -> Iterator[tuple[str, Resolved]]:
    """Every config file, resolved for a data set of 10 classes and the size that it asks for."""
    for path in sorted([*ROOT.glob("configs/*.py"), *ROOT.glob("configs/baselines/*.py")]):
        get_config = runpy.run_path(str(path))["get_config"]
        raw = get_config("FL-BYOL") if path.stem == "comparison" else get_config()
        raw.mix_dataset, raw.mix_fraction, raw.init_from = None, 1.0, None
        raw.train_split = raw.test_split = None
        size = raw.image_size or 32
        info = DatasetInfo("images", 50_000, 10_000, image_size=size, num_classes=10)
        yield path.stem, resolve(check_types(raw), info)


def layers_of(config: Resolved) -> set[Layer]:
    """All that its network traces, and the decoders of an attack on it."""
    found: set[Layer] = set()

    def record(kind: str, function: Callable) -> Callable:
        def call(x: jax.Array, kernel: jax.Array, stride: int = 2) -> jax.Array:
            found.add(Layer(kind, *x.shape[1:3], kernel.shape, stride))
            return function(x, kernel, *(() if kind == "transposed" else (stride,)))

        return call

    model = model_of(config)
    side = config.image_size
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    names = {"_conv": "conv", "_conv_transpose2x": "transposed"}
    with (
        mock.patch.object(depthwise, "_depthwise", record("depthwise", depthwise._depthwise)),
        mock.patch.multiple(
            conv_module, **{n: record(k, getattr(conv_module, n)) for n, k in names.items()}
        ),
    ):
        variables = jax.eval_shape(model.init, jax.random.key(0))
        jax.eval_shape(model.encode, variables, images)
        latents = jax.eval_shape(model.latents, variables.client, images)
        for name in ATTACKERS:
            decoder = Decoder(parse_decoder(name), side)
            rows = jnp.ones(1, bool)
            jax.eval_shape(partial(decoder.init, train=False), jax.random.key(0), latents, rows)
    return found


def gradients(f: Callable, stride: int, x: jax.Array, kernel: jax.Array, g: jax.Array) -> Pair:
    return jax.vjp(lambda x, kernel: f(x, kernel, stride), x, kernel)[1](g)


def errors(layer: Layer, batch: int) -> tuple[float, float]:
    """The larger error of the two gradients, for one kernel and for several."""
    own, reference = KINDS[layer.kind]
    width = max(layer.kernel[2:]) * (4 if layer.kind == "transposed" else 1)
    batch = min(batch, max(1, MOST_VALUES // (layer.height * layer.width * width)))
    rng = np.random.default_rng(batch)
    channels = layer.kernel[3] if layer.kind == "depthwise" else layer.kernel[2]
    x = rng.normal(size=(CLIENTS, batch, layer.height, layer.width, channels))
    kernel = rng.normal(size=(CLIENTS, *layer.kernel))
    out = jax.eval_shape(lambda x, k: own(x, k, layer.stride), *map(_single, (x[0], kernel[0])))
    g = rng.normal(size=(CLIENTS, *out.shape))
    arrays = [a.astype(np.float32) for a in (x, kernel, g)]
    with jax.enable_x64(True):
        plain_gradients = jax.jit(partial(gradients, reference, layer.stride))
        exact = [
            jax.device_get(plain_gradients(*(a[c].astype(np.float64) for a in arrays)))
            for c in range(CLIENTS)
        ]
    own_gradients = partial(gradients, own, layer.stride)
    one = jax.jit(own_gradients)(*(a[0] for a in arrays))
    several = jax.jit(jax.vmap(own_gradients))(*arrays)
    stacked = [np.stack(pair) for pair in zip(*exact, strict=True)]
    return _worst(one, exact[0]), _worst(several, stacked)


def _single(array: np.ndarray) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, jnp.float32)


def _worst(found: Pair, exact: Sequence[np.ndarray]) -> float:
    """Not finite if a gradient is not."""
    pairs = zip(found, exact, strict=True)
    return float(np.max([np.abs(np.asarray(a) - b).max() / np.abs(b).max() for a, b in pairs]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", default="1,7,100")
    parser.add_argument("--only", help="configs whose names contain this")
    parser.add_argument("--least-side", type=int, default=0, help="of the maps")
    args = parser.parse_args()
    users: dict[Layer, list[str]] = {}
    for name, config in configs():
        for layer in layers_of(config):
            users.setdefault(layer, []).append(name)
    chosen = {
        layer: names
        for layer, names in users.items()
        if layer.height >= args.least_side and any((args.only or "") in name for name in names)
    }
    print(f"{len(chosen)} convolutions of {len({n for v in chosen.values() for n in v})} configs")
    worst = 0.0
    for layer, names in sorted(chosen.items()):
        found = {batch: errors(layer, int(batch)) for batch in args.batches.split(",")}
        worst = np.max([worst, *np.ravel(list(found.values()))])
        shown = "  ".join(f"{b}: {one:.1e} {several:.1e}" for b, (one, several) in found.items())
        print(
            f"{layer.kind} {layer.height}x{layer.width} {layer.kernel} stride {layer.stride}"
            f"  {shown}  ({', '.join(sorted(names))})",
            flush=True,
        )
    print(f"largest: {worst:.1e}; bound: {BOUND:.0e}")
    return int(not chosen or not worst <= BOUND)


if __name__ == "__main__":
    sys.exit(main())
