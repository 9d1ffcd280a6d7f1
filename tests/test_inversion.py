"""The attacker's training: what a step is, which decoder is kept."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mocosfl_jax.attack import inversion
from mocosfl_jax.attack.inversion import Attack, DivergedError, evaluate, reconstruct, train_decoder
from mocosfl_jax.models.decoder import Decoder, parse_decoder
from tests.tiny_method import assert_close


def send(participant, images, key):
    """Latents that are the images, halved in size; noise of this deviation."""
    latents = images[:, ::2, ::2]
    return latents + participant * jax.random.normal(key, latents.shape)


class Inverted:
    """An attack on images of one colour, which their latents tell, but for noise."""

    def __init__(self, noise: float):
        rng = np.random.default_rng(2)
        colours = rng.integers(0, 256, (100, 1, 1, 3), dtype=np.uint8)
        images = np.broadcast_to(colours, (100, 8, 8, 3))
        decoder = Decoder(parse_decoder("conv_normN0C8"), 8)
        self.attack = Attack(send, decoder, (0.5, 0.4, 0.3), (0.2, 0.3, 0.2), epochs=5)
        self.train, self.validate = images[20:], images[:20]
        self.participant, self.epochs = jnp.float32(noise), []

    def trained(self):
        arguments = (self.participant, self.train, self.validate, self.epochs.append)
        return train_decoder(self.attack, *arguments)


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 8), (2, 8), (2, 7)])
def test_training_is_adam_on_the_images_that_count(devices, batch_size):
    """One epoch of two full batches and of a smaller one, beside a loop without padding."""
    run, options = Inverted(0.0), {"batch_size": batch_size, "devices": devices}
    attack, images = dataclasses.replace(run.attack, epochs=1, **options), run.train[:20]
    optimizer, decoder = optax.adam(1e-3), attack.decoder
    variables, state = inversion._init(attack, run.participant, images[:1])
    batches = inversion._batches(attack, 20, epoch=1)
    assert sorted(batches.ids[batches.mask]) == list(range(20)) and batches.mask.sum() == 20
    assert batches.mask.sum(axis=1).tolist() == [batch_size] * 2 + [20 - 2 * batch_size]
    assert len({*map(str, jax.random.key_data(batches.keys).reshape(-1, 2))}) == 3 * 2

    @jax.jit
    def step(variables, state, pixels):
        rows = jnp.ones(len(pixels), bool)
        latents = send(
            0.0, (pixels - np.float32(attack.mean)) / np.float32(attack.std), batches.keys[0, 0]
        )

        def loss(params):
            answers, stats = decoder.apply(
                {**variables, "params": params}, latents, rows, True, mutable=["batch_stats"]
            )
            return ((answers - pixels) ** 2).mean(), stats

        grads, stats = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = optimizer.update(grads, state)
        return {"params": optax.apply_updates(variables["params"], updates), **stats}, state

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        for ids, mask in zip(batches.ids, batches.mask, strict=True):
            pixels = images[ids[mask]].astype(np.float32) / 255
            variables, state = step(variables, state, pixels)
    found = train_decoder(attack, run.participant, images, run.validate).variables
    for kept in ("kernel", "scale", "var"):
        assert_close(only(found, kept), only(variables, kept), kept, 1e-4)


def test_two_devices_draw_the_noise_of_one():
    """In training, and in the evaluation of one decoder."""
    run, kernels, errors = Inverted(3.0), [], []
    one, two = (dataclasses.replace(run.attack, epochs=1, devices=n) for n in (1, 2))
    for attack in (one, two):
        trained = train_decoder(attack, run.participant, run.train, run.validate)
        kernels.append(only(trained.variables, "kernel"))
    for attack in (one, two):
        errors.append(evaluate(attack, trained.variables, run.participant, run.train[:45]))
    assert_close(kernels[1], kernels[0], "trained on two devices", 1e-4)
    assert_close(errors[1], errors[0], "evaluated on two devices", 1e-5)
    alike = np.repeat(run.train[:1], 32, axis=0)
    (answers,) = reconstruct(two, trained.variables, run.participant, alike)
    assert len(np.unique(answers.reshape(32, -1), axis=0)) == 32


def test_two_devices_are_for_a_cpu_that_has_them(monkeypatch):
    assert inversion.suitable_devices() == 2 < jax.device_count()
    monkeypatch.setattr(inversion, "on_cpu", lambda: False)
    assert inversion.suitable_devices() == 1


def only(variables: dict, name: str) -> list:
    """The leaves of this name. A norm takes away the bias before it, which Adam then moves by the
    sign of rounding errors."""
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return [leaf for path, leaf in leaves if path[-1].key == name]


def test_the_decoder_of_the_best_epoch_is_kept(monkeypatch):
    """The first of equals; errors on the validation images are made up here."""
    run, errors, true = Inverted(0.0), iter([3.0, 1.0, 2.0, 1.0, 5.0]), []

    def scripted(*args):
        found = evaluate(*args)
        true.append(found.mse.mean())
        return found._replace(mse=np.full_like(found.mse, next(errors)))

    monkeypatch.setattr(inversion, "evaluate", scripted)
    trained = run.trained()
    assert trained.epoch == run.epochs[1] and trained.epoch.validation_mse == 1
    assert [epoch.number for epoch in run.epochs] == [1, 2, 3, 4, 5]
    found = evaluate(run.attack, trained.variables, run.participant, run.validate, purpose=2)
    assert found.mse.mean() == true[1] != true[3]


def test_an_epoch_without_a_finite_error_is_never_the_best(monkeypatch):
    run, errors = Inverted(0.0), iter([np.nan, 3.0, np.nan, 4.0, np.inf])

    def scripted(*args):
        found = evaluate(*args)
        return found._replace(mse=np.full_like(found.mse, next(errors)))

    monkeypatch.setattr(inversion, "evaluate", scripted)
    assert run.trained().epoch == run.epochs[1]


def test_an_attacker_learns_less_from_noise():
    quiet, noisy = (Inverted(noise) for noise in (0.0, 3.0))
    errors = [run.trained().epoch.validation_mse for run in (quiet, noisy)]
    assert errors[0] < errors[1] - 0.003
    trivial = np.square(quiet.train.mean(axis=0) / 255 - quiet.validate / 255).mean()
    assert errors[0] < 0.9 * trivial


def test_a_decoder_that_diverges_is_an_error():
    with pytest.raises(DivergedError):
        Inverted(math.inf).trained()
