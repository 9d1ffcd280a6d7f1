"""Checkpoints of everything a run needs to go on: state, position and clocks, through Orbax.

A checkpoint also carries the config and the data set of its run, and a digest of all that it holds.
On a restart the newest one that passes counts; those that do not are set aside, never deleted.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import xxhash
from jax.experimental import multihost_utils

from mocosfl_jax.config import Config, config_from_json, differences
from mocosfl_jax.storage import StorageError, reason

SET_ASIDE = "set_aside"
"""Folder beside the checkpoints for what a restart could not use."""


@dataclasses.dataclass
class Clock:
    """Totals over all processes that worked on a run, up to a checkpoint.

    wall_seconds: from the start of each process. compile_seconds: tracing and compiling the
    dispatch. train_seconds: in dispatches, compilation and evaluation excluded. trained_images: of
    the steps behind train_seconds, padding excluded. knn_top1_at_init: percent, of the untrained
    encoder. monitored_step: step of the last kNN monitor.
    """

    wall_seconds: float = 0.0
    compile_seconds: float = 0.0
    train_seconds: float = 0.0
    trained_images: int = 0
    knn_top1_at_init: float | None = None
    monitored_step: int = 0
    counts_padding: bool = False

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Clock":
        """A stored clock; one that counted padding (version 0.1.0) starts its pace anew."""
        clock = cls(**{"counts_padding": True, **stored})
        if clock.counts_padding:
            clock.train_seconds, clock.trained_images, clock.counts_padding = 0.0, 0, False
        return clock


@dataclasses.dataclass(frozen=True)
class Identity:
    """Which run a checkpoint belongs to.

    config: resolved. data: digest of the data set's fingerprint (`data_digest`); the path to the
    data may change, this may not.
    """

    config: Config
    data: str

    def to_json(self) -> dict[str, Any]:
        return {"config": dataclasses.asdict(self.config), "data": self.data}

    def refusal(self, stored: dict[str, Any]) -> str | None:
        """Why a checkpoint with this stored identity is another run's; None if it is not."""
        config = config_from_json(stored["config"], "checkpoint")
        moved = dataclasses.replace(config, dataset=self.config.dataset)
        changed = differences(moved, self.config)
        if changed:
            return f"of a run with another config ({', '.join(changed)})"
        if stored["data"] != self.data:
            return "of a run on other data"
        return None


def data_digest(fingerprint: dict[str, Any]) -> str:
    """16 hexadecimal digits that stand for the fingerprint of a data set."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]


def digest(state: Any, clock: dict[str, Any]) -> str:
    """Of every leaf's name, type, shape and bytes, and of the clock: the same for any number of
    devices or processes and for any sharding.

    Args: state: a pytree of arrays; leaves that are spread over processes are gathered, so all
      processes must call this.
    """
    total = xxhash.xxh3_64(json.dumps(clock, sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        values = np.ascontiguousarray(_whole(leaf))
        name = f"{jax.tree_util.keystr(path)} {values.dtype} {values.shape}"
        total.update(name.encode())
        total.update(values.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def _whole(leaf: Any) -> np.ndarray:
    """A leaf on the host, gathered if it is spread over processes."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


class Restored(NamedTuple):
    """A good checkpoint."""

    step: int
    state: Any
    clock: Clock


class Found(NamedTuple):
    """What a folder of checkpoints holds.

    restored: the newest good one, or None. bad: step and reason of those newer than it.
    """

    restored: Restored | None
    bad: dict[int, str]


def saved_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, good or bad, the newest first."""
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir()]
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def has_unfinished(folder: Path) -> bool:
    """Whether a process was killed while it saved its state there."""
    return folder.is_dir() and any("orbax-checkpoint-tmp" in path.name for path in folder.iterdir())


def find_newest(folder: Path, abstract_state: Any, identity: Identity) -> Found:
    """Restores the newest good checkpoint; changes nothing on disk.

    Args:
      folder: of the checkpoints.
      abstract_state: `jax.ShapeDtypeStruct` leaves, with shardings.
      identity: of the run that goes on.
    """
    bad: dict[int, str] = {}
    for step in saved_steps(folder):
        try:
            with _quiet():
                restored = _restore(folder / str(step), step, abstract_state, identity)
        except _UnusableError as error:
            bad[step] = str(error)
        except Exception as error:  # Orbax and TensorStore raise almost anything on damaged files
            bad[step] = f"damaged: {reason(error)}"
        else:
            return Found(restored, bad)
    return Found(None, bad)


class _UnusableError(Exception):
    """An intact checkpoint of another run, or one whose digest does not match."""


def _restore(path: Path, step: int, abstract_state: Any, identity: Identity) -> Restored:
    alone = ocp.options.MultiprocessingOptions(  # a process that fails must keep none waiting
        primary_host=jax.process_index(), active_processes={jax.process_index()}
    )
    handlers: dict[str, Any] = {
        "state": ocp.StandardCheckpointHandler(multiprocessing_options=alone),
        "clock": ocp.JsonCheckpointHandler(multiprocessing_options=alone),
    }
    items: dict[str, Any] = {
        "state": ocp.args.StandardRestore(abstract_state),
        "clock": ocp.args.JsonRestore(),
    }
    if (path / "seal").exists():  # version 0.1.0 wrote none
        handlers["seal"] = ocp.JsonCheckpointHandler(multiprocessing_options=alone)
        items["seal"] = ocp.args.JsonRestore()
    composite = ocp.CompositeCheckpointHandler(**handlers)
    with ocp.Checkpointer(composite, multiprocessing_options=alone) as checkpointer:
        if "seal" in items:
            seal = checkpointer.restore(path, ocp.args.Composite(seal=items["seal"])).seal
            if refusal := identity.refusal(seal):
                raise _UnusableError(refusal)
        found = checkpointer.restore(path, ocp.args.Composite(**items))
    if "seal" in items and digest(found.state, found.clock) != found.seal["digest"]:
        raise _UnusableError("damaged: its digest does not match")
    if int(found.state.step) != step:
        raise _UnusableError(f"damaged: it holds step {int(found.state.step)}")
    return Restored(step, found.state, Clock.from_json(found.clock))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax's warnings on files that turn out damaged are for its developers."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def set_aside(workdir: Path, paths: list[Path]) -> None:
    """Renames files or folders of a run into DIR/set_aside, under names that are still free.

    Raises: StorageError.
    """
    target = workdir / SET_ASIDE
    for path in paths:
        try:
            target.mkdir(exist_ok=True)
            names = (path.name if n == 0 else f"{path.name}.{n}" for n in range(10**6))
            path.rename(next(target / name for name in names if not (target / name).exists()))
        except OSError as error:
            raise StorageError(path, error) from None


class Checkpoints:
    """Asynchronous checkpoints under one folder, the latest `keep` of them.

    A checkpoint appears under its step only when complete, so a killed process leaves the one
    before.
    """

    def __init__(self, folder: Path, keep: int, identity: Identity):
        self._folder, self._identity = folder, identity
        self._when_written: Callable[[], None] = _nothing
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._written),
        )
        with self._storage():
            self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step: int, state: Any, clock: Clock, when_written: Callable[[], None]) -> None:
        """Starts a save.

        Args:
          step: of the state; a step that is saved already is left as it is.
          state: a copy that is neither changed nor donated: Orbax reads its buffers while the
            next dispatch runs, on CPU in place.
          clock: of this step.
          when_written: called in the background just before the checkpoint appears.
        Raises: StorageError: this save, or the one before, failed.
        """
        if step == self._manager.latest_step():
            return
        with self._storage():
            self._manager.wait_until_finished()  # `when_written` belongs to the save before
            self._when_written = when_written
            seconds = dataclasses.asdict(clock)
            seal = {"digest": digest(state, seconds), **self._identity.to_json()}
            args = ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                clock=ocp.args.JsonSave(seconds),
                seal=ocp.args.JsonSave(seal),
            )
            self._manager.save(step, args=args, force=True)

    def wait(self) -> None:
        """Returns when the last save is complete.

        Raises: StorageError.
        """
        with self._storage():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Raises: StorageError: the last save failed, and nobody has been told yet."""
        with self._storage():
            try:
                self._manager.wait_until_finished()
            finally:
                self._manager.close()

    def _written(self) -> None:
        self._when_written()

    @contextlib.contextmanager
    def _storage(self) -> Iterator[None]:
        try:
            yield
        except StorageError:  # of the encoder, written with the checkpoint
            raise
        except Exception as error:  # Orbax and TensorStore have no common type for a full disk
            raise StorageError(self._folder, error) from error


def _nothing() -> None:
    """For processes that write no encoder."""
