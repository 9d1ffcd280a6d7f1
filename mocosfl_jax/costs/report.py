"""All costs of a client, as numbers and as a table."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mocosfl_jax.config import Resolved
from mocosfl_jax.config.recipe import find_recipe
from mocosfl_jax.costs.communication import (
    KINDS,
    Participation,
    Sent,
    messages_of,
    participation,
    total,
)
from mocosfl_jax.costs.flops import Flops, flops_of
from mocosfl_jax.costs.memory import Memory, memory_of
from mocosfl_jax.costs.paper import MB, G, PaperCosts, paper_costs
from mocosfl_jax.run.plan import client_parameters
from mocosfl_jax.run.program import program_of


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one client.

    parameters: their number, without running statistics. images_a_step: B, of a rich client F * B.
    often: how often it takes part.
    step, image: operations of a step of training, and of one image in evaluation.
    training, inference: memory of the same; None where it was not compiled.
    messages: what travels. paper: the paper's way of counting.
    """

    parameters: int
    images_a_step: int
    often: Participation
    step: Flops
    image: Flops
    training: Memory | None
    inference: Memory | None
    messages: tuple[Sent, ...]
    paper: PaperCosts

    @property
    def flops(self) -> float:
        """Operations of training in the whole run."""
        return self.step.total * self.often.steps


def costs_of(config: Resolved, holders: int, compiled: bool = True, rich: bool = False) -> Costs:
    """Costs of a client of a run with these settings; nothing is computed.

    Args:
      holders: clients of its kind that have images.
      compiled: whether memory is asked for.
      rich: whether it is a rich client (`config.rich`), where there are such.
    """
    method, often = program_of(config).method, participation(config, holders, rich)
    images = config.images_a_step * (method.batch_factor if rich else 1)
    batch, image = images_of(config, images), images_of(config, 1)
    train, infer = method.client_work(batch).train, method.client_work(image).infer
    messages = messages_of(method, batch, often)
    return Costs(
        parameters=client_parameters(config),
        images_a_step=images,
        often=often,
        step=flops_of(train),
        image=flops_of(infer),
        training=memory_of(train) if compiled else None,
        inference=memory_of(infer) if compiled else None,
        messages=messages,
        paper=paper_costs(infer, messages, often.steps * images),
    )


def step_line(config: Resolved) -> str:
    """What a client computes in a step; traced in 0.2 s for a stem of ResNet-18, in 5 s for all of
    MobileNetV2, and not compiled."""
    method = program_of(config).method
    step = flops_of(method.client_work(images_of(config, config.images_a_step)).train)
    return f"operations of a client in a step: {_big(step.total)}"


def notes(config: Resolved, holders: int) -> tuple[str, ...]:
    """What the numbers leave open, for people.

    Args: holders: clients that have images.
    """
    found = []
    if config.cohort_size < holders:
        drawn = f"{config.cohort_size} of {holders:,} clients"
        found.append(f"a round draws {drawn}: rounds, and what follows, are a client's mean")
    if statuses := program_of(config).method.statuses:
        full = f"{statuses[0].name} ({statuses[0].words})"
        found.append(f"counted with all rounds in {full}; summary.json says what a run saved")
    return tuple(found)


def images_of(config: Resolved, number: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((number, config.image_size, config.image_size, 3), jnp.float32)


def as_json(config: Resolved, costs: Costs) -> dict[str, Any]:
    """All numbers, in bytes and operations, with sums by kind and direction.

    `products` are multiply-adds, of which each is two operations in the total.
    """
    cuts = "cut" in find_recipe(config.method).reads
    return {
        "method": config.method,
        **({"cut": config.cut, "bottleneck": config.bottleneck} if cuts else {}),
        **dataclasses.asdict(costs),
        "flops": costs.flops,
        "bytes": {
            kind: {name: total(costs.messages, kind, up) for name, up in DIRECTIONS.items()}
            for kind in KINDS
        },
    }


DIRECTIONS = {"up": True, "down": False}


def table(costs: Costs, kind: str = "") -> str:
    """For a person. kind: of client, a word with a space."""
    often, paper = costs.often, costs.paper
    lines = [
        f"of one {kind}client: {costs.parameters:,} parameters,"
        f" {costs.images_a_step} images a step, {often.rounds:,.10g} rounds,"
        f" {often.steps:,.10g} steps, {often.syncs:,.10g} syncs",
        "",
        _row("operations", "total", "products", "others"),
        _row("a step", *_operations(costs.step)),
        _row("an image, evaluated", *_operations(costs.image)),
        _row("the run", _big(costs.flops)),
        *_memory_lines(costs),
        "",
        _row("communication, MiB", "up", "down"),
        *[_row(f"{kind}, the run", *_both_ways(costs.messages, kind)) for kind in KINDS],
        *[_message_line(message) for message in costs.messages],
        "",
        "as the paper counts (a multiply-add is 1, 5 a norm's element, G = 2^30; no key latents,",
        "weights up only):",
        _row("latents and gradients, MiB", _mb(paper.latents)),
        _row("weights, MiB", _mb(paper.weights)),
        _row("operations of the run, G", f"{paper.flops / G:,.1f}"),
    ]
    return "\n".join(lines)


def _memory_lines(costs: Costs) -> list[str]:
    held = {
        f"a step of {costs.images_a_step} images": costs.training,
        "an image, evaluated": costs.inference,
    }
    known = {name: memory for name, memory in held.items() if memory is not None}
    if not known:
        return []
    rows = [
        _row(name, *map(_mb, (m.total, m.arguments, m.outputs - m.reused, m.temporaries)))
        for name, m in known.items()
    ]
    return ["", _row("memory, MiB", "total", "arguments", "outputs", "temporaries"), *rows]


def _operations(flops: Flops) -> tuple[str, str, str]:
    return _big(flops.total), _big(2 * flops.products), _big(flops.others)


def _both_ways(messages: tuple[Sent, ...], kind: str) -> tuple[str, ...]:
    return tuple(_mb(total(messages, kind, up)) for up in DIRECTIONS.values())


def _message_line(message: Sent) -> str:
    way = "up" if message.up else "down"
    each = f"{_mb(message.size)} MiB"
    return f"  {message.name}, {way}: {each} {message.when}, {message.times:,.10g} times"


def _row(name: str, *cells: str) -> str:
    return f"{name:<28}" + "".join(f"{cell:>14}" for cell in cells)


def _mb(number: float) -> str:
    return f"{number / MB:,.3f}" if number < 10 * MB else f"{number / MB:,.1f}"


def _big(number: float) -> str:
    """With a decimal prefix."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= factor:
            return f"{number / factor:,.2f} {prefix}"
    return f"{number:,.0f}"
