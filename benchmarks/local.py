"""A round of FL-MoCo beside centralised MoCo on the same rows.

    python -m benchmarks.local [--repeats 3] [--networks narrow,resnet18] [--json FILE]

20 clients of 32 images a step, on two networks: the narrow one of configs/cifar10_cpu.py and
ResNet-18, both with head V2. Centralised MoCo is MocoSFL with one client that has all 640 images,
both views through both encoders (loss `client`), so that both methods pass the same images through
the same networks. Variants are compiled first and then take turns, `repeats` times; medians are
reported. A round has as many steps as a client has batches (78); begin and end of a round, which
move queues, are timed apart and added.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.step import CIFAR10
from mocosfl_jax.config import check_types, default_config, resolve
from mocosfl_jax.federated.contract import Normalisation
from mocosfl_jax.federated.dispatch import Constants, Images, run_dispatch
from mocosfl_jax.federated.state import begin_round, create_state, end_round
from mocosfl_jax.run.program import program_of

CLIENTS, BATCH = 20, 32
NARROW = {"width": 32, "blocks_per_stage": (1, 1, 1), "stem": "3x3s2", "head_width": 128}
NETWORKS: dict[str, dict[str, Any]] = {"narrow": NARROW, "resnet18": {}}
SHARED = {"augmentation": "v1", "queue_length": 6000}
METHODS: dict[str, dict[str, Any]] = {
    "FL-MoCo": {"method": "local", "num_clients": CLIENTS, "batch_size": BATCH},
    "centralised": {"num_clients": 1, "batch_size": CLIENTS * BATCH, "loss": "client"},
}


class Bench:
    """Rounds of a run, compiled. A dispatch of so many `steps` ends with its only sync."""

    def __init__(self, steps: int, **fields: Any):
        raw = default_config(fields.get("method", "mocosfl"))
        raw.update(fields)
        config = resolve(check_types(raw), CIFAR10)
        program = program_of(config)
        clients, slots = config.num_clients, config.cohort_size
        shape = (steps, slots, config.batch_size, config.image_size, config.image_size, 3)
        rng = np.random.default_rng(0)
        self.inputs = Images(
            images=jnp.asarray(rng.integers(0, 256, shape, dtype=np.uint8)),
            mask=jnp.ones(shape[:3], bool),
            sync=jnp.arange(steps) == steps - 1,
            weight=jnp.ones(slots),
        )
        self.constants = Constants(
            normalisation=Normalisation(jnp.full(3, 0.5), jnp.full(3, 0.25)),
            augment_key=jax.random.key(0),
            method_key=jax.random.key(1),
        )
        self.steps, keys = steps, (jax.random.key(2), jax.random.key(3))
        state = jax.jit(lambda: create_state(program.method, *keys, clients, slots))()
        self.state = jax.tree.map(jnp.copy, state)

        def dispatch(state: Any, inputs: Images, constants: Constants) -> Any:
            return run_dispatch(program, state, inputs, constants)

        def turn(state: Any) -> Any:
            return begin_round(program.method, end_round(program.method, state), state.cohort_ids)

        self._turn = jax.jit(turn, donate_argnums=0)
        arguments = (self.state, self.inputs, self.constants)
        self._dispatch = jax.jit(dispatch, donate_argnums=0).lower(*arguments).compile()

    def step_seconds(self) -> float:
        started = time.perf_counter()
        self.state, _ = self._dispatch(self.state, self.inputs, self.constants)
        jax.block_until_ready(self.state)
        return (time.perf_counter() - started) / self.steps

    def turn_seconds(self) -> float:
        """The end of a round and the beginning of the next one."""
        started = time.perf_counter()
        self.state = self._turn(self.state)
        jax.block_until_ready(self.state)
        return time.perf_counter() - started


def measure(network: str, repeats: int, steps: int) -> dict[str, Any]:
    benches = {
        method: Bench(steps, **SHARED, **NETWORKS[network], **fields)
        for method, fields in METHODS.items()
    }
    steps_a_round = CIFAR10.num_train // (CLIENTS * BATCH)
    for bench in benches.values():  # pages are touched for the first time
        bench.step_seconds()
        bench.turn_seconds()
    rounds: dict[str, list[float]] = {method: [] for method in METHODS}
    turns: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(repeats):
        for method, bench in benches.items():
            turns[method].append(bench.turn_seconds())
            rounds[method].append(turns[method][-1] + steps_a_round * bench.step_seconds())
    seconds = {method: statistics.median(values) for method, values in rounds.items()}
    pairs = zip(rounds["FL-MoCo"], rounds["centralised"], strict=True)
    return {
        "network": network,
        "steps a round": steps_a_round,
        **{f"seconds a round, {method}": value for method, value in seconds.items()},
        **{f"of which begin and end, {m}": statistics.median(v) for m, v in turns.items()},
        "ratio": seconds["FL-MoCo"] / seconds["centralised"],
        "ratios of each turn": [round(a / b, 3) for a, b in pairs],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help="steps of a timed dispatch")
    parser.add_argument("--networks", default="narrow,resnet18")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.device_kind}, {platform.machine()}")
    results = []
    for network in args.networks.split(","):
        results.append(measure(network, args.repeats, args.steps))
        for name, value in results[-1].items():
            print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
        print(flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
