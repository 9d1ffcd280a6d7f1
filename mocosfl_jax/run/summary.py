"""What DIR/summary.json holds, and what a person sees of it."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from mocosfl_jax.config import Resolved
from mocosfl_jax.config.recipe import Facts
from mocosfl_jax.data.dataset import Dataset
from mocosfl_jax.errors import InputError
from mocosfl_jax.evaluation.numbers import NUMBERS, TOP1, TRANSFER_NUMBERS, Number
from mocosfl_jax.federated.placement import Placement
from mocosfl_jax.machine import peak_memory_bytes, versions
from mocosfl_jax.run.clock import Clock
from mocosfl_jax.run.plan import Plan
from mocosfl_jax.run.storage import read_json

Summary = dict[str, Any]

MADE_AGAIN = "move it away, and the run's own command makes it again"
"""What helps against a damaged summary."""


def summarize(
    config: Resolved,
    run: str,
    encoder: str | None,
    clock: Clock,
    results: dict[str, float | None],
    dataset: Dataset,
    placement: Placement,
    gaps: list[list[int]],
    facts: Facts,
    sizes: Plan,
) -> Summary:
    """The summary of a finished run; `NUMBERS` has the units of its numbers.

    images_per_second leaves out the padding of clients that have fewer images than a batch;
    `padding_counted` then is False. Version 0.1.0 counted padding and did not write the field.

    Args:
      config: of the run.
      run: `Identity.digest`.
      encoder: `weights_digest` of the run's encoder file.
      clock: what the whole run took, restarts included.
      results: accuracies by their name in `NUMBERS`; None where a protocol was skipped.
      dataset: its number of test images is reported.
      placement: its number of devices is reported.
      gaps: first and last step of each range that metrics.jsonl lacks.
      facts: what the method says of the run.
      sizes: `plan(config)`.
    """
    pace = clock.trained_images / clock.train_seconds if clock.train_seconds else None
    return {
        **results,
        "run": run,
        "encoder": encoder,
        "knn_top1_at_init": clock.knn_top1_at_init,
        "test_images": len(dataset.test.images) if dataset.test else 0,
        "steps": config.total_steps,
        "rounds": config.rounds,
        "images_per_second": pace,
        "padding_counted": clock.counts_padding,
        "compile_seconds": clock.compile_seconds,
        "wall_seconds": clock.wall_seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "metrics_missing_steps": gaps,
        "num_clients": config.num_clients,
        "cut": config.cut,
        "client_params": sizes.client_params,
        "server_params": sizes.server_params,
        "bytes_up_per_client_round": sizes.bytes_up_per_client_round,
        "bytes_down_per_client_round": sizes.bytes_down_per_client_round,
        **_once(sizes),
        **_rich(sizes),
        **facts.values,
        **({"notes": list(facts.notes)} if facts.notes else {}),
        "seed": config.seed,
        "device": jax.devices()[0].device_kind,
        "devices": placement.devices,
        "processes": jax.process_count(),
        "versions": versions(),
    }


def _once(sizes: Plan) -> Summary:
    """What a client receives before its first round, if anything."""
    down = sizes.bytes_down_per_client_once
    return {"bytes_down_per_client_once": down} if down else {}


def _rich(sizes: Plan) -> Summary:
    """The same of a client that takes larger batches, if there are such."""
    names = ("bytes_up_per_rich_client_round", "bytes_down_per_rich_client_round")
    values = {name: getattr(sizes, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def read_summary(path: Path) -> Summary:
    """The summary of a finished run.

    Raises: InputError: the file is not the summary of a run.
    """
    summary = read_json(path, MADE_AGAIN)
    _check_numbers(path, summary, NUMBERS)
    for transfer, values in by_transfer(summary).items():
        _check_numbers(path, values, TRANSFER_NUMBERS, f"transfer/{transfer}/")
    return summary


def _check_numbers(
    path: Path, values: Summary, numbers: Mapping[str, Number], place: str = ""
) -> None:
    """Raises: InputError: one is missing that must be there, or is no number.

    Args: place: what leads to the values' names in the file.
    """
    for name, number in numbers.items():
        value = values.get(name)
        if number.required and not isinstance(value, int | float):
            allowed = f"the summary of a run is needed; {MADE_AGAIN}"
            raise InputError(str(path), f"{place}{name} {value!r}", allowed)
        if not isinstance(value, int | float | None):
            raise InputError(str(path), f"{place}{name} {value!r}", "a number is needed")


def by_transfer(summary: Summary) -> dict[str, Summary]:
    """What a summary says of each data set that the run was not trained on, by the name that it
    has there: of `transfer/svhn/knn_top1`, `{"svhn": {"knn_top1": ...}}`."""
    found: dict[str, Summary] = {}
    for name, value in summary.items():
        match name.split("/"):
            case ["transfer", transfer, key]:
                found.setdefault(transfer, {})[key] = value
    return found


def standard_error(top1: float, images: int) -> float:
    """Standard error of an accuracy, both in percent, as a binomial proportion of the test images.

    Args: top1: percent. images: number of test images, at least 1.
    """
    share = top1 / 100
    return 100 * math.sqrt(share * (1 - share) / images)


def results_table(summary: Summary) -> str:
    """The end of a run in a few lines: the most important number last, then notes on them."""
    lines = [f"{summary['steps']} steps in {tqdm.format_interval(summary['wall_seconds'])}"]
    if summary.get("images_per_second"):
        lines[0] += f", {summary['images_per_second']:.0f} images/s while training"
    return "\n".join([*lines, *numbers_table(summary), *summary.get("notes", [])])


def numbers_table(summary: Summary) -> list[str]:
    """Lines with the numbers that a person is shown, those on the run's own data last.

    Args: summary: it may lack any number, but not the test images of an accuracy that it has.
    """
    lines = []
    for transfer, values in sorted(by_transfer(summary).items()):
        lines += _rows(values, f"transfer to {transfer}, ")
    return lines + _rows(summary)


def _rows(summary: Summary, heading: str = "") -> list[str]:
    """A line a number, the most important last, under a heading."""
    rows = [number for number in reversed(NUMBERS.values()) if number.in_table]
    rows = [number for number in rows if summary.get(number.name) is not None]
    width = max((len(number.label) for number in rows), default=0)
    lines = [f"  {number.label:<{width}}  {_shown(number, summary)}" for number in rows]
    if any(number.is_accuracy for number in rows):
        images = f"{summary['test_images']:,} test images"
        lines.insert(0, f"{heading}{TOP1} ± standard error, {images}:")
    return lines


def _shown(number: Number, summary: Summary) -> str:
    """A value of the table: an accuracy with its standard error, anything else with its unit."""
    value = summary[number.name]
    if number.is_accuracy:
        return f"{value:6.2f} ± {standard_error(value, summary['test_images']):.2f}"
    return f"{value:6.2f} {number.unit}".rstrip()
