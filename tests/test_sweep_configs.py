"""The sweeps of configs/sweeps: their runs, and what these have in common."""

import dataclasses

import pytest

from mocosfl_jax.config import Resolved, check_types, resolve
from mocosfl_jax.run.commandline import define_flags, parse
from mocosfl_jax.sweep.definition import Run, expand
from tests.test_config import CIFAR10
from tests.test_train import ROOT


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """Base configs are named from here."""
    monkeypatch.chdir(ROOT)


def runs_of(name: str) -> dict[str, Run]:
    argv = ["sweep", "--config", f"configs/sweeps/{name}.py"]
    values = define_flags(argv)
    parse(values, argv, of_sweep=True)
    return expand(values.config)


def test_privacy_starts_from_what_was_pre_trained():
    runs, sources = runs_of("privacy"), runs_of("privacy_pretrain")
    assert len(runs) == 12
    twice = {run.variant for run in runs.values() if len(run.commands) == 2}
    assert twice == {"no defence cut 1", "C4S2", "TAResSFL 0", "TAResSFL 250", "TAResSFL 500"}
    starts = {run.overrides.get("init_from") for run in runs.values()} - {None}
    assert starts == {f"runs/privacy_pretrain/runs/{name}" for name in sources}


def settled(run: Run) -> Resolved:
    argv = ["main", *run.arguments]
    values = define_flags(argv)
    parse(values, argv)
    held_out = dataclasses.replace(CIFAR10, num_train=45_000, num_test=5_000)
    return resolve(check_types(values.config), held_out)


def test_all_of_the_comparison_see_as_many_images():
    runs = runs_of("comparison")
    assert len(runs) == 28
    for name, run in runs.items():
        config = settled(run)
        cohort, images = config.cohort_size, config.images_a_step
        assert cohort == (5 if config.num_clients == 20 else config.num_clients), name
        assert images == (20 if config.method == "local" else 100 // cohort), name
        assert (cohort * images * config.steps_per_round, config.rounds) == (10_000, 10), name


def test_every_baseline_is_run_on_the_procedural_set():
    runs = runs_of("baselines")
    assert {run.base for run in runs.values()} == {
        str(path.relative_to(ROOT)) for path in (ROOT / "configs" / "baselines").glob("*.py")
    }
    for run in runs.values():
        config = settled(run)
        assert (config.dataset, config.num_clients, config.classes_per_client) == (
            "synthetic",
            5,
            2,
        )
        assert (config.total_steps, config.images_a_step) == (400, 20)
