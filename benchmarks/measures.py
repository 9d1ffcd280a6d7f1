"""What a run with `measure.hardness` and `measure.divergence` takes, beside one without.

    python -m benchmarks.measures [--repeats 9] [--steps 10] [--networks narrow,resnet18]

MocoSFL with 20 clients of 5 images a step, cut 2, the paper's queue of 6,000 keys, shared or
private; the narrow network of configs/cifar10_cpu.py, or ResNet-18. A dispatch of `steps` steps
ends with a sync, at which both are measured. Variants are compiled first and then take turns,
`repeats` times, each turn in another order; printed are medians over turns of the ratio to the run
without, and the quartiles.
"""

import argparse
import itertools
import json
import platform
import statistics
from typing import Any

import jax
import numpy as np

from benchmarks.local import NETWORKS, Bench

SETTING = {"num_clients": 20, "batch_size": 5, "cut": 2, "queue_length": 6000}
QUEUES: dict[str, dict[str, Any]] = {"shared": {}, "private": {"feature_sharing": False}}
MEASURES: dict[str, dict[str, bool]] = {
    "nothing": {},
    "hardness": {"hardness": True},
    "divergence": {"divergence": True},
    "both": {"hardness": True, "divergence": True},
}


def measure(network: str, queues: str, repeats: int, steps: int) -> dict[str, Any]:
    fields = {**SETTING, **NETWORKS[network], **QUEUES[queues]}
    benches = {name: Bench(steps, measure=on, **fields) for name, on in MEASURES.items()}
    for bench in benches.values():  # pages are touched for the first time
        bench.step_seconds()
    seconds: dict[str, list[float]] = {name: [] for name in MEASURES}
    for turn in range(repeats):
        for name in np.roll(list(MEASURES), turn):
            seconds[name].append(benches[name].step_seconds())
    return {
        "network": network,
        "queues": queues,
        "seconds a step": statistics.median(seconds["nothing"]),
        **{name: _ratios(seconds[name], seconds["nothing"]) for name in list(MEASURES)[1:]},
    }


def _ratios(seconds: list[float], without: list[float]) -> dict[str, float]:
    low, median, high = np.quantile(np.divide(seconds, without), (0.25, 0.5, 0.75))
    return {"median": float(median), "quartile 1": float(low), "quartile 3": float(high)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10, help="steps from one sync to the next")
    parser.add_argument("--networks", default="narrow,resnet18")
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {platform.machine()}")
    for network, queues in itertools.product(args.networks.split(","), QUEUES):
        print(json.dumps(measure(network, queues, args.repeats, args.steps)), flush=True)


if __name__ == "__main__":
    main()
