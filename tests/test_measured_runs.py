"""Whole runs that measure hardness and divergence, and whose averaging heeds the latter."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import divergence, hardness
from mocosfl_jax.config.stored import run_values
from mocosfl_jax.errors import InputError
from mocosfl_jax.federated.placement import single_device
from mocosfl_jax.run.plan import plan
from mocosfl_jax.run.program import program_of
from mocosfl_jax.run.workdir import WorkDir
from mocosfl_jax.train import Interrupted, train
from tests import tiny
from tests.test_defences import lowered
from tests.tiny_method import assert_close

FIELDS = {  # a cohort of 3 clients leaves a slot of padding on each mesh
    "cohort_size": 3,
    "steps_per_round": 3,
    "steps_per_dispatch": 1,
    "rounds": 2,
    "syncs_per_round": 2,  # after steps 2 and 3
    "blocks_per_stage": (1,),
    "learning_rate": 0.003,
    "schedule": "constant",
    "augmentation": "v1",
    "holdout_fraction": 0.0,
}
MEASURED = {"measure": {"hardness": True, "divergence": True}, "averaging": {"tau": 0.7}}
PRIVATE = {"feature_sharing": False, "queue_length": 48, "batch_size": 2}
RUNS = {
    "shared": {**FIELDS, **MEASURED, "queue_length": 60},  # 18 keys a step
    "private": {**FIELDS, **MEASURED, **PRIVATE},  # 12 rows; 4 keys a step and client
}


@pytest.fixture(scope="module")
def npz(tmp_path_factory) -> Path:
    return tiny.write_unevaluated(tmp_path_factory.mktemp("data") / "images.npz", train=67)


def run(folder: Path, npz: Path, **fields) -> None:
    config, dataset = tiny.load(npz, **fields)
    workdir = WorkDir(folder)
    try:
        train(config, dataset, workdir)
    finally:
        workdir.close()


def lines(folder: Path) -> list[dict]:
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module", params=RUNS)
def whole(request, npz, tmp_path_factory) -> tuple[Path, dict]:
    """A finished run on one device, and its fields."""
    folder = tmp_path_factory.mktemp(request.param)
    run(folder, npz, **RUNS[request.param])
    return folder, RUNS[request.param]


def test_steps_with_a_sync_log_what_is_measured(whole):
    found = lines(whole[0])
    assert [line["step"] for line in found if "divergence" in line] == [2, 3, 5, 6]
    assert all(line["divergence"] > 0 for line in found if "divergence" in line)
    ages = [[i for i in range(1, 5) if f"similarity_age_{i}" in line] for line in found]
    assert ages == [[], [1], [1, 2], [], [1, 2, 3], [1, 2, 3]]  # as keys are written


def test_the_report_of_divergence_is_what_was_logged(whole, tmp_path):
    folder, _ = whole
    logged = [line["divergence"] for line in lines(folder) if "divergence" in line]
    row = divergence.report(folder)
    assert (row["averages"], row["first"], row["last"]) == (4, logged[0], logged[-1])
    assert (row["largest"], row["mean"]) == (max(logged), pytest.approx(np.mean(logged)))
    divergence.plot([folder], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_fit_takes_the_last_complete_measurements(whole, tmp_path):
    folder, _ = whole
    row, similarity, found = hardness.report(folder, last=2, until=6)
    values = [[line[f"similarity_age_{i}"] for i in (1, 2, 3)] for line in lines(folder)[4:]]
    np.testing.assert_allclose(similarity, np.mean(values, axis=0))
    keys = 18 if folder.name.startswith("shared") else 4
    assert (row["steps"], row["keys_a_step"], row["fitted"]) == ([5, 6], keys, 2)
    assert row["measured"] == pytest.approx(keys * similarity[2])
    assert hardness.report(folder, last=2, until=5)[0]["steps"] == [5, 5]
    hardness.plot({"run": (similarity, found)}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="has filled its queue"):
        hardness.report(folder, last=2, until=3)


def test_devices_and_chunks_change_nothing(whole, npz, tmp_path):
    folder, fields = whole
    run(tmp_path, npz, **{**fields, "devices": 4, "cohort_chunks": 2})
    got, want = (tiny.saved_state(f, npz, **fields) for f in (tmp_path, folder))
    assert_close(got.server, want.server, "server", 1e-3)
    assert_close(got.population.mixed, want.population.mixed, "clients", 1e-3)
    for now, before in zip(lines(tmp_path), lines(folder), strict=True):
        assert now.keys() == before.keys()
        names = [name for name in now if name.startswith(("similarity", "divergence"))]
        values = [[line[name] for name in names] for line in (now, before)]
        np.testing.assert_allclose(*values, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("whole", ["private"], indirect=True)  # clients keep queues and models
def test_a_run_resumes_bit_for_bit(npz, tmp_path, stop_at, whole):
    """Stopped in the middle of the second round, between two syncs."""
    folder, fields = whole
    stop_at(4)
    with pytest.raises(Interrupted):
        run(tmp_path, npz, **fields)
    run(tmp_path, npz, **fields)
    states = (tiny.saved_state(f, npz, **fields) for f in (tmp_path, folder))
    jax.tree.map(np.testing.assert_array_equal, *states)
    paced = {"images_per_second"}
    for now, before in zip(lines(tmp_path), lines(folder), strict=True):
        assert {n: v for n, v in now.items() if n not in paced} == {
            n: v for n, v in before.items() if n not in paced
        }


# ------------------------------------------------------------------------------------ off, refused


def test_what_is_off_leaves_no_trace(npz):
    """Neither in the program nor in the identity of a run; and a tau sends nothing more."""
    pixels = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    config, dataset = tiny.load(npz, **FIELDS, **pixels)
    off = {"measure": {"hardness": False, "divergence": False}, "averaging": {"tau": 0.0}}
    off["rich"] = {"clients": 0.0, "data": 0.0, "batch_factor": 1}
    without = {n: s for n, s in config.sections.items() if n not in off}
    absent = type(config)(**{**vars(config), "sections": without})
    text = lowered(absent, dataset)
    assert lowered(tiny.load(npz, **FIELDS, **pixels, **off)[0], dataset) == text
    values = run_values(config)
    assert not [name for name in values if name.startswith(("measure.", "averaging.", "rich."))]
    for name, section in MEASURED.items():
        for field, value in section.items():
            changed, _ = tiny.load(npz, **FIELDS, **pixels, **{name: {field: value}})
            assert run_values(changed) == {**values, f"{name}.{field}": value}
            assert plan(changed).bytes_up_per_client_round == plan(config).bytes_up_per_client_round


def test_ages_are_the_steps_that_a_queue_holds(npz):
    def ages(**fields) -> int:
        measure = {"hardness": True}
        config, _ = tiny.load(npz, **{**FIELDS, "measure": measure, **fields})
        return program_of(config, single_device()).method.server.ages

    assert ages(queue_length=60) == 3  # 3 clients of 3 images, 2 keys each
    assert ages(queue_length=60, loss="one_way") == 6
    assert ages(queue_length=60, feature_sharing=False) == 2  # 15 rows, 6 keys
    assert ages(queue_length=9 * 512, loss="one_way") == 512


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"averaging": {"tau": 1.0}}, "config.averaging.tau = 1.0: a number in [0, 1)"),
        (
            {"averaging": {"tau": 0.7}, "client_learning_rate": 0.0},
            "config.averaging.tau = 0.7: frozen clients",
        ),
        (
            {"averaging": {"tau": 0.7}, "client_state": "stateless", "align_momentum": True},
            "config.client_state = 'stateless': what clients keep of their own models would be",
        ),
        (
            {"measure": {"divergence": True}, "client_learning_rate": 0.0},
            "config.measure.divergence = True: frozen clients",
        ),
        (
            {"measure": {"hardness": True}, "queue_length": 9 * 513, "loss": "one_way"},
            "config.measure.hardness = True: a queue holds the keys of 513 steps, and at most 512",
        ),
    ],
)
def test_values_that_cannot_hold_are_refused(npz, fields, words):
    with pytest.raises(InputError) as error:
        tiny.load(npz, **{**FIELDS, **fields})
    assert str(error.value).startswith(words)
