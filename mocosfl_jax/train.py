"""The training loop, top to bottom."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from mocosfl_jax.build import partition_of, program_of
from mocosfl_jax.checkpoint import Checkpoints, Clock
from mocosfl_jax.config import Config
from mocosfl_jax.core.dispatch import DispatchOutput, Program
from mocosfl_jax.core.state import TrainState
from mocosfl_jax.data.cohort import CohortSampler
from mocosfl_jax.data.dataset import Dataset, channel_stats
from mocosfl_jax.data.feed import Dispatch, dispatches, prefetch
from mocosfl_jax.data.partition import ClientImages, describe
from mocosfl_jax.encoder import save_encoder
from mocosfl_jax.errors import InputError
from mocosfl_jax.evaluation.protocols import (
    EvaluationData,
    Splits,
    encode_splits,
    evaluation_data,
    knn_monitor,
    probe,
)
from mocosfl_jax.machine import device_memory_bytes, peak_memory_bytes, versions
from mocosfl_jax.models.split import Variables
from mocosfl_jax.placement import Placement, axes_of, make_placement
from mocosfl_jax.plan import check_fits, plan
from mocosfl_jax.processes import is_primary
from mocosfl_jax.progress import Progress
from mocosfl_jax.rounds import Cohort, place_inputs, run_constants
from mocosfl_jax.stopping import stop_requests
from mocosfl_jax.workdir import NoMetrics, WorkDir, open_metrics, read_json, write_json

Summary = dict[str, Any]


class NonFiniteError(ArithmeticError):
    """Training diverged; the message names the step."""


class Interrupted(Exception):  # noqa: N818  # a request, no error
    """A signal asked the run to stop, and its state is saved."""


def train(config: Config, dataset: Dataset, workdir: WorkDir) -> Summary:
    """Carries a resolved config to its end, from where the work directory left off.

    Returns: the summary, which is also written to DIR/summary.json.
    Raises:
      InputError: the directory holds a run with another config, or the data cannot give the cohort.
      NonFiniteError: a loss or parameter is not finite; the last good checkpoint stays.
      Interrupted: after SIGTERM or SIGINT; the same call resumes.
    """
    started = time.monotonic()

    # ------------------------------------------------------------------ what the config means
    config = with_channel_stats(config, dataset)
    placement = make_placement(config.devices, config.server_shards)
    program = program_of(config, axes_of(config.server_shards), placement.devices)
    cohort = Cohort(config, placement, program)
    check_fits(config, cohort.bytes_a_device(), device_memory_bytes())
    partition = partition_of(config, dataset)
    sampler = CohortSampler(partition, config.cohort_size, config.seed)
    workdir.claim(dataclasses.asdict(config))
    progress = Progress(config, is_primary())
    _describe(progress, partition, dataset)

    # ------------------------------------------------------------------------- start or resume
    checkpoints = Checkpoints(workdir.checkpoints_path, config.keep_checkpoints)
    state, clock = cohort.initial_state(), Clock()
    if checkpoints.latest_step() is not None:
        saved, clock = checkpoints.restore(cohort.abstract_unpadded(state))
        state = cohort.padded(saved)
        progress.say(f"resumed at step {int(state.step)} of {config.total_steps}")
    step = int(state.step)
    if step == config.total_steps and workdir.summary_path.exists():
        checkpoints.close()
        progress.say("this run is complete")
        return read_json(workdir.summary_path)
    metrics = open_metrics(workdir, step, config.tensorboard)
    recorder = Recorder(config, program, metrics, clock, progress)
    evaluator = Evaluator(config, placement, program, dataset, metrics, progress)
    wall_before = clock.wall_seconds

    def save(state: TrainState, step: int) -> None:
        metrics.flush()  # first: what a resume keeps must be on disk
        clock.wall_seconds = wall_before + time.monotonic() - started
        checkpoints.save(step, cohort.unpadded(state), clock)

    with contextlib.ExitStack() as cleanup:
        for open_file in (checkpoints, metrics, progress):
            cleanup.callback(open_file.close)
        stop = cleanup.enter_context(stop_requests())
        if step == 0:
            clock.knn_top1_at_init = evaluator.knn(state, 0)
        elif monitor_due(config, step) and clock.monitored_step < step:
            evaluator.knn(state, step)  # a signal came before it
            clock.monitored_step = step

        # ------------------------------------------------------------------------------ the loop
        constants = run_constants(config, placement)
        advance: dict[int, Callable] = {}  # compiled dispatches by number of steps
        progress.start(step)
        feed = dispatches(config, partition, sampler, cohort.slots, step)
        to_device = partial(place_inputs, placement, dataset.train.images)
        for dispatch, cohort_ids, inputs in prefetch(feed, to_device):
            if dispatch.begins_round:
                state = cohort.begin(state, cohort_ids)
            steps = len(dispatch.sync_now)
            if steps not in advance:
                recorder.drain()
                advance[steps], seconds = compile_dispatch(
                    placement.dispatch(program, state), state, inputs, *constants
                )
                clock.compile_seconds += seconds
                progress.say(f"compiled in {seconds:.1f} s")
                recorder.start_lap()
            state, output = advance[steps](state, inputs, *constants)
            step = dispatch.step + steps
            if dispatch.ends_round:
                state = cohort.end(state)
            recorder.push(dispatch, output)  # waits for the dispatch before, while this one runs
            if stop.requested():
                recorder.drain()
                save(state, step)
                raise Interrupted(f"stopped at step {step} of {config.total_steps}, which is saved")
            if not dispatch.ends_round:
                continue
            if monitor_due(config, step):
                recorder.drain()
                evaluator.knn(state, step)
                clock.monitored_step = step
                recorder.start_lap()
            if (dispatch.round + 1) % config.checkpoint_every == 0 or step == config.total_steps:
                recorder.drain()  # raises before anything non-finite is saved
                save(state, step)
                variables = placement.fetch(variables_of(state))
                if is_primary():
                    save_encoder(workdir.encoder_path, config, variables)
                recorder.start_lap()

        # ------------------------------------------------------------------------- at the end
        results = evaluator.final(state, step)
        clock.wall_seconds = wall_before + time.monotonic() - started
        summary = summarize(config, clock, results, dataset, placement)
        if is_primary():
            write_json(workdir.summary_path, summary)
    return summary


# -------------------------------------------------------------------------------------- checks


def with_channel_stats(config: Config, dataset: Dataset) -> Config:
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


def variables_of(state: TrainState) -> Variables:
    """The online network between rounds: the clients' common model and the server's."""
    return Variables(state.population.params, state.server.params, state.server.stats)


def monitor_due(config: Config, step: int) -> bool:
    """Whether the kNN monitor runs after this step; the last model has its own evaluation."""
    rounds, rest = divmod(step, config.steps_per_round)
    if rest or not config.knn_every or step == config.total_steps:
        return False
    return rounds % config.knn_every == 0


def compile_dispatch(jitted: Any, *args: Any) -> tuple[Callable[..., Any], float]:
    """The compiled dispatch, and the seconds that tracing and compiling took."""
    started = time.monotonic()
    compiled = jitted.lower(*args).compile()
    return compiled, time.monotonic() - started


class Recorder:
    """Logs, clocks and checks dispatches, one behind the device so that it never idles."""

    def __init__(
        self, config: Config, program: Program, metrics: NoMetrics, clock: Clock, progress: Progress
    ):
        self._rows = config.cohort_size * config.batch_size
        self._rate = lambda step: config.learning_rate * float(program.schedule(step))
        self._metrics, self._clock, self._progress = metrics, clock, progress
        self._pending: tuple[Dispatch, DispatchOutput] | None = None
        self._lap = time.monotonic()

    def start_lap(self) -> None:
        """Leaves out of the training time what was done since the last dispatch."""
        self._lap = time.monotonic()

    def push(self, dispatch: Dispatch, output: DispatchOutput) -> None:
        """Takes note of a running dispatch and settles the one before."""
        self.drain()
        self._pending = dispatch, output

    def drain(self) -> None:
        """Waits for the pending dispatch, checks it and logs its steps.

        Raises: NonFiniteError.
        """
        if self._pending is None:
            return
        (dispatch, output), self._pending = self._pending, None
        loss, accuracy = np.asarray(output.loss), np.asarray(output.accuracy)
        seconds = time.monotonic() - self._lap
        self.start_lap()
        check_finite(dispatch.step, loss, bool(output.finite))
        rows = self._rows * len(loss)
        self._clock.train_seconds += seconds
        self._clock.trained_images += rows
        for index in range(len(loss)):
            self._metrics.add(
                dispatch.step + index + 1,
                round=dispatch.round,
                loss=float(loss[index]),
                accuracy=float(accuracy[index]),
                learning_rate=self._rate(dispatch.step + index),
                images_per_second=rows / seconds,
            )
        self._progress.advance(len(loss), float(loss[-1]), rows / seconds)


def check_finite(first_step: int, loss: np.ndarray, finite: bool) -> None:
    """Raises: NonFiniteError: a loss, or a parameter after the last step, is not finite."""
    bad = np.flatnonzero(~np.isfinite(loss))
    if bad.size:
        raise NonFiniteError(f"the loss of step {first_step + int(bad[0]) + 1} is {loss[bad[0]]}")
    if not finite:
        raise NonFiniteError(f"a parameter is not finite after step {first_step + len(loss)}")


class Evaluator:
    """The protocols on the state between rounds; says once why they are skipped, if so."""

    def __init__(
        self,
        config: Config,
        placement: Placement,
        program: Program,
        dataset: Dataset,
        metrics: NoMetrics,
        progress: Progress,
    ):
        self._config, self._model, self._placement = config, program.method.model, placement
        self._metrics, self._progress = metrics, progress
        self._data = evaluation_data(dataset)
        if isinstance(self._data, str):
            progress.say(f"kNN and linear probe are skipped: {self._data}")

    def knn(self, state: TrainState, step: int) -> float | None:
        """kNN top-1 in percent, logged; None where it is skipped."""
        if isinstance(self._data, str):
            return None
        splits = self._encoded(state, self._data)
        return self._knn(splits, step, self._data.num_classes)

    def final(self, state: TrainState, step: int) -> dict[str, float | None]:
        """kNN and linear probe of the last model, features encoded once."""
        results: dict[str, float | None] = dict.fromkeys(
            ("knn_top1", "linear_top1", "linear_top1_best_test_epoch")
        )
        if isinstance(self._data, str):
            return results
        splits = self._encoded(state, self._data)
        results["knn_top1"] = self._knn(splits, step, self._data.num_classes)
        if self._config.probe_epochs:
            result = probe(self._config, splits, self._data.num_classes)
            results["linear_top1"] = result.top1_last
            results["linear_top1_best_test_epoch"] = result.top1_best_test_epoch
            self._progress.say(f"linear probe {result.top1_last:.2f} %")
            self._metrics.add(step, linear_top1=result.top1_last)
        return results

    def _encoded(self, state: TrainState, data: EvaluationData) -> Splits:
        variables = variables_of(state)
        return encode_splits(self._config, self._model, variables, data, self._placement)

    def _knn(self, splits: Splits, step: int, num_classes: int) -> float:
        top1 = knn_monitor(self._config, splits, num_classes, self._placement)
        self._metrics.add(step, knn_top1=top1)
        self._progress.say(f"step {step} of {self._config.total_steps}: kNN {top1:.2f} %")
        return top1


def summarize(
    config: Config,
    clock: Clock,
    results: dict[str, float | None],
    dataset: Dataset,
    placement: Placement,
) -> Summary:
    """What DIR/summary.json holds; accuracies in percent, sizes in bytes."""
    sizes = plan(config)
    pace = clock.trained_images / clock.train_seconds if clock.train_seconds else None
    return {
        **results,
        "knn_top1_at_init": clock.knn_top1_at_init,
        "test_images": len(dataset.test.images) if dataset.test else 0,
        "steps": config.total_steps,
        "rounds": config.rounds,
        "images_per_second": pace,
        "compile_seconds": clock.compile_seconds,
        "wall_seconds": clock.wall_seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "num_clients": config.num_clients,
        "cut": config.cut,
        "client_params": sizes.client_params,
        "server_params": sizes.server_params,
        "bytes_up_per_client_round": sizes.bytes_up_per_client_round,
        "bytes_down_per_client_round": sizes.bytes_down_per_client_round,
        "seed": config.seed,
        "device": jax.devices()[0].device_kind,
        "devices": placement.devices,
        "processes": jax.process_count(),
        "versions": versions(),
    }


def _describe(progress: Progress, partition: ClientImages, dataset: Dataset) -> None:
    facts = describe(partition, dataset.train.labels, dataset.info.num_classes)
    progress.say("partition: " + ", ".join(f"{name} {value}" for name, value in facts.items()))
