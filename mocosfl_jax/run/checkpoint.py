"""Checkpoints of everything a run needs to go on: state, position and clocks, through Orbax.

A checkpoint also carries the config and the data set of its run, and a digest of all that it holds.
On a restart the newest one that passes counts; those that do not are set aside, never deleted.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import xxhash
from jax.experimental import multihost_utils

from mocosfl_jax.config import Resolved
from mocosfl_jax.config.recipe import FormerLayout, find_recipe
from mocosfl_jax.config.stored import config_from_json, differences, run_values, to_json
from mocosfl_jax.errors import InputError, quiet_logs
from mocosfl_jax.run.clock import Clock
from mocosfl_jax.run.storage import StorageError, reason, writing

LAYOUT = 2
"""Of the state in a checkpoint; those of version 0.1 do not say theirs (`Recipe.former`)."""


@dataclasses.dataclass(frozen=True)
class Identity:
    """Which run a checkpoint belongs to.

    config: resolved. data: digest of the data set's fingerprint (`data_digest`); the path to the
    data may change, this may not.
    """

    config: Resolved
    data: str

    def to_json(self) -> dict[str, Any]:
        return {"config": to_json(self.config), "data": self.data}

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that stand for the run, wherever its data lie."""
        values = {n: v for n, v in run_values(self.config).items() if n != "dataset"}
        return data_digest({**values, "": self.data})

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
    """Steps of the checkpoints in a folder, good or bad, the newest first.

    Raises: InputError: the folder cannot be read.
    """
    steps = [int(name) for name in _names(folder) if re.fullmatch(r"0|[1-9][0-9]*", name)]
    return sorted(steps, reverse=True)


def has_unfinished(folder: Path) -> bool:
    """Whether a process was killed while it saved its state there."""
    return any("orbax-checkpoint-tmp" in name for name in _names(folder))


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()] if folder.is_dir() else []
    except OSError as error:
        raise InputError(str(folder), reason(error), "a readable folder is needed") from None


def find_newest(
    folder: Path,
    abstract_state: Any,
    identity: Identity,
    agree: Callable[[dict[str, Any]], None] | None = None,
    only: int | None = None,
) -> Found:
    """Restores the newest good checkpoint; changes nothing on disk.

    Args:
      folder: of the checkpoints.
      abstract_state: `jax.ShapeDtypeStruct` leaves, with shardings.
      identity: of the run that goes on.
      agree: makes sure that all processes of the run have the same values (`Startup.agree`).
      only: the one step that counts; None: all do.
    Raises: InputError: by `agree`, if processes do not see the same files.
    """
    bad: dict[int, str] = {}
    steps = [step for step in saved_steps(folder) if only in (None, step)]
    if agree is not None:
        agree({f"steps in {folder.name}": steps})
    for step in steps:
        path, refusal = folder / str(step), None
        try:
            with quiet_logs():
                read = _read(path, abstract_state, identity)
        except _UnusableError as error:
            refusal = str(error)
        except Exception as error:  # Orbax and TensorStore raise almost anything on damaged files
            _check_readable(path, error)
            odd = isinstance(error, _ODD_METADATA)
            refusal = f"damaged: {'its metadata cannot be read' if odd else reason(error)}"
        if agree is not None:  # before leaves that are spread over processes are gathered
            agree({f"checkpoint {step}": "unusable" if refusal else "readable"})
        if refusal is None:
            refusal = _damage(read, step)
        if refusal is None:
            state = read.state
            if read.former is not None:
                state = read.former.from_former(state, abstract_state)
            return Found(Restored(step, state, Clock.from_json(read.clock)), bad)
        bad[step] = refusal
    return Found(None, bad)


_ODD_METADATA = (AttributeError, KeyError, TypeError, json.JSONDecodeError)
_NOT_ITS_FAULT = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def _check_readable(path: Path, error: Exception) -> None:
    """Raises: InputError: a file could not be read, which does not mean that it is damaged."""
    denied = re.search("permission.denied", str(error), re.IGNORECASE) is not None
    failing = isinstance(error, OSError) and error.errno in _NOT_ITS_FAULT
    if denied or failing or isinstance(error, PermissionError | MemoryError):
        raise InputError(str(path), reason(error), "a readable checkpoint is needed") from None


class _UnusableError(Exception):
    """A checkpoint of another run."""


class _Read(NamedTuple):
    """What lies in a checkpoint.

    state: as it is stored. former: the layout of a version before this one, else None. seal: None
    in a checkpoint of version 0.1.0, which wrote none.
    """

    state: Any
    former: FormerLayout | None
    clock: dict[str, Any]
    seal: dict[str, Any] | None


def _damage(read: _Read, step: int) -> str | None:
    """What is wrong with a checkpoint that could be read; None: nothing."""
    if read.seal is None and "counts_padding" in read.clock:  # 0.1.0 did not know this field
        return "damaged: its seal is missing"
    if read.seal is not None and digest(read.state, read.clock) != read.seal["digest"]:
        return "damaged: its digest does not match"
    if int(read.state.step) != step:
        return f"damaged: it holds step {int(read.state.step)}"
    return None


def _read(path: Path, abstract_state: Any, identity: Identity) -> _Read:
    alone = ocp.options.MultiprocessingOptions(  # a process that fails must keep none waiting
        primary_host=jax.process_index(), active_processes={jax.process_index()}
    )
    handlers: dict[str, Any] = {
        "state": ocp.StandardCheckpointHandler(multiprocessing_options=alone),
        "clock": ocp.JsonCheckpointHandler(multiprocessing_options=alone),
    }
    small: dict[str, Any] = {"clock": ocp.args.JsonRestore()}
    if (path / "seal").exists():
        handlers["seal"] = ocp.JsonCheckpointHandler(multiprocessing_options=alone)
        small["seal"] = ocp.args.JsonRestore()
    composite = ocp.CompositeCheckpointHandler(**handlers)
    with ocp.Checkpointer(composite, multiprocessing_options=alone) as checkpointer:
        found = checkpointer.restore(path, ocp.args.Composite(**small))
        seal = found.seal if "seal" in small else None
        if seal is not None and seal.get("layout", LAYOUT) > LAYOUT:
            raise _UnusableError("written by a newer version")
        if seal is not None and (refusal := identity.refusal(seal)):
            raise _UnusableError(refusal)
        former = None
        if seal is None or "layout" not in seal:
            former = find_recipe(identity.config.method).former
        shapes = abstract_state if former is None else former.to_former(abstract_state)
        stored = _as_stored(shapes, handlers["state"].metadata(path / "state").tree)
        state_args = ocp.args.Composite(state=ocp.args.StandardRestore(stored))
        state = _as_shaped(checkpointer.restore(path, state_args).state, shapes)
        return _Read(state, former, found.clock, seal)


def _as_stored(shapes: Any, stored: Any) -> Any:
    """The leaves of `shapes` in the containers of a checkpoint.

    A checkpoint is its arrays by their names. Orbax compares empty nodes as well, so that a field
    which is None could not be added to the state.

    Raises: ValueError: the checkpoint has other arrays.
    """
    wanted, found = _by_name(shapes), _by_name(stored)
    if others := wanted.keys() ^ found.keys():
        kind = "lacks" if others & wanted.keys() else "has also"
        raise ValueError(f"it {kind} the array {min(others)}")
    return jax.tree.unflatten(jax.tree.structure(stored), [wanted[name] for name in found])


def _as_shaped(stored: Any, shapes: Any) -> Any:
    """The leaves that were read in the containers of `shapes`."""
    found = _by_name(stored)
    return jax.tree.unflatten(jax.tree.structure(shapes), [found[x] for x in _by_name(shapes)])


def _by_name(tree: Any) -> dict[str, Any]:
    """Leaves by the names of their fields, keys and positions, whatever the types around them."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def _barrier() -> Callable[..., None]:
    """Orbax's barrier of all processes, for those whose save has not failed.

    A thread of Orbax would wait for the others with the error in its hands, and they for it. What
    the main thread is handling when it saves is none of Orbax's errors, but a request to stop, say.
    """
    wait = ocp.multihost.get_barrier_sync_fn()

    def barrier(*, key: str, timeout_ms: int) -> None:
        error = sys.exc_info()[1]
        if error is not None and threading.current_thread() is not threading.main_thread():
            raise error
        wait(key=key, timeout_ms=timeout_ms)

    return barrier


class Checkpoints:
    """Asynchronous checkpoints under one folder, the latest `keep` of them.

    A checkpoint appears under its step only when complete, so a killed process leaves the one
    before. The digest is computed, and Orbax is called, in a thread: the loop launches the next
    dispatch meanwhile. With several processes Orbax is called from each main thread, in one order.
    Orbax and TensorStore have no common type for a full disk: any exception is a `StorageError`.
    """

    def __init__(self, folder: Path, keep: int, identity: Identity):
        self._folder, self._identity = folder, identity
        self._when_written: Callable[[], None] = lambda: None
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._starting: Future[None] | None = None
        self._told = False  # of a save that failed
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(
                barrier_sync_fn=_barrier(),
                post_finalization_callback=lambda: self._when_written(),
            ),
        )
        with writing(self._folder, Exception):
            self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
        self._newest = self._manager.latest_step()

    def save(self, step: int, state: Any, clock: Clock, when_written: Callable[[], None]) -> None:
        """Starts a save.

        Args:
          step: of the state; a step that is saved already is left as it is.
          state: a copy that is neither changed nor donated: it is read while the next dispatch
            runs, on CPU in place.
          clock: of this step.
          when_written: called in the background just before the checkpoint appears.
        Raises: StorageError: the save before failed.
        """
        if step == self._newest:
            return
        self.wait()  # `when_written` belongs to the save before
        self._newest, self._when_written = step, when_written
        seconds = dataclasses.asdict(clock)
        if jax.process_count() == 1:
            self._starting = self._thread.submit(self._start, step, state, seconds)
            return
        with self._telling():
            self._start(step, state, seconds)

    def wait(self) -> None:
        """Returns when the last save is complete.

        Raises: StorageError.
        """
        starting, self._starting = self._starting, None
        with self._telling():
            if starting is not None:
                starting.result()
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Raises: StorageError: the last save failed, and nobody has been told yet."""
        repeated = (Exception,) if self._told else ()  # Orbax raises once for each file that failed
        with contextlib.suppress(*repeated), writing(self._folder, Exception):
            try:
                self.wait()
            finally:
                self._thread.shutdown()
                self._manager.close()

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Raises: StorageError: whatever fails within; `close` then tells no more."""
        try:
            with writing(self._folder, Exception):
                yield
        except StorageError:
            self._told = True
            raise

    def _start(self, step: int, state: Any, clock: dict[str, Any]) -> None:
        seal = {"layout": LAYOUT, "digest": digest(state, clock), **self._identity.to_json()}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            clock=ocp.args.JsonSave(clock),
            seal=ocp.args.JsonSave(seal),
        )
        self._manager.save(step, args=args, force=True)
