"""What the devices of a mesh exchange in a step, and whether they compute the same.

    python -m benchmarks.devices [--config configs/cifar10_cpu.py] [--devices 1,2,4,8] [--json FILE]

The compiled dispatch of each number of devices is searched for collectives. Bytes are those of the
operands on one device, once a step; the formula: the gradient of every server parameter, this
device's keys of every view, and at a sync the client models. The rest are counts, losses and masks.
A ratio just below 1: the shift of a block's second norm and that of its shortcut have the same
gradient, which XLA sends once. Also printed: the distance of losses and parameters from those of
the first number of devices, over their norm, after a dispatch.
"""

import argparse
import json
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import numpy as np

from benchmarks.step import CIFAR10
from mocosfl_jax.config import Resolved, check_types
from mocosfl_jax.config.data import partition_of
from mocosfl_jax.config.resolve import resolve
from mocosfl_jax.data.cohort import CohortSampler
from mocosfl_jax.data.dataset import Dataset, Split
from mocosfl_jax.federated.placement import make_placement
from mocosfl_jax.run.commandline import define_flags
from mocosfl_jax.run.feed import dispatches
from mocosfl_jax.run.plan import plan
from mocosfl_jax.run.program import program_of
from mocosfl_jax.run.rounds import Rounds, place_inputs, run_constants

ITEM_BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "f64": 8, "u8": 1}
OPERATIONS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One collective of a compiled program; bytes of its operands on one device."""

    operation: str
    operand_bytes: int


def collectives(hlo: str) -> list[Collective]:
    """The collectives in the text of a compiled program, asynchronous ones counted once."""
    found = []
    names = "|".join(OPERATIONS)
    pattern = re.compile(rf"= (.*?) ({names})(?:-start)?\((.*)")
    for line in hlo.splitlines():
        if match := pattern.search(line):
            result, operation, rest = match.groups()
            size = sum(_shape_bytes(shape) for shape in _shapes(result))
            if operation == "all-gather":
                size //= _group_size(rest)
            if operation == "reduce-scatter":
                size *= _group_size(rest)
            found.append(Collective(operation, size))
    return found


def _shapes(text: str) -> list[tuple[str, str]]:
    return re.findall(r"(\w+)\[([\d,]*)\]", text)


def _shape_bytes(shape: tuple[str, str]) -> int:
    kind, sizes = shape
    return ITEM_BYTES[kind] * math.prod(int(n) for n in sizes.split(",") if n)


def _group_size(attributes: str) -> int:
    """Devices that take part in one group, in the notations of several versions of XLA."""
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(match.group(2))
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(match.group(1).split(","))
    if match := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", attributes):
        sizes = dict(re.findall(r"('\w+')=(\d+)", match.group(1)))
        return math.prod(int(sizes[axis]) for axis in match.group(2).split(","))
    raise ValueError(f"unknown notation of groups: {attributes}")


def minimum_bytes(config: Resolved, devices: int) -> dict[str, int]:
    """Bytes that a device must send in a step with a sync, by what they are."""
    if devices == 1:
        return {"server gradient": 0, "keys": 0, "client models": 0}
    sizes = plan(config)
    slots = -(-config.cohort_size // devices)
    views = 1 if config.loss == "one_way" else 2
    models = 2 if config.align_momentum else 1
    return {
        "server gradient": 4 * sizes.server_params,
        "keys": 4 * views * slots * config.batch_size * config.head_width,
        "client models": 4 * models * sizes.client_params,
    }


class OneDispatch:
    """The first dispatch of a config, on so many devices, with random images."""

    def __init__(self, config: Resolved, devices: int, server_shards: int = 1):
        self.placement = make_placement(devices, server_shards)
        program = program_of(config, self.placement)
        rounds = Rounds(config, self.placement, program)
        data = random_images(config)
        partition = partition_of(config, len(data.train.images), data.train.labels)
        sampler = CohortSampler(partition, config.cohort_size, config.seed)
        first = next(dispatches(config, partition, sampler, rounds.slots, 0))
        first, ids, inputs = place_inputs(self.placement, data, program.method.labels, first)
        state = rounds.begin(rounds.initial_state(), ids)
        self.arguments = (state, inputs, run_constants(config, self.placement))
        self.compiled = self.placement.dispatch(program, state).lower(*self.arguments).compile()
        self.cohort_size = config.cohort_size

    def run(self) -> dict[str, Any]:
        """Losses and parameters after it; once, as the state is donated."""
        state, output = self.compiled(*self.arguments)
        clients = jax.tree.map(
            lambda x: np.asarray(x)[: self.cohort_size], state.cohort.client.params
        )
        server = jax.tree.map(np.asarray, state.server.server.params)
        total, weight = output.metrics["loss"]
        return {"loss": np.asarray(total / weight), "server": server, "clients": clients}


def random_images(config: Resolved) -> Dataset:
    """As many as CIFAR-10 has, of the config's size; labels in turn."""
    rng = np.random.default_rng(0)
    number, size = CIFAR10.num_train, config.image_size
    images = rng.integers(0, 256, (number, size, size, 3), dtype=np.uint8)
    labels = (np.arange(number) % 10).astype(np.int32)
    return Dataset(Split(images, labels), None, None, CIFAR10)


def difference(a: dict[str, Any], b: dict[str, Any]) -> dict[str, float]:
    """Distance of each part over its norm."""

    def norm(tree: Any) -> float:
        return math.sqrt(sum(float(np.sum(np.square(x))) for x in jax.tree.leaves(tree)))

    def relative(x: Any, y: Any) -> float:
        return norm(jax.tree.map(np.subtract, x, y)) / norm(y)

    return {name: relative(a[name], b[name]) for name in b}


def measure(config: Resolved, devices: int, server_shards: int = 1) -> dict[str, Any]:
    """Collectives against the formula, and the numbers of the dispatch."""
    dispatch = OneDispatch(config, devices, server_shards)
    found = collectives(dispatch.compiled.as_text())
    expected = minimum_bytes(config, devices)
    total = sum(c.operand_bytes for c in found)
    return {
        "devices": devices,
        "bytes": {
            name: sum(c.operand_bytes for c in found if c.operation == name) for name in OPERATIONS
        },
        "formula": expected,
        "ratio": total / sum(expected.values()) if devices > 1 else None,
        "numbers": dispatch.run(),
    }


def load_config(path: str, *overrides: str) -> Resolved:
    """A config file resolved for CIFAR-10, without its images."""
    argv = ["devices", "--config", path, *overrides]
    values = define_flags(argv)
    values(argv)
    values.config.mean = values.config.std = (0.5, 0.5, 0.5)
    return resolve(check_types(values.config), CIFAR10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/cifar10_cpu.py")
    parser.add_argument("--devices", default="1,2,4,8", help="comma-separated")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    config = load_config(args.config)
    print(f"jax {jax.__version__}, {len(jax.devices())} {jax.devices()[0].device_kind} devices")
    results = [measure(config, int(n)) for n in args.devices.split(",")]
    first = results[0]["numbers"]
    for result in results:
        result["difference"] = difference(result.pop("numbers"), first)
        for name, value in result.items():
            print(f"{name}: {value}")
        print()
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
