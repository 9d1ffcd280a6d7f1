"""How time and memory depend on the number of clients, registered and active.

    python -m benchmarks.clients [--repeats 7] [--json FILE] [--plot FILE]

Narrow network of configs/cifar10_cpu.py, stateless clients of five shared images each, B = 1.
Registered: N = 100 to 1,000,000, cohort 100; a turn is one round of four steps with its draw, its
images and its sync, and all N take turns in one process, N = 100 twice as the noise floor. Memory
is what a process of its own holds after a round, beyond that of N = 100 (Linux). Active: cohorts of
10, 100 and 1,000, seconds a sample; the largest also all at once, with one chunk.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from benchmarks.devices import load_config, random_images
from mocosfl_jax.config import Resolved
from mocosfl_jax.config.data import partition_of
from mocosfl_jax.data.cohort import CohortSampler
from mocosfl_jax.data.dataset import Dataset
from mocosfl_jax.data.partition import by_classes
from mocosfl_jax.federated.dispatch import Images
from mocosfl_jax.federated.placement import make_placement
from mocosfl_jax.run.feed import Dispatch, dispatches
from mocosfl_jax.run.processes import use_compilation_cache
from mocosfl_jax.run.program import program_of
from mocosfl_jax.run.rounds import Rounds, place_inputs, run_constants

REGISTERED = (100, 1_000, 10_000, 100_000, 1_000_000)
ACTIVE = (10, 100, 1_000)
STEPS = 4


def setting(clients: int, cohort: int, *overrides: str) -> Resolved:
    """Stateless clients of the narrow network, one image a client a step."""
    fields = {
        "num_clients": clients,
        "cohort_size": cohort,
        "batch_size": 1,
        "images_per_client": 5,
        "client_state": "stateless",
        "align_momentum": True,
        "steps_per_round": STEPS,
        "steps_per_dispatch": STEPS,
        "syncs_per_round": 1,
        "rounds": 1_000_000,
        "queue_length": max(2000, 2 * cohort),
    }
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    return load_config("configs/cifar10_cpu.py", *flags, *overrides)


class Loop:
    """Round after round of one setting, as the training loop runs them."""

    def __init__(self, config: Resolved, data: Dataset):
        started = time.perf_counter()
        train = data.train
        self.partition = partition_of(config, len(train.images), train.labels)
        self.sampler = CohortSampler(self.partition, config.cohort_size, config.seed)
        self.partition_seconds = time.perf_counter() - started
        self.samples = config.cohort_size * config.batch_size * STEPS
        self._placement = make_placement(1, 1)
        self._dataset = data
        self._program = program_of(config, self._placement)
        self._rounds = Rounds(config, self._placement, self._program)
        self._constants = run_constants(config, self._placement)
        self._feed: Iterator[Dispatch] = dispatches(
            config, self.partition, self.sampler, self._rounds.slots, 0
        )
        self._state = self._rounds.initial_state()

    def compile(self) -> Callable[..., Any]:
        """The dispatch, which fits every setting of the same cohort."""
        _, ids, inputs = self._place()
        self._state = self._rounds.begin(self._state, ids)
        jitted = self._placement.dispatch(self._program, self._state)
        return jitted.lower(self._state, inputs, self._constants).compile()

    def _place(self) -> tuple[Dispatch, jax.Array, Images]:
        """The next dispatch on the device."""
        labels = self._program.method.labels
        return place_inputs(self._placement, self._dataset, labels, next(self._feed))

    def round(self, advance: Callable[..., Any]) -> float:
        """Seconds of the next round."""
        started = time.perf_counter()
        _, ids, inputs = self._place()
        state = self._rounds.begin(self._state, ids)
        state, _ = advance(state, inputs, self._constants)
        self._state = jax.block_until_ready(self._rounds.end(state))
        return time.perf_counter() - started


def in_turns(runs: dict[str, tuple[Loop, Callable[..., Any]]], repeats: int) -> dict[str, float]:
    """Median seconds of a round of each; they take turns, after one round of warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, (loop, advance) in runs.items():
            seconds[name].append(loop.round(advance))
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def held_bytes() -> int:
    """Resident anonymous memory of this process, once what a round left behind is freed."""
    gc.collect()
    time.sleep(1)  # the runtime frees buffers in threads of its own
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


FREED_AT_ONCE = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
"""Environment in which glibc keeps no freed memory for later."""


def memory_of(clients: int, overrides: list[str]) -> int:
    """Bytes that a process of its own holds after a round, with so many clients registered."""
    command = [sys.executable, "-m", "benchmarks.clients", "--memory", str(clients), *overrides]
    env = {**os.environ, **FREED_AT_ONCE}
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout)


def print_memory(clients: int, overrides: list[str]) -> None:
    config = setting(clients, min(clients, 100), *overrides)
    loop = Loop(config, random_images(config))
    loop.round(loop.compile())
    print(held_bytes())


def registered(repeats: int, sizes: tuple[int, ...], overrides: list[str]) -> list[dict[str, Any]]:
    """Time and memory of each N over those of the first."""
    data = random_images(setting(sizes[0], min(sizes[0], 100), *overrides))
    runs = {}
    for name, clients in [(str(n), n) for n in sizes] + [("again", sizes[0])]:
        loop = Loop(setting(clients, min(sizes[0], 100), *overrides), data)
        advance = loop.compile() if not runs else runs[str(sizes[0])][1]
        runs[name] = loop, advance
    seconds = in_turns(runs, repeats)
    first, base = seconds[str(sizes[0])], memory_of(sizes[0], overrides)
    rows = []
    for name, (loop, _) in runs.items():
        clients = loop.partition.num_clients
        rows.append(
            {
                "registered": name,
                "ms_a_step": 1e3 * seconds[name] / STEPS,
                "over_first": seconds[name] / first,
                "partition_seconds": loop.partition_seconds,
                "mb_beyond_first": (memory_of(clients, overrides) - base) / 2**20,
            }
        )
    return rows


def active(repeats: int, sizes: tuple[int, ...], overrides: list[str]) -> list[dict[str, Any]]:
    """Time a sample of each cohort over that of the second."""
    data = random_images(setting(sizes[-1], sizes[-1], *overrides))
    at_once = f"{sizes[-1]}, one chunk"
    runs = {}
    for name, cohort in [(str(n), n) for n in sizes] + [(at_once, sizes[-1])]:
        chunks = ["--config.cohort_chunks=1"] * (name == at_once)
        loop = Loop(setting(sizes[-1], cohort, *chunks, *overrides), data)
        runs[name] = loop, loop.compile()
    seconds = in_turns(runs, repeats)
    a_sample = {name: seconds[name] / loop.samples for name, (loop, _) in runs.items()}
    base = a_sample[str(sizes[1])]
    return [
        {
            "cohort": name,
            "ms_a_sample": 1e3 * value,
            f"over_{sizes[1]}": value / base,
            "mb_of_temporaries": runs[name][1].memory_analysis().temp_size_in_bytes / 2**20,
        }
        for name, value in a_sample.items()
    ]


def shards(clients: int) -> float:
    """Seconds to deal shards of classes, two a client and four images each, to so many clients."""
    import numpy as np

    labels = np.random.default_rng(0).integers(0, 10, 4 * clients)
    started = time.perf_counter()
    by_classes(labels, clients, 2, seed=0)
    return time.perf_counter() - started


def plot(rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Both relations, on a log axis of clients."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    ratio = next(key for key in rows["active"][0] if key.startswith("over_"))
    one_each = [row for row in rows["registered"] if row["registered"] != "again"]
    clients = [int(row["registered"]) for row in one_each]
    left.plot(clients, [row["over_first"] for row in one_each], "o-")
    left.set(xlabel="registered clients", ylabel=f"time a step over N = {clients[0]}")
    by_rule = rows["active"][:-1]
    right.plot([int(row["cohort"]) for row in by_rule], [row[ratio] for row in by_rule], "o-")
    right.set(xlabel="active clients", ylabel=f"time a sample over {ratio.split('_')[1]}")
    for axes in (left, right):
        axes.set(xscale="log", ylim=(0, 1.2 * axes.get_ylim()[1]))
    figure.savefig(path, dpi=120)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    for row in rows:
        cells = [f"{value:.3g}" if isinstance(value, float) else value for value in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--registered", default=",".join(map(str, REGISTERED)))
    parser.add_argument("--active", default=",".join(map(str, ACTIVE)))
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--plot", type=Path, help="also draw them to this file")
    parser.add_argument("--memory", type=int, help="print the resident bytes of so many clients")
    args, overrides = parser.parse_known_args()
    use_compilation_cache("~/.cache/mocosfl_jax")  # for the processes that measure memory
    if args.memory:
        print_memory(args.memory, overrides)
        return
    numbers = [tuple(map(int, text.split(","))) for text in (args.registered, args.active)]
    rows = {
        "registered": registered(args.repeats, numbers[0], overrides),
        "active": active(args.repeats, numbers[1], overrides),
    }
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}\n")
    print(table(rows["registered"]), table(rows["active"]), sep="\n\n")
    print(f"\nshards of {4 * numbers[0][-1]:,} labels dealt in {shards(numbers[0][-1]):.1f} s")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
