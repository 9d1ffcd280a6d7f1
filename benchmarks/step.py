"""Seconds a step of ResNet-18 in the paper's setting, and what they are made of.

    python -m benchmarks.step [--repeats 3] [--cuts 1,2] [--devices 2] [--peak GFLOPS] [--json FILE]

Paper's queue, head and loss; total batch 100. Every variant is compiled first; then the variants
take turns, `repeats` times, and medians are reported, so that a change of the machine's pace meets
all of them. Printed for each cut: seconds a step, inside a dispatch of four steps with their
augmentation, with 100 clients of one image (in the parts that suit the device, all at once, and on
`--devices`) and with one client of 100 images; the ratios to the latter, the overhead of the
federation; the share of augmentation; a step inside the dispatch over a step alone; FLOP/s by
formula, with `--devices`, over those of a large matrix product and of the network's fastest
convolution, measured in the same turns, and over `--peak`, if another library's is known; compile
seconds; bytes of the programs' temporaries, on one device. As in training, the state of a dispatch
is donated to it.
"""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mocosfl_jax.config import Resolved, check_types, default_config, resolve
from mocosfl_jax.config.rich import blocks_of
from mocosfl_jax.data.augment import two_views
from mocosfl_jax.data.dataset import DatasetInfo
from mocosfl_jax.federated.contract import Batch, Normalisation
from mocosfl_jax.federated.dispatch import Constants, Images, Program
from mocosfl_jax.federated.placement import make_placement
from mocosfl_jax.federated.state import TrainState, create_state
from mocosfl_jax.models.conv import conv
from mocosfl_jax.models.resnet import STEMS
from mocosfl_jax.randomness import Stream, device_key
from mocosfl_jax.run.program import program_of

CIFAR10 = DatasetInfo(
    name="cifar10", num_train=50_000, num_test=10_000, image_size=32, num_classes=10
)
PEAK_SIZE = 4096
SCAN_STEPS = 4

Variant = Callable[[], Any]


def setting(**fields: Any) -> Resolved:
    """The paper's CIFAR-10 setting with other fields set."""
    raw = default_config()
    raw.update(fields)
    return resolve(check_types(raw), CIFAR10)


# ---------------------------------------------------------------------------------------- FLOPs


class Convolution(NamedTuple):
    """Of one image. size: side of the output; kernel: side of the kernel."""

    size: int
    kernel: int
    inputs: int
    outputs: int

    @property
    def products(self) -> int:
        """Multiply-adds, forward."""
        return self.size**2 * self.kernel**2 * self.inputs * self.outputs


def convolutions(config: Resolved) -> list[list[Convolution]]:
    """Those of each unit of a basic-block ResNet."""
    stem = STEMS[config.stem]
    size = math.ceil(config.image_size / stem.stride)
    units = [[Convolution(size, stem.kernel_size, 3, config.width)]]
    channels = config.width
    for stage, blocks in enumerate(config.blocks_per_stage):
        for block in range(blocks):
            out = config.width * 2**stage
            if stage > 0 and block == 0:
                size = math.ceil(size / 2)
            unit = [Convolution(size, 3, channels, out), Convolution(size, 3, out, out)]
            if channels != out:
                unit.append(Convolution(size, 1, channels, out))
            units.append(unit)
            channels = out
    return units


def unit_products(config: Resolved) -> list[int]:
    """Multiply-adds of each unit's convolutions, one image, forward."""
    return [sum(each.products for each in unit) for unit in convolutions(config)]


def step_flops(config: Resolved) -> int:
    """FLOPs of a step with the `server` loss and head V2; 2 a multiply-add, backward = 2 forwards.

    Both encoders pass two views through the server. The gradient of the images is not computed, nor
    that of the queue. Norms, augmentation and updates do not count.
    """
    units = unit_products(config)
    client, server = sum(units[: config.cut]), sum(units[config.cut :])
    features = config.width * 2 ** (len(config.blocks_per_stage) - 1)
    server += features * config.head_width + config.head_width**2
    logits = config.head_width * (config.queue_length + 1)
    online = (3 * client - units[0]) + 2 * 3 * server + 2 * 2 * logits
    momentum = client + 2 * server
    return 2 * config.total_batch * (online + momentum)


# -------------------------------------------------------------------------------------- variants


class Bench:
    """Inputs and compiled programs of one setting."""

    def __init__(self, config: Resolved):
        self.config = config
        self.program: Program = program_of(config)
        self.compile_seconds: dict[str, float] = {}
        self.temporary_bytes: dict[str, int] = {}
        rng = np.random.default_rng(0)
        blocks, side = blocks_of(config), config.image_size
        shape = (blocks, config.batch_size, side, side, 3)
        self.images = jnp.asarray(rng.integers(0, 256, (SCAN_STEPS, *shape), dtype=np.uint8))
        self.views = jnp.asarray(rng.standard_normal((2, *shape), dtype=np.float32))
        self.mask = jnp.ones(shape[:2], bool)
        self.weight = jnp.ones(config.cohort_size)
        self.state = jax.jit(self._initial_state)()
        self.constants = Constants(
            normalisation=Normalisation(jnp.full(3, 0.5), jnp.full(3, 0.25)),
            augment_key=jax.random.key(0),
            method_key=jax.random.key(1),
        )

    def _initial_state(self) -> TrainState:
        init, state = (device_key(self.config.seed, s) for s in (Stream.INIT, Stream.STATE))
        clients, slots = self.config.num_clients, self.config.cohort_size
        return create_state(self.program.method, init, state, clients, slots)

    def _compile(self, name: str, function: Callable, *args: Any) -> Callable:
        started = time.perf_counter()
        compiled = jax.jit(function).lower(*args).compile()
        self.compile_seconds[name] = time.perf_counter() - started
        self.temporary_bytes[name] = compiled.memory_analysis().temp_size_in_bytes
        return compiled

    def step(self) -> Variant:
        """One step on ready views, with a sync."""
        batch = Batch(
            views=(self.views[0], self.views[1]),
            labels=None,
            mask=self.mask,
            weight=self.weight,
            sync=jnp.bool_(True),
            rate_factor=jnp.float32(1),
            progress=jnp.float32(0),
            keys=jax.random.split(self.constants.method_key, self.config.cohort_size),
            normalisation=self.constants.normalisation,
        )
        args = (self.state.server, self.state.cohort, batch)
        compiled = self._compile("step", self.program.method.step, *args)
        return lambda: compiled(*args)

    def dispatch(self, devices: int = 1) -> Variant:
        """A scanned period: augmentation and SCAN_STEPS steps, the last with a sync.

        Args: devices: over which the clients are spread, a divisor of their number.
        """
        placement = make_placement(devices, server_shards=1)
        program = program_of(self.config, placement)
        rows = placement.rows(1)
        inputs = Images(
            images=jax.device_put(self.images, rows),
            mask=jax.device_put(jnp.broadcast_to(self.mask, self.images.shape[:3]), rows),
            sync=jax.device_put(jnp.arange(SCAN_STEPS) == SCAN_STEPS - 1, placement.replicated),
            weight=jax.device_put(self.weight, placement.rows()),
        )
        constants = jax.device_put(self.constants, placement.replicated)
        shardings = placement.state_shardings(program.method, self.state)
        state = jax.device_put(jax.tree.map(jnp.copy, self.state), shardings)
        name = "dispatch" if devices == 1 else f"dispatch_on_{devices}_devices"
        compiled = self._compile(name, placement.dispatch(program, state), state, inputs, constants)

        def run() -> Any:
            nonlocal state
            state, output = compiled(state, inputs, constants)
            return state, output

        return run

    def augmentation(self) -> Variant:
        """Two views of every image of a step."""
        images = self.images[0].reshape(-1, *self.images.shape[-3:])
        keys = jax.random.split(jax.random.key(0), len(images))
        augment, (mean, std) = self.program.augment, self.constants.normalisation
        args = (keys, images)
        compiled = self._compile(
            "augmentation", lambda k, i: two_views(k, i, augment, mean, std), *args
        )
        return lambda: compiled(*args)


def matrix_product() -> Variant:
    """A product of two large float32 matrices."""
    a = jax.random.normal(jax.random.key(0), (PEAK_SIZE, PEAK_SIZE))
    compiled = jax.jit(lambda x: x @ x).lower(a).compile()
    return lambda: compiled(a)


def convolution(shape: Convolution, images: int) -> Variant:
    """The project's convolution, forward, with stride 1."""
    x_key, kernel_key = jax.random.split(jax.random.key(0))
    x = jax.random.normal(x_key, (images, shape.size, shape.size, shape.inputs))
    kernel_shape = (shape.kernel, shape.kernel, shape.inputs, shape.outputs)
    kernel = jax.random.normal(kernel_key, kernel_shape)
    compiled = jax.jit(conv).lower(x, kernel).compile()
    return lambda: compiled(x, kernel)


def medians(variants: dict[Any, Variant], repeats: int) -> dict[Any, float]:
    """Median seconds of each variant; they take turns."""
    for run in variants.values():
        jax.block_until_ready(run())
    seconds: dict[Any, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            started = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


# ---------------------------------------------------------------------------------------- report


def measure(
    cut: int, repeats: int, peak: float | None = None, devices: int = 1, **fields: Any
) -> dict[str, Any]:
    """All figures of one cut; `fields` override the paper's setting.

    Args: peak: of another library, in GFLOP/s. devices: also to be measured, if more than one.
    """
    many = Bench(setting(num_clients=100, cut=cut, **fields))
    at_once = Bench(setting(num_clients=100, cut=cut, cohort_chunks=1, **fields))
    one = Bench(setting(num_clients=1, batch_size=100, cut=cut, **fields))
    on_devices = {"100_clients_on_devices": many.dispatch(devices)} if devices > 1 else {}
    variants = {
        "peak": matrix_product(),
        "augmentation": many.augmentation(),
        "alone": many.step(),
        "100_clients": many.dispatch(),
        "100_clients_at_once": at_once.dispatch(),
        **on_devices,
        "1_client": one.dispatch(),
    }
    rows = many.config.total_batch
    shapes = {each for unit in convolutions(many.config) for each in unit if each.kernel == 3}
    seconds = medians({**variants, **{s: convolution(s, rows) for s in shapes}}, repeats)
    product, flops = 2 * PEAK_SIZE**3 / seconds["peak"], step_flops(many.config)
    best = max(2 * rows * shape.products / seconds[shape] for shape in shapes)
    a_step = {name: seconds[name] / SCAN_STEPS for name in variants if "client" in name}
    as_trained = a_step.get("100_clients_on_devices", a_step["100_clients"])
    pace = flops / as_trained
    return {
        "cut": cut,
        **{f"seconds_a_step_{name}": value for name, value in a_step.items()},
        "seconds_of_a_step_alone": seconds["alone"],
        "speedup_by_devices": a_step["100_clients"] / as_trained,
        "federation_overhead": a_step["100_clients"] / a_step["1_client"],
        "federation_overhead_at_once": a_step["100_clients_at_once"] / a_step["1_client"],
        "augmentation_share": seconds["augmentation"] / a_step["100_clients"],
        "scanned_over_alone": a_step["100_clients"] / (seconds["alone"] + seconds["augmentation"]),
        "gflop_a_step": flops / 1e9,
        "gflops_of_matrix_product": product / 1e9,
        "gflops_of_best_convolution": best / 1e9,
        "fraction_of_matrix_product": pace / product,
        "fraction_of_best_convolution": pace / best,
        **({} if peak is None else {"fraction_of_given_peak": pace / (1e9 * peak)}),
        **{f"temporary_mb_of_{n}": size / 1e6 for n, size in many.temporary_bytes.items()},
        "compile_seconds": many.compile_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cuts", default="1,2", help="units on the client, comma-separated")
    parser.add_argument("--devices", type=int, default=2, help="on a CPU, virtual ones")
    parser.add_argument("--peak", type=float, help="GFLOP/s of another library, to compare with")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", args.devices)
    device, devices = jax.devices()[0], min(args.devices, jax.device_count())
    print(f"jax {jax.__version__}, {device.device_kind}, {platform.machine()}")
    results = []
    for cut in args.cuts.split(","):
        results.append(measure(int(cut), args.repeats, args.peak, devices))
        for name, value in results[-1].items():
            print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
        print(flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
