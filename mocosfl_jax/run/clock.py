"""What a run has taken and sent so far; a part of its checkpoints."""

import dataclasses
from typing import Any


@dataclasses.dataclass
class Clock:
    """Totals over all processes that worked on a run, up to a checkpoint.

    wall_seconds: from the start of each process. compile_seconds: tracing and compiling the
    dispatch. train_seconds: in dispatches, compilation and evaluation excluded. trained_images: of
    the steps behind train_seconds, padding excluded. knn_top1_at_init: percent, of the first
    encoder. monitored_step: step of the last kNN monitor. counts_padding: whether trained_images
    does, as in version 0.1.0, which did not store this field.
    Where rounds differ in what is sent (`Ledger`): bytes_up, bytes_down: that clients have sent and
    received. bytes_up_unsaved, bytes_down_unsaved: the same if all rounds were of the first status.
    rounds_by_status: that have ended, by the status's name.
    """

    wall_seconds: float = 0.0
    compile_seconds: float = 0.0
    train_seconds: float = 0.0
    trained_images: int = 0
    knn_top1_at_init: float | None = None
    monitored_step: int = 0
    counts_padding: bool = False
    bytes_up: int = 0
    bytes_down: int = 0
    bytes_up_unsaved: int = 0
    bytes_down_unsaved: int = 0
    rounds_by_status: dict[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Clock":
        """A stored clock; one that counted padding (version 0.1.0) starts its pace anew."""
        clock = cls(**{"counts_padding": True, **stored})
        if clock.counts_padding:
            clock.train_seconds, clock.trained_images, clock.counts_padding = 0.0, 0, False
        return clock
