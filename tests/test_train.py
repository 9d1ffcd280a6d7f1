"""The loop: what a run leaves behind, and that stopping and resuming changes nothing."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from mocosfl_jax import load_encoder
from mocosfl_jax.errors import InputError
from mocosfl_jax.federated import placement
from mocosfl_jax.federated.dispatch import run_dispatch
from mocosfl_jax.run.program import program_of
from mocosfl_jax.run.workdir import WorkDir
from mocosfl_jax.train import Interrupted, NonFiniteError, train
from tests import tiny

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def npz(tmp_path_factory) -> Path:
    return tiny.write_npz(tmp_path_factory.mktemp("data") / "images.npz")


def run(folder: Path, npz: Path, **fields) -> dict:
    config, dataset = tiny.load(npz, **fields)
    workdir = WorkDir(folder)
    try:
        return train(config, dataset, workdir)
    finally:
        workdir.close()


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_speed(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


@pytest.fixture(scope="module")
def whole(npz, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, npz)
    return folder


def test_summary_and_metrics(whole):
    summary = json.loads((whole / "summary.json").read_text())
    assert (summary["steps"], summary["rounds"], summary["num_clients"]) == (18, 3, 4)
    assert 0 <= summary["knn_top1"] <= 100
    assert 0 <= summary["linear_top1"] <= summary["linear_top1_best_test_epoch"] <= 100
    assert summary["compile_seconds"] > 0
    assert summary["wall_seconds"] > summary["compile_seconds"]
    assert summary["images_per_second"] > 0
    assert summary["peak_memory_bytes"] > 10_000_000
    # stem: 3 * 3 * 3 * 4 weights, 4 scales, 4 biases
    assert summary["client_params"] == 116
    # 6 steps: latents of two views (3 images, 8 * 8 * 4 floats) up and the gradient of one down;
    # 2 syncs: the model up and down
    latents = 3 * 8 * 8 * 4 * 4
    assert summary["bytes_up_per_client_round"] == 6 * 2 * latents + 2 * 116 * 4
    assert summary["bytes_down_per_client_round"] == 6 * latents + 2 * 116 * 4
    found = lines(whole)
    assert [line["step"] for line in found] == list(range(19))
    assert all("loss" in line for line in found[1:])
    assert [line["step"] for line in found if "knn_top1" in line] == [0, 6, 12, 18]
    assert found[0]["knn_top1"] == summary["knn_top1_at_init"]
    assert found[-1]["knn_top1"] == summary["knn_top1"]


def test_resuming_in_mid_round_with_another_dispatch_length(npz, tmp_path, stop_at):
    """Some of 6 steps are done one by one; dispatches of 4 then leave a shorter one at the end."""
    stop_at(1)
    with pytest.raises(Interrupted):
        run(tmp_path, npz, rounds=1, steps_per_dispatch=1)
    done = len(lines(tmp_path)) - 1
    assert 0 < done < 6
    run(tmp_path, npz, rounds=1, steps_per_dispatch=3)
    assert [line["step"] for line in lines(tmp_path)] == list(range(7))
    assert int(tiny.saved_state(tmp_path, npz, rounds=1).step) == 6


def test_a_run_traces_its_dispatch_once(npz, tmp_path, monkeypatch):
    """However many dispatches and rounds there are."""
    traces = []

    def counted(*args):
        traces.append(1)
        return run_dispatch(*args)

    monkeypatch.setattr(placement, "run_dispatch", counted)
    run(tmp_path, npz)
    assert len(traces) == 1


def test_queue_pointer_and_step_count(whole, npz):
    state = tiny.saved_state(whole, npz)
    assert int(state.step) == 18
    # 4 clients * 3 images * 2 views a step; both losses' keys
    assert int(state.server.queue.ptr) == 18 * 24 % 32


@pytest.mark.parametrize("step", [6, 9])
def test_sigterm_saves_and_resuming_is_bit_identical(whole, npz, tmp_path, stop_at, step):
    """Stopped at the end of a round, and in the middle of the next."""
    stop_at(step)
    with pytest.raises(Interrupted):
        run(tmp_path, npz)
    assert not (tmp_path / "summary.json").exists()
    run(tmp_path, npz)
    assert without_speed(lines(tmp_path)) == without_speed(lines(whole))
    states = (tiny.saved_state(folder, npz) for folder in (tmp_path, whole))
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_same_command_after_the_end_does_nothing(whole, npz):
    before = (whole / "summary.json").read_text()
    assert run(whole, npz) == json.loads(before)
    assert (whole / "summary.json").read_text() == before


def test_another_config_in_the_same_folder_is_refused(whole, npz):
    with pytest.raises(InputError, match=r"temperature 0\.1 -> 0\.2"):
        run(whole, npz, temperature=0.2)
    run(whole, npz, knn_every=2, steps_per_dispatch=1)  # only how the run is carried out


def test_a_folder_in_use_is_refused(npz, tmp_path):
    held = WorkDir(tmp_path)
    with pytest.raises(InputError, match="in use"):
        WorkDir(tmp_path)
    held.close()
    WorkDir(tmp_path).close()


def test_divergence_stops_and_names_the_step(npz, tmp_path):
    with pytest.raises(NonFiniteError, match=r"step \d+"):
        run(tmp_path, npz, learning_rate=1e30)
    assert not (tmp_path / "encoder.safetensors").exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"feature_sharing": False, "loss": "one_way", "cut": 3, "head": "V1"},
        {
            "loss": "client",
            "align_momentum": True,
            "cut": 2,
            "cohort_size": 2,
            "sync_weights": "size",
            "bottleneck": "C4S2",
        },
        {
            "client_learning_rate": 0.0,
            "head": "largeV2",
            "num_clients": 7,
            "classes_per_client": None,
            "dirichlet_alpha": 0.3,
            "cohort_size": 2,
        },
    ],
)
def test_every_kind_of_run_reaches_its_end(npz, tmp_path, fields):
    fields = {"rounds": 2, "steps_per_round": 2, "steps_per_dispatch": 2, **fields}
    summary = run(tmp_path, npz, **fields)
    assert summary["steps"] == 4
    assert np.isfinite(lines(tmp_path)[-1]["loss"])


def test_encoder_is_the_trained_network(whole, npz):
    """The file's features are those of the final state, computed here without the encoder."""
    config, dataset = tiny.load(npz)
    state = tiny.saved_state(whole, npz)
    model = program_of(config).method.model
    pixels = dataset.test.images.astype(np.float64) / 255
    train_pixels = dataset.train.images.astype(np.float64) / 255
    mean, std = train_pixels.mean(axis=(0, 1, 2)), train_pixels.std(axis=(0, 1, 2))
    images = ((pixels - mean) / std).astype(np.float32)
    latents = model.latents(state.server.client.params, images)
    want = model.features(state.server.server.params, latents)
    encoder = load_encoder(whole)
    np.testing.assert_allclose(encoder(dataset.test.images), want, rtol=1e-4, atol=1e-5)
    unit = encoder.embed(dataset.test.images)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-5)
    grey = [np.full((11, 17), 9, np.uint8), np.full((8, 8, 3), 9, np.uint8)]
    np.testing.assert_allclose(*encoder(grey), rtol=1e-5)


def test_unlabelled_images_train_without_evaluation(tmp_path, capsys):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", x_train=rng.integers(0, 256, (30, 8, 8, 3), dtype=np.uint8))
    summary = run(tmp_path / "run", tmp_path / "x.npz", classes_per_client=None, rounds=1)
    assert summary["knn_top1"] is None
    assert summary["linear_top1"] is None
    assert "skipped" in capsys.readouterr().out


def test_missing_encoder_is_named(tmp_path):
    with pytest.raises(InputError, match=r"encoder\.safetensors"):
        load_encoder(tmp_path)
