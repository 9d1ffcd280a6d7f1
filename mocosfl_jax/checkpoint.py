"""Checkpoints of everything a run needs to go on: state, position and clocks, through Orbax."""

import dataclasses
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp


@dataclasses.dataclass
class Clock:
    """Totals over all processes that worked on a run, up to a checkpoint.

    wall_seconds: from the start of each process. compile_seconds: tracing and compiling the
    dispatch. train_seconds: in dispatches, compile and evaluation excluded. trained_images: rows of
    the steps behind train_seconds. knn_top1_at_init: percent, of the untrained encoder.
    monitored_step: step of the last kNN monitor.
    """

    wall_seconds: float = 0.0
    compile_seconds: float = 0.0
    train_seconds: float = 0.0
    trained_images: int = 0
    knn_top1_at_init: float | None = None
    monitored_step: int = 0


class Checkpoints:
    """Asynchronous checkpoints under one folder, the latest `keep` of them.

    A checkpoint appears under its step only when complete, so a killed process leaves the one
    before.
    """

    def __init__(self, folder: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Any, clock: Clock) -> None:
        """Starts a save.

        Args: state: a copy that is neither changed nor donated: Orbax reads its buffers while the
          next dispatch runs, on CPU in place.
        """
        if step == self._manager.latest_step():
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            clock=ocp.args.JsonSave(dataclasses.asdict(clock)),
        )
        self._manager.save(step, args=args, force=True)

    def restore(self, abstract_state: Any) -> tuple[Any, Clock]:
        """The latest state and clock.

        Args: abstract_state: `jax.ShapeDtypeStruct` leaves, with shardings.
        """
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract_state), clock=ocp.args.JsonRestore()
        )
        restored = self._manager.restore(self._manager.latest_step(), args=args)
        return restored.state, Clock(**restored.clock)

    def wait(self) -> None:
        """Returns when the last save is complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()
