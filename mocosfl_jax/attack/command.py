"""Command line: `python -m mocosfl_jax.attack --workdir DIR`, of a run, finished or not.

Options:
  --decoder NAME        res_normN{blocks}C{channels} (default res_normN4C64), or conv_normN...
  --targets WHOSE       test (default), or client:ID: training images of that client
  --num_targets N       reconstructs the first N of them; default 1000
  --auxiliary FRACTION  of the train split, that the attacker has; default 0.01
  --epochs N, --batch_size N, --learning_rate X, --seed N: of its training; 50, 32, 1e-3, 0
  --step N              attacks the checkpoint of this step; default: the newest that is complete
  --name NAME           writes to DIR/attack/NAME; default: decoder and targets
  --data_dir DIR        where TFDS data sets lie, if not where the run found them

Exit status: 0 done; 1 the attack failed, or a file could not be written; 2 bad input, one line on
stderr; 130 interrupted. Run the same command to start an interrupted attack again, with the same
result; that of a finished one is shown at once.
"""

import dataclasses
import time
from collections.abc import Callable

import numpy as np
from absl import flags

from mocosfl_jax.attack.commandline import parse_command
from mocosfl_jax.attack.images import AttackImages, choose_images
from mocosfl_jax.attack.inversion import (
    PARTS,
    Attack,
    DivergedError,
    Epoch,
    evaluate,
    reconstruct,
    suitable_devices,
    train_decoder,
)
from mocosfl_jax.attack.options import Options
from mocosfl_jax.attack.quality import quality_of_one
from mocosfl_jax.attack.report import (
    PICTURED,
    AttackFolder,
    Report,
    identity_of,
    report_of,
    table,
)
from mocosfl_jax.attack.victim import Victim, check_saved, read_victim
from mocosfl_jax.config.data import partition_of
from mocosfl_jax.data.dataset import Dataset
from mocosfl_jax.models.decoder import Decoder
from mocosfl_jax.run.checkpoint import saved_steps
from mocosfl_jax.run.console import FAILED, answered, end
from mocosfl_jax.run.options import options_of, workdir_of
from mocosfl_jax.run.processes import use_compilation_cache
from mocosfl_jax.run.progress import SECONDS_BETWEEN_LINES
from mocosfl_jax.run.virtual import use_virtual_devices
from mocosfl_jax.run.workdir import Stored, hold, prepare_again, read_run

COMMAND = "mocosfl_jax.attack"


def main(argv: list[str]) -> int:
    """Runs one command; returns the exit status."""
    return answered(COMMAND, lambda: _command(argv))


def _command(argv: list[str]) -> int:
    """Raises: InputError; StorageError."""
    values = parse_command(argv)
    if values.help:
        print(__doc__)
        return 0
    try:
        return _carry_out(values)
    except DivergedError as error:
        return end(COMMAND, f"{error}: a smaller --learning_rate may help", FAILED)


def _carry_out(values: flags.FlagValues) -> int:
    """Raises: InputError; DivergedError; StorageError."""
    options, workdir = options_of(values, Options), workdir_of(values)
    folder = AttackFolder(workdir, values.name or options.default_name)
    stored = read_run(workdir)
    use_virtual_devices(PARTS)
    use_compilation_cache(stored.config.compilation_cache)
    steps, step = saved_steps(workdir / "checkpoints"), folder.step  # the run may have gone on
    if values.step not in (None, step):
        step = values.step
        check_saved(step, steps)
    report = folder.finished()
    if report is None or step in steps:
        victim = read_victim(workdir, stored, step, options.client)
        identity = identity_of(options, victim)
        folder.check(identity)
    else:
        folder.check({"step": step, **dataclasses.asdict(options)})
    if report is not None:
        print("this attack is complete")
    else:
        dataset, images = _load(options, victim, stored, values.data_dir)
        with hold(folder.path, "--name"):
            folder.check(identity)  # another process may have been quicker
            folder.begin(identity)
            report = folder.finished() or _attack(options, victim, dataset, images, folder)
    print(table(report))
    print(f"written to {folder.path}")
    return 0


def _load(
    options: Options, victim: Victim, stored: Stored, data_dir: str | None
) -> tuple[Dataset, AttackImages]:
    """The data set of the run, and which images of it take part.

    Raises: InputError: it has changed, or as `choose_images`.
    """
    dataset = prepare_again(stored, data_dir).load()
    train = dataset.train
    partition = partition_of(victim.config, len(train.images), train.labels)
    return dataset, choose_images(options, dataset, partition)


def _attack(
    options: Options, victim: Victim, dataset: Dataset, images: AttackImages, folder: AttackFolder
) -> Report:
    """Trains the decoder, attacks the targets, and writes what came of it.

    Raises: DivergedError; StorageError.
    """
    config, participant = victim.config, victim.participant
    attack = Attack(
        send=victim.method.sent,
        decoder=Decoder(options.decoder_shape, config.image_size),
        mean=config.mean,
        std=config.std,
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
        devices=suitable_devices(),
    )
    train, validate = (dataset.train.images[ids] for ids in (images.train, images.validate))
    targets = images.split.images[images.targets]
    shape = "x".join(map(str, victim.latent_shape))
    print(
        f"client {victim.client} at step {victim.step}, latents {shape}: {options.decoder} learns "
        f"from {len(train):,} images, validated on {len(validate):,}",
        flush=True,
    )
    trained = train_decoder(attack, participant, train, validate, _progress(options.epochs))
    mean_image = np.concatenate([train, validate]).mean(axis=0, dtype=np.float64) / 255
    report = report_of(
        options,
        victim,
        images,
        trained,
        evaluate(attack, trained.variables, participant, targets),
        quality_of_one(mean_image.astype(np.float32), targets),
    )
    shown = targets[:PICTURED]
    answers = np.concatenate(list(reconstruct(attack, trained.variables, participant, shown)))
    folder.finish(report, trained, shown, answers)
    return report


def _progress(epochs: int) -> Callable[[Epoch], None]:
    """A line now and then, of the first and of the last epoch."""
    last_line = -np.inf

    def report(epoch: Epoch) -> None:
        nonlocal last_line
        now = time.monotonic()
        if epoch.number == epochs or now - last_line > SECONDS_BETWEEN_LINES:
            last_line = now
            errors = f"error {epoch.train_mse:.4f}, validation {epoch.validation_mse:.4f}"
            print(f"epoch {epoch.number} of {epochs}: {errors}", flush=True)

    return report
