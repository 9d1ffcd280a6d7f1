"""Command line: `python -m mocosfl_jax.evaluate --workdir DIR`, of a run, finished or not.

Options:
  --protocols A,B,...  of knn, linear, semi_supervised; default: all
  --dataset NAME       another data set, written as config.dataset is; default: the run's own
  --train_split NAME, --test_split NAME, --holdout_fraction X: how that data set is read
  --name NAME          its numbers are called transfer/NAME/...; default: after the data set
  --data_dir DIR       where TFDS data sets lie, if not where the run found its own

The newest encoder of the run is taken. Its numbers go into DIR/summary.json if the run is finished,
else into DIR/evaluation.json.

Exit status: 0 done; 1 a file could not be written; 2 bad input, one line on stderr; 143 or 130
stopped by SIGTERM or SIGINT, nothing written. Run the same command to start again, with the same
result.
"""

import contextlib
import dataclasses
from pathlib import Path

import jax

from mocosfl_jax.config import Config, Resolved
from mocosfl_jax.errors import InputError
from mocosfl_jax.evaluate.options import Options
from mocosfl_jax.evaluate.progress import Progress
from mocosfl_jax.evaluate.results import Network, ResultsFile
from mocosfl_jax.evaluate.source import Source, find_source
from mocosfl_jax.evaluation.knn import CHUNK
from mocosfl_jax.evaluation.protocols import PROTOCOLS, Evaluation, Results, encode_splits
from mocosfl_jax.evaluation.semi_supervised import FRACTIONS
from mocosfl_jax.federated.placement import make_placement
from mocosfl_jax.run.checkpoint import Identity, data_digest
from mocosfl_jax.run.console import answered, end
from mocosfl_jax.run.encoder_file import EncoderFile, file_of, read_encoder, weights_digest
from mocosfl_jax.run.options import define_options, options_of, parse_options, workdir_of
from mocosfl_jax.run.processes import use_compilation_cache
from mocosfl_jax.run.stopping import StopRequest, StopRequested, stop_requests
from mocosfl_jax.run.summary import numbers_table
from mocosfl_jax.run.virtual import use_virtual_devices
from mocosfl_jax.run.workdir import Stored, read_run

COMMAND = "mocosfl_jax.evaluate"


def main(argv: list[str]) -> int:
    """Runs one command; returns the exit status."""
    return answered(COMMAND, lambda: _command(argv))


def _command(argv: list[str]) -> int:
    """Raises: InputError; StorageError."""
    values = define_options(Options)
    parse_options(values, argv)
    if values.help:
        print(__doc__)
        return 0
    with stop_requests("stopping; a second signal stops at once") as stop:
        return _carry_out(workdir_of(values), options_of(values, Options), stop)


def _carry_out(workdir: Path, options: Options, stop: StopRequest) -> int:
    """Raises: InputError; StorageError."""
    stored = read_run(workdir)
    config = stored.config
    assert isinstance(config, Resolved), "of read_run"
    use_virtual_devices(config.devices or 1)
    use_compilation_cache(config.compilation_cache)
    encoder = read_encoder(workdir)
    with contextlib.closing(ResultsFile(workdir, _network(workdir, stored, encoder))) as results:
        source = find_source(options, stored)
        if source.transfer is not None:
            results.check_transfer(source.transfer, source.digest)
        unfinished = "" if results.finished else ", the run is not finished"
        print(f"encoder at step {encoder.step} of {config.total_steps}{unfinished}", flush=True)
        try:
            found = _evaluate(_with_probes(config), encoder, source, options.chosen, stop)
        except StopRequested:
            assert stop.came is not None, "a signal makes the request"
            words = "stopped, nothing is written; run the same command to start again"
            return end(COMMAND, words, 128 + stop.came)
        numbers = source.named(found)
        results.add(numbers)
    print("\n".join(numbers_table(numbers)))
    print(f"written to {results.path}")
    return 0


def _network(workdir: Path, stored: Stored, encoder: EncoderFile) -> Network:
    """Raises: InputError: an encoder of version 0.1.0, which says no step."""
    file = file_of(workdir)
    if encoder.step is None:
        allowed = "its training step is needed; the command of the run makes the file again"
        raise InputError(str(file), None, allowed)
    assert isinstance(stored.config, Resolved), "of read_run"
    run = Identity(stored.config, data_digest(stored.data or {})).digest
    return Network(run, encoder.step, weights_digest(file))


def _with_probes(config: Resolved) -> Resolved:
    """The config; a run that has skipped its probes gets those of the paper when they are asked
    for here."""
    return dataclasses.replace(config, probe_epochs=config.probe_epochs or Config.probe_epochs)


def _evaluate(
    config: Resolved,
    encoder: EncoderFile,
    source: Source,
    chosen: tuple[str, ...],
    stop: StopRequest,
) -> Results:
    """The numbers of these protocols by their names in `NUMBERS`.

    Raises: InputError: as `Source.load`. StopRequested.
    """
    progress = Progress(stop)
    data = source.load()
    train, test = len(data.train.images), len(data.test.images)
    images = f"{train:,} training and {test:,} test images of {data.num_classes} classes"
    print(f"data: {source.prepared.info.name}, {images}", flush=True)
    devices = min(config.devices or jax.device_count(), jax.device_count())
    placement = make_placement(devices, server_shards=1)
    batches = sum(-(-number // config.eval_batch_size) for number in (train, test))
    progress.begin("images encoded, batch", batches)
    variables = jax.device_put(encoder.variables, placement.replicated)
    splits = encode_splits(config, encoder.model, variables, data, placement, progress)
    evaluation = Evaluation(config, splits, data.num_classes, placement, progress)
    pieces = {
        "knn": ("kNN, block", -(-test // (CHUNK * devices))),
        "linear": ("linear probe, epoch", config.probe_epochs),
        "semi_supervised": ("semi-supervised probes, epoch", len(FRACTIONS) * config.probe_epochs),
    }
    found: Results = {}
    for name in chosen:
        progress.begin(*pieces[name])
        found |= PROTOCOLS[name](evaluation)
    return found
