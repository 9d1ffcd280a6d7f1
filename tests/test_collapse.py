"""A network that gives all images one embedding: its loss, and what becomes of its run."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.config.network import model_of
from mocosfl_jax.federated.contract import Metric
from mocosfl_jax.federated.dispatch import DispatchOutput
from mocosfl_jax.main import main
from mocosfl_jax.methods.mocosfl.method import MocoSFL
from mocosfl_jax.methods.mocosfl.server import contrast
from mocosfl_jax.run import recorder
from mocosfl_jax.run.checkpoint import Clock
from mocosfl_jax.run.encoder_file import save_encoder
from mocosfl_jax.run.feed import Dispatch
from mocosfl_jax.run.metrics import Metrics
from mocosfl_jax.run.recorder import CollapseError, Recorder
from tests import tiny
from tests.test_main import CONFIG
from tests.test_train import lines
from tests.tiny_method import QUEUE, tiny_method

FIELDS = {
    "mean": (0.1, 0.2, 0.3),
    "std": (0.3, 0.2, 0.1),
    "blocks_per_stage": (1,),
    "learning_rate": 0.0,
    "knn_every": 0,
    "probe_epochs": 0,
}


def collapsed(server: dict) -> dict:
    """The server's parameters, its last layer (`dense2`, before it `dense1`) deaf to its input."""
    last = max(name for name in server["head"] if "kernel" in server["head"][name])
    layer = server["head"][last]
    constant = {"kernel": 0 * layer["kernel"], "bias": 1 + 0 * layer["bias"]}
    return {**server, "head": {**server["head"], last: constant}}


class Deaf:
    """A network with one embedding for all."""

    def features(self, server_params, latents_RHWC):
        return latents_RHWC.mean(axis=(1, 2))

    def embed(self, server_params, stats, features_RF, mask_R, train):
        return jnp.full_like(features_RF, 3.0), stats


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("loss", "views"), [("one_way", 1), ("server", 2), ("client", 1)])
def test_chance_is_the_loss_of_equal_embeddings(loss, views, groups):
    """Equal logits: ln(K + 1) for each view, a mean over rows."""
    method = tiny_method(loss, shared=groups == 1)
    rng = np.random.default_rng(1)
    latents = [jnp.asarray(rng.normal(size=(4, 3, 3, 9)), jnp.float32) for _ in range(views)]
    unit = jnp.full((4, 9), 1 / 3)
    queue_GKD = jnp.full((groups, QUEUE, 9), 1 / 3)
    side = dataclasses.replace(method.server, net=Deaf())
    mask = jnp.array([True, True, False, True])
    found = contrast(side, {}, {}, tuple(latents), (unit,) * views, queue_GKD, mask)
    assert float(found.loss) / 3 == pytest.approx(views * np.log(QUEUE + 1), rel=1e-5)
    assert method.chance == pytest.approx(views * np.log(QUEUE + 1))


# ------------------------------------------------------------------------------------ the watch


class Silent:
    def advance(self, *_) -> None:
        pass


def judged(rounds: list[list[list[float | None]]], chance: float | None, skipped: int = 0) -> str:
    """What is said of the losses of these dispatches, the first `skipped` of which nobody saw."""
    recorder = Recorder(Metrics(), Clock(), Silent(), chance)
    step = 0
    for round_, parts in enumerate(rounds):
        for part, losses in enumerate(parts):
            known = jnp.array([x is not None for x in losses], jnp.float32)
            loss = Metric(jnp.array([x or 0.0 for x in losses], jnp.float32) * known, known)
            output = DispatchOutput({"loss": loss}, jnp.zeros(len(losses)), jnp.array(True))
            ends = part == len(parts) - 1
            mask = np.ones((len(losses), 1, 1), bool)
            dispatch = Dispatch(
                *(round_, step, None, None, None, mask, None, None, part == 0, ends)
            )
            step += len(losses)
            if skipped := max(0, skipped - 1) if skipped else 0:
                continue
            recorder.push(dispatch, output)
    recorder.drain()
    recorder.close()
    try:
        recorder.check()
    except CollapseError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("rounds", "round_"),
    [
        ([[[2.0, 2.0], [2.0, 2.001]]], 0),
        ([[[1.5, 2.0], [2.0, 2.0]], [[2.0, 2.0], [1.999, 2.0]]], 1),
        ([[[2.0, 2.0], [2.0, 1.99]]], None),  # better than chance once
        ([[[2.0, 2.1], [2.0, 2.0]]], None),  # worse: something is learned, if the wrong thing
        ([[[2.0, 2.0], [1.9, 2.0]], [[1.9, 2.0], [2.0, 2.0]]], None),  # a round's length, not one
        ([[[2.0, None], [2.0, 2.0]]], None),
    ],
)
def test_a_round_at_chance_is_noticed(rounds, round_):
    said = judged(rounds, 2.0)
    assert said == (
        ""
        if round_ is None
        else f"the loss was 2.0000, that of chance, in every step of round {round_}:"
        " the network has collapsed"
    )


def test_methods_without_a_chance_and_rounds_seen_in_part_are_not_judged():
    assert judged([[[2.0, 2.0]]], None) == ""
    assert judged([[[2.0, 2.0], [2.0, 2.0]]], 2.0, skipped=2) == ""


# -------------------------------------------------------------------------------------- the run


def test_a_collapsed_run_stops_with_one_line_and_its_state_saved(tmp_path, capsys):
    """The queue is full of the constant after two steps of round 0, so round 1 is at chance."""
    npz = tiny.write_npz(tmp_path / "images.npz")
    config = tiny.load(npz, **FIELDS)[0]
    variables = jax.jit(model_of(config).init)(jax.random.key(1))
    variables = variables._replace(server=collapsed(variables.server))
    save_encoder(tmp_path / "encoder.safetensors", config, variables, 5)
    argv = ["main", "--config", CONFIG, "--workdir", str(tmp_path / "run")]
    argv += tiny.flags(npz, **FIELDS, init_from=tmp_path / "encoder.safetensors")
    assert main(argv) == 1
    _, err = capsys.readouterr()
    assert err == (
        f"mocosfl_jax: the loss was {2 * np.log(33):.4f}, that of chance, in every step of round 1:"
        " the network has collapsed; stopped at step 15 of 18, which is saved\n"
    )
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(16))
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "12",
        "15",
    ]
    assert not (tmp_path / "run" / "summary.json").exists()
    assert main(argv) == 1  # repeated, it is still the run that has collapsed
    assert capsys.readouterr().err == err
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("rounds", [2, 3])
def test_the_last_round_is_judged_too(rounds, tmp_path, capsys, monkeypatch):
    npz = tiny.write_npz(tmp_path / "images.npz")
    monkeypatch.setattr(MocoSFL, "chance", 5.0)
    at_chance = {(rounds - 1) * 3 + step for step in (1, 2, 3)}
    divided = recorder._divided

    def scripted(metric: Metric) -> dict[int, float]:
        values, steps = divided(metric), next(taken)
        return {index: 5.0 if steps + index + 1 in at_chance else 4.0 for index in values}

    taken = (step for step in range(0, 3 * rounds, 3) for _ in range(2))  # loss and accuracy
    monkeypatch.setattr(recorder, "_divided", scripted)
    fields = {**FIELDS, "rounds": rounds, "steps_per_round": 3, "steps_per_dispatch": 3}
    argv = ["main", "--config", CONFIG, "--workdir", str(tmp_path / "run")]
    assert main([*argv, *tiny.flags(npz, **fields)]) == 1
    assert f"every step of round {rounds - 1}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("losses", "step", "said"),
    [
        ([2.0] * 8, 8, "round 1"),
        ([1.0] * 4 + [2.0] * 4, 8, "round 1"),
        ([2.0] * 4 + [1.0] + [2.0] * 3, 8, ""),
        ([2.0] * 3, 3, ""),  # it may still change
        ([2.0] * 4 + [1.0] * 2, 6, "round 0"),
        ([1.0] * 4 + [2.0] * 2, 6, ""),
        ([2.0] * 8, 0, ""),
    ],
)
def test_what_a_resumed_run_recalls(losses, step, said):
    watch = Recorder(Metrics(), Clock(), Silent(), 2.0)
    watch.recall({i + 1: {"step": i + 1, "loss": x} for i, x in enumerate(losses)}, step, 4)
    watch.close()
    with pytest.raises(CollapseError, match=said) if said else contextlib.nullcontext():
        watch.check()
