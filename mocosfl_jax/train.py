"""The training loop, top to bottom."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from mocosfl_jax.config import Resolved
from mocosfl_jax.config.data import mixed_partition_of, partition_of, sampler_of
from mocosfl_jax.config.recipe import find_recipe
from mocosfl_jax.config.stored import flat_fields, to_json
from mocosfl_jax.data.dataset import Dataset, DatasetInfo, channel_stats
from mocosfl_jax.errors import InputError
from mocosfl_jax.federated.placement import make_placement
from mocosfl_jax.federated.state import TrainState
from mocosfl_jax.machine import device_memory_bytes, machine_memory_bytes
from mocosfl_jax.models.split import Variables
from mocosfl_jax.run.checkpoint import (
    Checkpoints,
    Identity,
    data_digest,
    find_newest,
    saved_steps,
)
from mocosfl_jax.run.clock import Clock
from mocosfl_jax.run.encoder_file import encoder_step, save_encoder, weights_digest
from mocosfl_jax.run.evaluator import Evaluator
from mocosfl_jax.run.feed import dispatches, most_draws, prefetch
from mocosfl_jax.run.ledger import Ledger
from mocosfl_jax.run.metrics import (
    Board,
    Line,
    Metrics,
    MetricsFile,
    missing_steps,
    read_metrics,
)
from mocosfl_jax.run.plan import check_clients_fit, check_fits, plan
from mocosfl_jax.run.processes import Startup, common_fields, is_primary, several
from mocosfl_jax.run.program import check_labels, program_of
from mocosfl_jax.run.progress import Progress, describe_data, padding_line
from mocosfl_jax.run.recorder import CollapseError, NonFiniteError, Recorder
from mocosfl_jax.run.rounds import Rounds, place_inputs, run_constants
from mocosfl_jax.run.source import load_source, with_init_digest
from mocosfl_jax.run.stopping import StopRequest, StopRequested, stop_requests
from mocosfl_jax.run.storage import StorageError, write_json
from mocosfl_jax.run.summary import Summary, read_summary, summarize
from mocosfl_jax.run.workdir import WorkDir, check_resumable, with_stored_stats

__all__ = ["CollapseError", "Interrupted", "NonFiniteError", "finished", "train"]


class Interrupted(Exception):  # noqa: N818  # a request, no error
    """A signal asked the run to stop, and its state is saved."""


def train(
    config: Resolved, dataset: Dataset, workdir: WorkDir, startup: Startup | None = None
) -> Summary:
    """Carries a resolved config to its end, from where the work directory left off.

    Args:
      config: resolved.
      dataset: that it names.
      workdir: the run's folder.
      startup: shares refusals between processes until all have started.

    Returns: the summary, which is also written to DIR/summary.json.
    Raises:
      InputError: the directory holds a run with another config or on other data, or nothing that a
        run could go on from, or the data have no labels and the method takes them, or they cannot
        give the cohort. Nothing has been changed.
      NonFiniteError: a loss or parameter is not finite; the last good checkpoint stays.
      CollapseError: the loss was at chance for a round; the state is saved.
      StorageError: a file cannot be written; the last good checkpoint stays.
      Interrupted: after SIGTERM or SIGINT; the same call resumes.
    """
    started, startup = time.monotonic(), startup or Startup()
    progress = Progress(config, is_primary())
    if config.init_digest is None:  # the command has filled it
        config = with_init_digest(config, workdir.stored and workdir.stored.config)
    summary = finished(config, dataset.info, workdir, startup)
    if summary is not None:
        startup.ready()
        progress.say("this run is complete")
        return summary

    # ------------------------------------------------------------------ what the config means
    config = with_channel_stats(workdir.claim(config, dataset.info), dataset)
    workdir.check_same(config)
    placement = make_placement(config.devices, config.server_shards)
    program = program_of(config, placement)
    check_labels(config, program, dataset.info)
    sizes = plan(config)  # not after the training: a method of one's own may lack something
    rounds = Rounds(config, placement, program)
    check_fits(config, rounds.bytes_a_device(), device_memory_bytes(placement.local_devices))
    check_clients_fit(config, machine_memory_bytes())
    partition = partition_of(config, len(dataset.train.images), dataset.train.labels)
    mixed = mixed_partition_of(config, dataset.info)
    sampler = sampler_of(config, partition)
    lines = read_metrics(workdir.metrics_path)
    check_resumable(workdir, config, lines)
    identity = Identity(config, data_digest(dataset.info.fingerprint))
    if several():
        workdir.mark()
    startup.agree({"fingerprint of config.dataset": identity.data})
    startup.agree(common_fields(flat_fields(to_json(config))))
    startup.agree({"folder of --workdir": workdir.read_mark()})

    with contextlib.ExitStack() as cleanup:
        # --------------------------------------------------------------------- start or resume
        stop = cleanup.enter_context(stop_requests())  # left last: a save may still be under way
        begun = begin_or_resume(workdir, rounds, identity, lines, progress, startup)
        state, clock, step = begun.state, begun.clock, begun.step
        wall_before = clock.wall_seconds
        workdir.record(config, dataset.info)
        describe_data(progress, partition, dataset)
        if line := padding_line(rounds.slots, placement.devices):
            progress.say(line)
        if step:
            progress.say(f"resumed at step {step} of {config.total_steps}")
        if begun.gaps:
            progress.say(f"{workdir.metrics_path.name} lacks the steps {_ranges(begun.gaps)}")
        checkpoints = Checkpoints(workdir.checkpoints_path, config.keep_checkpoints, identity)
        cleanup.callback(checkpoints.close)
        metrics = open_metrics(workdir, config, begun.lines, step)
        startup.ready()
        method = program.method
        ledger = Ledger(method, config.image_size, clock) if method.statuses else None
        recorder = Recorder(metrics, clock, progress, method.chance, ledger)
        recorder.recall(begun.lines, step, config.steps_per_round)
        for open_file in (metrics, recorder, progress):
            cleanup.callback(open_file.close)
        cleanup.push(partial(tell_others, stop, workdir))  # before a save that waits for them
        evaluator = Evaluator(
            config, placement, method.model, dataset, metrics, progress, stop.check
        )

        def network() -> Variables:
            return rounds.network(state, step)

        def write_encoder(variables: Variables, step: int) -> None:
            if is_primary() and encoder_step(workdir.encoder_path) != step:
                save_encoder(workdir.encoder_path, config, variables, step)

        def save() -> None:
            metrics.flush()  # first: what a resume keeps must be on disk
            clock.wall_seconds = wall_before + time.monotonic() - started
            write = partial(write_encoder, placement.fetch(network()), step)
            checkpoints.save(step, rounds.unpadded(state), clock, write)

        try:
            recorder.check()  # a run that has collapsed is not carried on
            if step:
                # That of a later step may lie here, or none.
                write_encoder(placement.fetch(network()), step)
            if step == 0:
                clock.knn_top1_at_init = evaluator.knn(network(), 0)
            elif monitor_due(config, step) and clock.monitored_step < step:
                evaluator.knn(network(), step)  # a signal came before it
                clock.monitored_step = step

            # -------------------------------------------------------------------------- the loop
            constants = run_constants(config, placement)
            advance: dict[tuple[int, int], Callable] = {}  # compiled, by number of steps and status
            status = rounds.status(state)
            progress.start(step)
            feed = dispatches(config, partition, sampler, rounds.slots, step, mixed)
            to_device = partial(place_inputs, placement, dataset, method.labels)
            for dispatch, cohort_ids, inputs in prefetch(feed, to_device):
                if dispatch.begins_round:
                    state = rounds.begin(state, cohort_ids)
                    status = rounds.status(state)
                steps = len(dispatch.sync)
                kind = (steps, status)
                if kind not in advance:
                    recorder.drain()
                    stop.check()
                    jitted = placement.dispatch(program.in_status(status), state)
                    advance[kind], seconds = compile_dispatch(jitted, state, inputs, constants)
                    clock.compile_seconds += seconds
                    progress.say(f"compiled in {seconds:.1f} s")
                    stop.check()
                    recorder.start_lap()
                state, output = advance[kind](state, inputs, constants)
                step = dispatch.step + steps
                if dispatch.ends_round:
                    state = rounds.end(state)
                # Waits for the one before, while this one runs.
                recorder.push(dispatch, output, status)
                stop.check()
                recorder.check()
                if not dispatch.ends_round:
                    continue
                if monitor_due(config, step):
                    recorder.drain()
                    evaluator.knn(network(), step)
                    clock.monitored_step = step
                    recorder.start_lap()
                if checkpoint_due(config, step):
                    recorder.drain()  # raises before anything non-finite is saved
                    save()
                    recorder.start_lap()

            # -------------------------------------------------------------------------- at the end
            recorder.drain()
            recorder.check()
            results = evaluator.final(network(), step)
        except (StopRequested, CollapseError) as reason:
            if step == 0:
                raise Interrupted("stopped before the first step") from None
            recorder.drain()
            save()
            text = f"stopped at step {step} of {config.total_steps}, which is saved"
            if isinstance(reason, CollapseError):
                raise CollapseError(f"{reason}; {text}") from None
            raise Interrupted(text) from None
        checkpoints.wait()
        metrics.flush()
        clock.wall_seconds = wall_before + time.monotonic() - started
        encoder = weights_digest(workdir.encoder_path)
        most = partial(most_draws, config, dataset.info, partition)
        facts = find_recipe(config.method).facts(config, most)
        facts = facts.with_others(ledger.facts()) if ledger else facts
        digest, gaps = identity.digest, begun.gaps
        summary = summarize(
            config, digest, encoder, clock, results, dataset, placement, gaps, facts, sizes
        )
        if is_primary():
            write_json(workdir.summary_path, summary)
    return summary


# ------------------------------------------------------------------------------ start or resume


class Begun(NamedTuple):
    """Where a run begins or goes on.

    state, clock, step: of the checkpoint, or of the start. lines: of its metrics up to the step.
    gaps: first and last of the steps that they lack.
    """

    state: TrainState
    clock: Clock
    step: int
    lines: dict[int, Line]
    gaps: list[list[int]]


def begin_or_resume(
    workdir: WorkDir,
    rounds: Rounds,
    identity: Identity,
    lines: dict[int, Line],
    progress: Progress,
    startup: Startup,
) -> Begun:
    """Takes the newest good checkpoint, or starts. What does not belong to it is set aside.

    Args: lines: all that metrics.jsonl has.
    Raises: InputError: there are checkpoints, but none is good, or no network to start from;
    nothing has been changed.
    StorageError.
    """
    folder = workdir.checkpoints_path
    found = find_newest(folder, rounds.abstract_unpadded(), identity, startup.agree)
    reasons = "; ".join(f"{step}: {why}" for step, why in found.bad.items())
    if found.bad and found.restored is None:
        raise InputError(str(folder), sorted(found.bad), f"none can be used ({reasons})")
    if found.bad:
        progress.say(f"checkpoints that cannot be used are set aside ({reasons})")
    step = found.restored.step if found.restored else 0
    starts = found.restored is None and identity.config.init_from is not None
    source = load_source(identity.config) if starts else None
    if is_primary():
        unusable = [folder / str(step) for step in found.bad]
        if step < identity.config.total_steps:
            unusable.append(workdir.summary_path)
        if found.restored is None:  # killed before its first checkpoint was complete
            unusable += [workdir.encoder_path, *[workdir.metrics_path] * any(lines)]
        workdir.set_aside(path for path in unusable if path.exists())
    startup.agree({"step to go on from": step})  # all see the folder as it is now
    if found.restored is None:
        for note in source.notes if source else ():
            progress.say(note)
        loaded = source.variables if source else None
        return Begun(rounds.initial_state(loaded), Clock(), 0, {}, [])
    if workdir.stored is not None and workdir.stored.data is None:
        progress.say("this run has no record of its data set: the one found is taken for it")
    kept = {at: line for at, line in lines.items() if at <= step}
    state = rounds.padded(found.restored.state)
    return Begun(state, found.restored.clock, step, kept, missing_steps(lines, step))


def finished(
    config: Resolved, info: DatasetInfo, workdir: WorkDir, startup: Startup
) -> Summary | None:
    """The summary of a run that is complete, with the encoder that belongs to it.

    An encoder that is missing, of another step or of other weights is made again from the last
    checkpoint.

    Args:
      config: resolved, but for mean and std.
      info: of its data set, whose images are not read.
      workdir: the run's folder.
      startup: of several processes.
    Returns: None: something is left to do.
    Raises: InputError: another run lies here, or files that cannot be read. StorageError.
    """
    config = workdir.claim(config, info)
    stored, total = workdir.stored, config.total_steps
    if stored is None or not workdir.summary_path.exists():
        return None
    config = with_stored_stats(config, stored.config)
    identity = Identity(config, data_digest(info.fingerprint))
    summary = read_summary(workdir.summary_path)
    steps = saved_steps(workdir.checkpoints_path)
    run = summary.get("run", identity.digest)  # version 0.1.0 did not say
    if steps[:1] != [total] or summary["steps"] != total or run != identity.digest:
        return None
    path = workdir.encoder_path
    if encoder_step(path) == total and summary.get("encoder") in (None, weights_digest(path)):
        return summary  # version 0.1.0 did not store the digest
    placement = make_placement(config.devices, config.server_shards)
    program = program_of(config, placement)
    rounds = Rounds(config, placement, program)
    shapes, folder = rounds.abstract_unpadded(), workdir.checkpoints_path
    newest = find_newest(folder, shapes, identity, startup.agree).restored
    if newest is None or newest.step != total:
        return None
    variables = placement.fetch(rounds.network(rounds.padded(newest.state), total))
    if is_primary():
        save_encoder(workdir.encoder_path, config, variables, total)
    return summary


def open_metrics(
    workdir: WorkDir, config: Resolved, lines: dict[int, dict[str, Any]], step: int
) -> Metrics:
    """A file of the primary process that goes on after `lines`; the others take no notes.

    Raises: StorageError.
    """
    if not workdir.primary:
        return Metrics()
    board = Board(workdir.tensorboard_path, step + 1) if config.tensorboard else None
    return MetricsFile(workdir.metrics_path, lines, board)


def with_channel_stats(config: Resolved, dataset: Dataset) -> Resolved:
    """Fills mean and std from the train split where they are unset."""
    if config.mean is not None and config.std is not None:
        return config
    mean, std = channel_stats(dataset.train.images)
    if config.std is None and min(std) <= 0:
        raise InputError("config.std", None, "a channel of the train split is constant: set it")
    return dataclasses.replace(
        config,
        mean=config.mean or tuple(float(x) for x in mean),
        std=config.std or tuple(float(x) for x in std),
    )


# --------------------------------------------------------------------------------------- pieces


def tell_others(stop: StopRequest, workdir: WorkDir, _: Any, error: Any, traceback: Any) -> None:
    """Ends all processes if a file of this one cannot be written. Args: as of `__exit__`."""
    if isinstance(error, StorageError):
        stop.fail(workdir.explain(error))


def monitor_due(config: Resolved, step: int) -> bool:
    """Whether the kNN monitor runs after this step; the last model has its own evaluation."""
    rounds, rest = divmod(step, config.steps_per_round)
    if rest or not config.knn_every or step == config.total_steps:
        return False
    return rounds % config.knn_every == 0


def checkpoint_due(config: Resolved, step: int) -> bool:
    """Whether the state is saved after this step, the last of a round."""
    rounds = step // config.steps_per_round
    return rounds % config.checkpoint_every == 0 or step == config.total_steps


def compile_dispatch(jitted: Any, *args: Any) -> tuple[Callable[..., Any], float]:
    """The compiled dispatch, and the seconds that tracing and compiling took."""
    started = time.monotonic()
    compiled = jitted.lower(*args).compile()
    return compiled, time.monotonic() - started


def _ranges(gaps: list[list[int]]) -> str:
    return ", ".join(f"{a} to {b}" if a < b else str(a) for a, b in gaps)
