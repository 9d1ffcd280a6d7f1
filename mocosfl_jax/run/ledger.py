"""Bytes that clients and server exchange in a run whose rounds differ in what is sent."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mocosfl_jax.config.recipe import Facts
from mocosfl_jax.federated.contract import Message, Method
from mocosfl_jax.federated.state import PADDING
from mocosfl_jax.models.split import bytes_of
from mocosfl_jax.run.clock import Clock
from mocosfl_jax.run.feed import Dispatch


class _Way(NamedTuple):
    """Bytes in one direction: of an image in a step, of a participant at a sync and at the start
    of a round."""

    step: int
    sync: int
    round: int


class _Counts(NamedTuple):
    """How many images, syncs of participants, and starts of participants a step has."""

    images: int
    syncs: int
    starts: int

    def bytes_of(self, way: _Way) -> int:
        return self.images * way.step + self.syncs * way.sync + self.starts * way.round


class Ledger:
    """Adds up in the clock what travels, and what would travel if no round saved anything.

    Images that are padding are not sent. What a client receives once, before its first round, is
    not counted.
    """

    def __init__(self, method: Method, image_size: int, clock: Clock):
        """Args: method: with statuses. clock: of the run."""
        image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
        self.statuses, self._clock = method.statuses, clock
        self._ways = [
            tuple(_way(method.in_status(i).traffic(image), up) for up in (True, False))
            for i in range(len(method.statuses))
        ]

    def add(self, dispatch: Dispatch, status: int) -> list[dict[str, int]]:
        """Adds a dispatch of a round with this status; the lines of its steps in the log."""
        clock, lines = self._clock, []
        (up, down), (full_up, full_down) = self._ways[status], self._ways[0]
        for counts in _counts(dispatch):
            clock.bytes_up += counts.bytes_of(up)
            clock.bytes_down += counts.bytes_of(down)
            clock.bytes_up_unsaved += counts.bytes_of(full_up)
            clock.bytes_down_unsaved += counts.bytes_of(full_down)
            lines.append(
                {"status": status, "bytes_up": clock.bytes_up, "bytes_down": clock.bytes_down}
            )
        if dispatch.ends_round:
            name = self.statuses[status].name
            clock.rounds_by_status[name] = clock.rounds_by_status.get(name, 0) + 1
        return lines

    def facts(self) -> Facts:
        """What the whole run has exchanged, for the summary."""
        clock = self._clock
        rounds = {s.name: clock.rounds_by_status.get(s.name, 0) for s in self.statuses}
        sent = clock.bytes_up + clock.bytes_down
        unsaved = clock.bytes_up_unsaved + clock.bytes_down_unsaved
        saved = 100 * (1 - sent / unsaved) if unsaved else 0.0
        values = {
            "rounds_by_status": rounds,
            "bytes_up": clock.bytes_up,
            "bytes_down": clock.bytes_down,
            "bytes_up_unsaved": clock.bytes_up_unsaved,
            "bytes_down_unsaved": clock.bytes_down_unsaved,
            "bytes_saved_percent": saved,
        }
        each = ", ".join(f"{rounds[s.name]} in {s.name} ({s.words})" for s in self.statuses)
        note = (
            f"rounds: {each}; {clock.bytes_up / 1e6:,.2f} MB up, {clock.bytes_down / 1e6:,.2f} MB"
            f" down, {saved:.1f} % less than with all rounds in {self.statuses[0].name}"
        )
        return Facts(values, (note,))


def _counts(dispatch: Dispatch) -> Sequence[_Counts]:
    """Of each step of a dispatch."""
    participants = int(np.count_nonzero(dispatch.cohort != PADDING))
    return [
        _Counts(
            images=int(images),
            syncs=participants * bool(sync),
            starts=participants * (dispatch.begins_round and index == 0),
        )
        for index, (images, sync) in enumerate(
            zip(dispatch.mask.sum(axis=(1, 2)), dispatch.sync, strict=True)
        )
    ]


def _way(messages: Sequence[Message], up: bool) -> _Way:
    """Args: messages: of a client with one image a step."""
    sizes = {"step": 0, "sync": 0, "round": 0, "once": 0}
    for message in messages:
        if message.up == up:
            sizes[message.when] += bytes_of(message.content)
    return _Way(sizes["step"], sizes["sync"], sizes["round"])
