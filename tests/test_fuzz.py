"""Whatever the fields are, a command gives a plan that can be carried out, or one line.

The cases are random; MOCOSFL_FUZZ_SEED sets the seed, which a failure prints.
"""

import contextlib
import itertools
import os
import random
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from mocosfl_jax.config import Resolved, check_types
from mocosfl_jax.config.checks import check_fields
from mocosfl_jax.config.data import data_options, deal
from mocosfl_jax.data.sources import Prepared, prepare_dataset
from mocosfl_jax.errors import InputError
from mocosfl_jax.main import main
from mocosfl_jax.run.commandline import define_flags, parse
from mocosfl_jax.run.plan import plan
from mocosfl_jax.run.workdir import WorkDir
from mocosfl_jax.train import train
from tests import tiny

CONFIG = str(Path(__file__).parent.parent / "configs" / "cifar10.py")
SEED = int(os.environ.get("MOCOSFL_FUZZ_SEED", "0"))
CASES, PARTS = 120, 4
TRAINED = 5
TWO_STEPS = {
    "rounds": 1,
    "steps_per_round": 2,
    "syncs_per_round": 1,
    "steps_per_dispatch": 2,
    "probe_epochs": 0,
    "blocks_per_stage": (1,),
    "devices": 1,
    "server_shards": 1,
}

LONG = 10**400
# Values that may hold, and values that cannot, or only beside others that are as unusual.
COUNTS = (1, 2, 3, 4, 7, 60), (0, -1, 1000, 10**6, 2**31 - 1, 2**31, 2**63, 10**15, LONG, "many")
SIZES = (2, 3, 8, 16, 33), (0, 1, -4, 64, 10**4, 10**9, 2**31 - 1, LONG, 1.5)
RATES = (
    (0.0, 1e-3, 0.1, 0.5, 0.99),
    (1.0, 30.0, -0.1, 1e30, 1e-30, 1e-300, 1e300, LONG, "nan", "inf", "fast"),
)
CHANNELS = (
    ("(0.5,0.25,0.5)", "(0.1,1,1)"),
    ("(0,1,1)", "(0.5,0.5)", "(1e-300,1,1)", "0.5", "(1e30,1,1)", f"(1,1,{LONG})", "('a',1,1)"),
)
FLAGS = (True, False), ("perhaps", 1.5)
VALUES = {
    "method": (("mocosfl",), ("moco", "", "os:path", "no_such_module:X", "a:b:c")),
    "image_size": SIZES,
    "holdout_fraction": RATES,
    "mean": CHANNELS,
    "std": CHANNELS,
    "num_clients": COUNTS,
    "images_per_client": COUNTS,
    "classes_per_client": COUNTS,
    "dirichlet_alpha": RATES,
    "cohort_size": COUNTS,
    "batch_size": COUNTS,
    "total_batch": COUNTS,
    "epochs": COUNTS,
    "local_epochs": COUNTS,
    "steps_per_round": COUNTS,
    "rounds": COUNTS,
    "syncs_per_round": COUNTS,
    "client_state": (("persistent", "stateless"), ("none",)),
    "sync_weights": (("equal", "size"), ("none",)),
    "backbone": (("resnet18", "resnet50"), ("resnet19",)),
    "width": ((4, 8, 12), (30, 0, -4, 10**9, 2**31 - 4, LONG)),
    "blocks_per_stage": (
        ("(1,)", "(1,1)", "(2,1,1)", "(1,2)"),
        ("(0,)", "(-1,1)", "two", "(1.5,)", f"({10**9},)", f"(1,{LONG})", str((1,) * 40)),
    ),
    "stem": (("3x3s1", "3x3s2", "7x7s2"), ("5x5",)),
    "cut": COUNTS,
    "bottleneck": (("none", "C2S1", "C1S2", "C4S4"), ("C0S1", f"C{10**30}S1", "C4S3", "")),
    "head": (("V1", "smallV2", "V2", "largeV2"), ("V3",)),
    "head_width": SIZES,
    "compute_dtype": (("float32", "bfloat16"), ("float16",)),
    "loss": (("one_way", "server", "client"), ("both",)),
    "feature_sharing": FLAGS,
    "queue_length": ((32, 48, 96, 128), COUNTS[1]),
    "temperature": RATES,
    "ema": RATES,
    "align_momentum": FLAGS,
    "learning_rate": RATES,
    "client_learning_rate": RATES,
    "schedule": (("cosine", "step", "constant"), ("linear",)),
    "momentum": RATES,
    "weight_decay": RATES,
    "augmentation": (("v1", "v2"), ("v3",)),
    "crop_min_scale": RATES,
    "blur_kernel_size": ((1, 3, 5, 9, 15), (8, 17, 10**9 + 1, -1)),
    "knn_every": COUNTS,
    "knn_k": COUNTS,
    "knn_temperature": RATES,
    "probe_epochs": COUNTS,
    "probe_batch_size": COUNTS,
    "probe_learning_rate": RATES,
    "seed": COUNTS,
    "devices": COUNTS,
    "server_shards": COUNTS,
    "cohort_chunks": COUNTS,
    "steps_per_dispatch": COUNTS,
    "checkpoint_every": COUNTS,
    "keep_checkpoints": COUNTS,
    "eval_batch_size": COUNTS,
    "no_such_field": COUNTS,
}


def random_fields(
    rng: random.Random, count: int, weights: tuple[int, int, int] = (7, 2, 1)
) -> dict:
    """So many fields and their values, drawn with these weights: usual, unusual, unset."""
    kinds = rng.choices((0, 1, 2), weights, k=count)
    fields = {
        name: rng.choice((*VALUES[name], (None,))[kind])
        for name, kind in zip(rng.sample(sorted(VALUES), count), kinds, strict=True)
    }
    if "dirichlet_alpha" in fields:  # the tiny run deals classes, and cannot do both
        fields.setdefault("classes_per_client", None)
    return fields


def command(npz: Path, fields: dict) -> list[str]:
    return ["main", "--config", CONFIG, *tiny.flags(npz, **fields), "--dry_run"]


@pytest.fixture(scope="module")
def npz(tmp_path_factory) -> Path:
    return tiny.write_npz(tmp_path_factory.mktemp("fuzz") / "images.npz")


@pytest.mark.parametrize("part", range(PARTS))
def test_a_plan_or_one_line(part, npz, capsys):
    rng = random.Random(f"{SEED} {part}")
    for case in range(CASES // PARTS):
        fields = random_fields(rng, rng.choice((1, 2, 3, 5, 8)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            status = main(command(npz, fields))
        out, err = capsys.readouterr()
        shown = f"seed {SEED}, case {case} of part {part}: {fields}: {err}"
        assert status in (0, 2), shown
        assert len(err.splitlines()) == (status == 2), shown
        assert ("estimated memory" in out) == (status == 0), shown


def settled(npz: Path, fields: dict) -> tuple[Resolved, Prepared]:
    """As the command does it, up to training."""
    argv = command(npz, fields)
    values = define_flags(argv)
    parse(values, argv)
    config = check_types(values.config)
    check_fields(config)
    prepared = prepare_dataset(config.dataset, **data_options(config))
    return deal(config, prepared)[0], prepared


def small_plans(npz: Path) -> Iterator[tuple[dict, Resolved, Prepared]]:
    """Settings of two steps with many usual values, accepted and of little memory."""
    rng = random.Random(f"{SEED} trained")
    while True:
        fields = {**random_fields(rng, 12, weights=(1, 0, 0)), **TWO_STEPS}
        with contextlib.suppress(InputError):
            config, prepared = settled(npz, fields)
            sizes = plan(config)
            if 2 * sizes.state_bytes + sizes.step_bytes < 10**7:
                yield fields, config, prepared


def test_accepted_plans_train(npz, tmp_path):
    plans = itertools.islice(small_plans(npz), TRAINED)
    for index, (fields, config, prepared) in enumerate(plans):
        shown = f"seed {SEED}, plan {index}: {fields}"
        print(shown)  # what a traceback does not tell
        workdir = WorkDir(tmp_path / str(index))
        try:
            assert train(config, prepared.load(), workdir)["steps"] == 2, shown
        finally:
            workdir.close()
