"""Whole runs that save rounds once the loss hardly falls."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from mocosfl_jax.config.stored import run_values
from mocosfl_jax.errors import InputError
from mocosfl_jax.federated.dispatch import Images
from mocosfl_jax.federated.placement import single_device
from mocosfl_jax.methods.mocosfl.saving import LATENTS_ONLY, SILENT
from mocosfl_jax.run import recorder
from mocosfl_jax.run.plan import check_fits, plan
from mocosfl_jax.run.program import program_of
from mocosfl_jax.run.rounds import Rounds, run_constants
from mocosfl_jax.train import Interrupted
from tests import tiny
from tests.test_defences import lowered
from tests.test_measured_runs import lines, run
from tests.test_train import without_speed
from tests.tiny_method import assert_close

FIELDS = {  # a cohort of 3 of 4 clients, and slots of padding on a mesh
    "cohort_size": 3,
    "steps_per_round": 3,
    "steps_per_dispatch": 1,
    "rounds": 5,
    "syncs_per_round": 2,  # after steps 2 and 3
    "blocks_per_stage": (1,),
    "learning_rate": 0.05,
    "schedule": "constant",
    "augmentation": "v1",
    "knn_every": 0,
    "probe_epochs": 0,
    "queue_length": 60,
    "seed": 4,
}
# The mean losses of the rounds are 4.56, 7.93, 8.20, 8.01 and that of the last one.
SAVING = {"saving": {"threshold": 0.1, "warmup_rounds": 1}}
STATUSES = "AABCA"


@pytest.fixture(scope="module")
def npz(tmp_path_factory) -> Path:
    return tiny.write_npz(tmp_path_factory.mktemp("data") / "images.npz", train=67, test=21)


@pytest.fixture(scope="module")
def whole(npz, tmp_path_factory) -> Path:
    """A finished run on one device."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, npz, **FIELDS, **SAVING)
    return folder


def steps(folder: Path) -> list[dict]:
    """Lines of the log, without the evaluation before the first step."""
    return lines(folder)[1:]


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_a_run_goes_through_all_statuses_and_says_what_it_sent(whole):
    found = steps(whole)
    assert "".join("ABC"[line["status"]] for line in found) == "".join(3 * s for s in STATUSES)
    image, model = 8 * 8 * 4 * 4, 4 * (3 * 3 * 3 * 4 + 2 * 4)  # bytes
    sync = 2 * 3 * model  # of 3 clients, twice a round
    up = {"A": 3 * 9 * 2 * image + sync, "B": 3 * 9 * 2 * image, "C": 0}
    down = {"A": 3 * 9 * image + sync, "B": 3 * model, "C": 0}
    ends = found[2::3]
    for name, each in (("bytes_up", up), ("bytes_down", down)):
        expected = np.cumsum([each[status] for status in STATUSES])
        assert [line[name] for line in ends] == expected.tolist()
        assert summary(whole)[name] == expected[-1]
        assert summary(whole)[f"{name}_unsaved"] == 5 * each["A"]
    assert summary(whole)["rounds_by_status"] == {"A": 3, "B": 1, "C": 1}
    assert any("1 in C (nothing is sent)" in note for note in summary(whole)["notes"])


def test_devices_and_chunks_change_nothing(whole, npz, tmp_path):
    run(tmp_path, npz, **FIELDS, **SAVING, devices=4, cohort_chunks=2)
    got, want = (tiny.saved_state(f, npz, **FIELDS, **SAVING) for f in (tmp_path, whole))
    for name in ("server", "population"):
        assert_close(getattr(got, name), getattr(want, name), name, 1e-3)
    assert_close(got.cohort.stored_latents, want.cohort.stored_latents, "stored latents", 1e-3)
    for now, before in zip(steps(tmp_path), steps(whole), strict=True):
        exact = ("status", "bytes_up", "bytes_down")
        assert [now[name] for name in exact] == [before[name] for name in exact]
        np.testing.assert_allclose(now["loss"], before["loss"], rtol=1e-3)


class Killed(BaseException):
    """Nothing of the package catches it."""


def test_a_run_that_is_stopped_and_killed_in_each_status_ends_as_if_it_had_not_been(
    npz, whole, tmp_path, stop_at, monkeypatch
):
    """Stopped in mid-round, which saves; killed in mid-round, after which a round is done again."""
    push, reached = recorder.Recorder.push, []

    def kill_at(step: int) -> None:
        def push_or_die(self, dispatch, *args):
            if dispatch.step == step and step not in reached:
                reached.append(step)
                raise Killed
            push(self, dispatch, *args)

        monkeypatch.setattr(recorder.Recorder, "push", push_or_die)

    kill_at(5)
    with pytest.raises(Killed):
        run(tmp_path, npz, **FIELDS, **SAVING)
    for status, middle in (("B", 7), ("C", 10)):
        stop_at(middle)
        with pytest.raises(Interrupted):
            run(tmp_path, npz, **FIELDS, **SAVING)
        done = steps(tmp_path)
        assert len(done) % 3 and STATUSES[len(done) // 3] == status
        kill_at(middle + 1)
        with pytest.raises(Killed):
            run(tmp_path, npz, **FIELDS, **SAVING)
    run(tmp_path, npz, **FIELDS, **SAVING)
    assert reached == [5, 8, 11]
    assert without_speed(steps(tmp_path)) == without_speed(steps(whole))
    states = (tiny.saved_state(f, npz, **FIELDS, **SAVING) for f in (tmp_path, whole))
    jax.tree.map(np.testing.assert_array_equal, *states)
    same = ("bytes_up", "bytes_down", "bytes_up_unsaved", "rounds_by_status", "notes")
    assert [summary(tmp_path)[n] for n in same] == [summary(whole)[n] for n in same]


# ------------------------------------------------------------------------------------ off, refused


def test_what_is_off_leaves_no_trace(npz):
    """Neither in the program and the state, nor in the identity of a run."""
    pixels = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    config, dataset = tiny.load(npz, **FIELDS, **pixels)
    sections = {name: s for name, s in config.sections.items() if name != "saving"}
    absent = type(config)(**{**vars(config), "sections": sections})
    off, _ = tiny.load(npz, **FIELDS, **pixels, saving={"threshold": 0.0, "warmup_rounds": 3})
    assert lowered(off, dataset) == lowered(absent, dataset)
    assert not [name for name in run_values(config) if name.startswith("saving.")]
    on, _ = tiny.load(npz, **FIELDS, **pixels, **SAVING)
    assert run_values(on) == {
        **run_values(config),
        "saving.threshold": 0.1,
        "saving.warmup_rounds": 1,
    }


def test_stored_latents_count_as_memory_and_are_refused_where_they_do_not_fit(npz):
    """4 slots on a device (3 clients, 2 chunks) of 3 steps, 3 images, two views and a mask."""
    stored = 3 * 3 * (2 * 8 * 8 * 4 * 4 + 1)
    off, on = (tiny.load(npz, **FIELDS, **fields)[0] for fields in ({}, SAVING))
    bookkeeping = 5 * 4
    assert plan(on).state_bytes - plan(off).state_bytes == 3 * stored + bookkeeping
    config, _ = tiny.load(npz, **{**FIELDS, **SAVING, "cohort_chunks": 2})
    sizes = Rounds(config, single_device(), program_of(config)).bytes_a_device()
    assert sizes["cohort.stored_latents"] == 4 * stored
    with pytest.raises(InputError) as error:
        check_fits(config, {**sizes, "cohort.stored_latents": 26 * 10**9}, 40 * 10**9)
    assert str(error.value) == (
        "config.saving.threshold = 0.1: the state and its copy at a save take 52.0 GB, the stored"
        " latents alone 52.0 GB, and a device has 40.0 GB: config.bottleneck to narrow them, fewer"
        " config.steps_per_round, or 0 to store none"
    )


PRIVATE = {"feature_sharing": False, "queue_length": 48, "batch_size": 2}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"saving": {"threshold": -1.0}}, "config.saving.threshold = -1.0: at least 0"),
        (
            {"saving": {"threshold": 0.1, "warmup_rounds": 4}},
            "config.saving.warmup_rounds = 4: the first round that can save is round 6, and there",
        ),
        (PRIVATE, "config.saving.threshold = 0.1: a round in C would meet the queues of other"),
        (
            {"method": "local", "saving": {"threshold": 0.1}},
            "config.saving = {'threshold': 0.1}: method 'local' has no such section",
        ),
    ],
)
def test_values_that_make_no_sense_are_refused(npz, fields, words):
    own = ("syncs_per_round", "queue_length") if "method" in fields else ()
    kept = {name: value for name, value in FIELDS.items() if name not in own}
    with pytest.raises(InputError) as error:
        tiny.load(npz, **{**kept, **SAVING, **fields})
    assert str(error.value).startswith(words)


@pytest.mark.parametrize(
    "fields",
    [
        {**PRIVATE, "cohort_size": 4},
        {"client_learning_rate": 0.0},
        {"client_state": "stateless", "align_momentum": True},
        {"loss": "client", "averaging": {"tau": 0.7}, "measure": {"hardness": True}},
        {"loss": "one_way", "head": "largeV2", "measure": {"divergence": True}},
        {
            "batch_size": 4,
            "nopeek": {"weight": 0.1},
            "ressfl": {"alpha": 1.0, "decoder": "conv_normN1C4"},
            "clip": {"norm": 1.0},
            "noise": {"multiplier": 0.1},
            "quantize": {"bits": 8},
        },
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_b_and_c_can_be_traced_with_all_else(npz, fields):
    """The state has the same form after a step, and neither gradients nor averages are sent."""
    config, _ = tiny.load(npz, **{**FIELDS, **SAVING, **fields})
    program = program_of(config, single_device())
    rounds = Rounds(config, single_device(), program)
    state = jax.eval_shape(rounds.initial_state)
    images = jax.ShapeDtypeStruct(program.method.saving.images, np.float32)
    for status in (LATENTS_ONLY, SILENT):
        inputs, constants = traced_inputs(config, rounds.slots.number)
        dispatch = single_device().dispatch(program.in_status(status), state)
        after, _ = jax.eval_shape(dispatch, state, inputs, constants)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
            lambda x: (x.shape, x.dtype), state
        )
        sent = program.method.in_status(status).traffic(images)
        assert {m.name for m in sent if not m.up} <= {"client model"}
        assert bool(sent) == (status == LATENTS_ONLY)


def traced_inputs(config, slots: int):
    """Shapes of the inputs of a dispatch of one step."""

    def shape(*sizes: int, dtype=np.uint8) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    rows = config.images_a_step
    inputs = Images(
        shape(1, slots, rows, 8, 8, 3),
        shape(1, slots, rows, dtype=bool),
        shape(1, dtype=bool),
        shape(slots, dtype=np.float32),
    )
    pixels = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    filled = type(config)(**{**vars(config), **pixels})
    return inputs, run_constants(filled, single_device())
