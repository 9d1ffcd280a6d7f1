"""The attack as a command: what it computes, what it leaves, what it refuses."""

import contextlib
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from mocosfl_jax.attack import command, victim
from mocosfl_jax.attack.images import choose_images
from mocosfl_jax.attack.options import Options
from mocosfl_jax.config.data import partition_of
from mocosfl_jax.errors import InputError
from mocosfl_jax.federated.placement import single_device
from mocosfl_jax.models.decoder import Decoder, parse_decoder
from mocosfl_jax.privacy.release import Release
from mocosfl_jax.run.checkpoint import Checkpoints, Clock, Found, Identity, data_digest
from mocosfl_jax.run.program import program_of
from mocosfl_jax.run.rounds import Rounds
from mocosfl_jax.run.workdir import WorkDir, read_run
from mocosfl_jax.train import with_channel_stats
from tests import tiny
from tests.test_checkpoint import contents
from tests.tiny_method import at, moved

FAST = ("--decoder=conv_normN0C4", "--epochs=2", "--auxiliary=0.5", "--batch_size=8")
COHORT = [3, 1]


@pytest.fixture(scope="module")
def npz(tmp_path_factory) -> Path:
    return tiny.write_npz(tmp_path_factory.mktemp("data") / "images.npz")


def save_run(folder: Path, npz: Path, *steps: int, far: float = 0.0, **fields):
    """A run's folder with checkpoints of an untrained network, as if training had come that far;
    participants differ. Args: far: added to what they have. Returns: the last state, config and
    data set."""
    config, dataset = tiny.load(npz, cohort_size=2, **fields)
    config = with_channel_stats(config, dataset)
    rounds = Rounds(config, single_device(), program_of(config))
    start = rounds.initial_state()
    state = rounds.begin(start, jnp.asarray(COHORT, jnp.int32))
    cohort = jax.tree.map(lambda x: x + jnp.asarray(far, x.dtype), moved(state.cohort, 5))
    state = state.replace(cohort=cohort)
    with contextlib.closing(WorkDir(folder)) as workdir:
        workdir.record(config, dataset.info)
        identity = Identity(config, data_digest(dataset.info.fingerprint))
        with contextlib.closing(Checkpoints(workdir.checkpoints_path, 9, identity)) as checkpoints:
            for step in steps:
                state = state.replace(step=jnp.int32(step))
                checkpoints.save(step, rounds.unpadded(state), Clock(), lambda: None)
    return state, config, dataset


@pytest.fixture(scope="module")
def saved(npz, tmp_path_factory):
    """A folder with a run that stopped in the middle of its first round, and what lies in it."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    return folder, *save_run(folder, npz, 6, 3 + 6)


@pytest.fixture
def run(saved, tmp_path) -> Path:
    """A copy of that folder, without attacks."""
    return shutil.copytree(saved[0], tmp_path / "run")


def attack(folder: Path, *options: str) -> int:
    return command.main(["attack", "--workdir", str(folder), *FAST, *options])


def report(folder: Path, name: str = "conv_normN0C4-test") -> dict:
    return json.loads((folder / "attack" / name / "attack.json").read_text())


# ---------------------------------------------------------------------------------- the command


def test_an_attack_from_end_to_end(run, saved, capsys):
    """Its numbers are those of the decoder that it leaves, on the latents of that very client."""
    _, state, config, dataset = saved
    before = contents(run)
    with contextlib.closing(WorkDir(run)):  # held by a process that trains
        assert attack(run, "--num_targets=18") == 0
    said, found = capsys.readouterr().out, report(run)
    assert "client 3 at step 9" in said and "epoch 2 of 2" in said and "MSE ratio" in said
    assert {name: data for name, data in contents(run).items() if name in before} == before
    assert (found["step"], found["client"], found["epochs"]) == (9, 3, 2)
    assert (found["auxiliary_images"], found["target_images"]) == (30, 18)

    folder = run / "attack" / "conv_normN0C4-test"
    tensors = load_file(folder / "decoder.safetensors")
    variables: dict = {}
    for name, tensor in tensors.items():
        *path, last = name.split("/")
        place = variables
        for part in path:
            place = place.setdefault(part, {})
        place[last] = tensor
    targets = dataset.test.images[:18].astype(np.float32) / 255
    normalised = (targets - np.float32(config.mean)) / np.float32(config.std)
    model = program_of(config).method.model
    latents = model.latents(at(state.cohort.client.params, 0), normalised)
    decoder = Decoder(parse_decoder("conv_normN0C4"), 8)
    answers = np.asarray(decoder.apply(variables, latents, jnp.ones(18, bool), False))
    mse = ((answers - targets) ** 2).mean(axis=(1, 2, 3))
    psnr = 10 * np.log10(1 / mse)
    for name, values in (("mse", mse), ("psnr", psnr)):
        assert found[name]["mean"] == pytest.approx(values.mean(), rel=1e-4)
        assert found[name]["std"] == pytest.approx(values.std(), rel=1e-3)
    options = Options(auxiliary=0.5, num_targets=18)
    chosen = choose_images(options, dataset, partition_of(config, 60, dataset.train.labels))
    auxiliary = dataset.train.images[np.concatenate([chosen.train, chosen.validate])]
    trivial = ((auxiliary.mean(axis=0) / 255 - targets) ** 2).mean()
    assert found["trivial"]["mse"]["mean"] == pytest.approx(trivial, rel=1e-5)
    assert found["mse_ratio"] == pytest.approx(mse.mean() / trivial, rel=1e-4)

    picture = np.asarray(Image.open(folder / "picture.png"))[::12, ::12]
    shown = 16  # two batches
    assert picture.shape == (16, 8 * shown, 3)
    upper = np.concatenate(list(dataset.test.images[:shown]), axis=1)
    np.testing.assert_array_equal(picture[:8], upper)
    lower = np.concatenate(list(answers[:shown]), axis=1) * 255
    np.testing.assert_allclose(picture[8:], lower, atol=0.51)


def test_it_asks_for_two_devices(run, monkeypatch):
    asked = []
    monkeypatch.setattr(command, "use_virtual_devices", asked.append)
    assert attack(run) == 0 and asked == [2]


def test_killed_and_repeated(run, monkeypatch, capsys):
    """It ends as if it had not been; a finished one answers at once."""
    with monkeypatch.context() as patch:
        patch.setattr(command, "evaluate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            attack(run)
    assert not (run / "attack" / "conv_normN0C4-test" / "attack.json").exists()
    assert attack(run) == attack(run, "--name=whole") == 0
    assert report(run) == report(run, "whole")
    capsys.readouterr()
    monkeypatch.setattr(command, "_load", None)
    assert attack(run) == 0
    assert capsys.readouterr().out.startswith("this attack is complete\ndecoder of epoch")


def test_an_attack_goes_on_at_the_step_that_it_began_with(run, saved, npz, monkeypatch, capsys):
    """The run has gone on meanwhile, and in the end that checkpoint is gone."""
    with monkeypatch.context() as patch:
        patch.setattr(command, "evaluate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            attack(run, "--step=6")
    assert attack(run) == 0 and report(run)["step"] == 6
    shutil.rmtree(run / "checkpoints" / "6")
    capsys.readouterr()
    assert attack(run) == 0 and "this attack is complete" in capsys.readouterr().out
    assert attack(run, "--step=9") == 2 and "--step 6 -> 9" in capsys.readouterr().err
    assert attack(run, "--seed=1") == 2 and "--seed 0 -> 1" in capsys.readouterr().err


def test_a_run_that_was_trained_anew_is_another(run, npz, capsys):
    assert attack(run) == 0
    shutil.rmtree(run / "checkpoints")
    save_run(run, npz, 9, far=3.0)
    assert attack(run) == 2 and "has been trained anew since this attack" in capsys.readouterr().err


def test_the_attacker_sees_what_the_client_sends(npz, tmp_path):
    """Clipped and rounded, with noise of the key; the trained decoder is adapted to it."""
    sent = {"clip": {"norm": 2.0}, "quantize": {"bits": 4}}
    state, config, dataset = save_run(tmp_path / "run", npz, 9, **sent)
    found = victim.read_victim(tmp_path / "run", read_run(tmp_path / "run"), 9, 3)
    images = np.float32(dataset.train.images[:5] / 255)
    model = program_of(config).method.model
    plain = model.latents(at(state.cohort.client.params, 0), images)
    seen = found.method.sent(found.participant, images, jax.random.key(1))
    expected = np.asarray(Release(clip_norm=2.0, bits=4)(plain))
    np.testing.assert_allclose(seen, expected, atol=1e-5)
    assert np.abs(expected - np.asarray(plain)).max() > 0.1

    noisy = {"clip": {"norm": 2.0}, "noise": {"multiplier": 0.5}}
    save_run(tmp_path / "noisy", npz, 9, **noisy)
    found = victim.read_victim(tmp_path / "noisy", read_run(tmp_path / "noisy"), 9, 3)
    one, other = (
        found.method.sent(found.participant, images, jax.random.key(seed)) for seed in (1, 2)
    )
    spread = np.std(np.asarray(one) - np.asarray(other)) / np.sqrt(2)
    assert spread == pytest.approx(1.0, rel=0.1)  # 0.5 x 2.0


def test_a_used_name_is_refused(run, capsys):
    assert attack(run, "--name=one") == 0
    before = contents(run)
    for option, words in (
        ("--epochs=3", "--epochs 2 -> 3"),
        ("--step=6", "--step 9 -> 6"),
        ("--targets=client:1", "--targets 'test' -> 'client:1'"),
    ):
        assert attack(run, "--name=one", option) == 2
        error = capsys.readouterr().err
        assert "--name = 'one': it holds an attack with other options" in error and words in error
        assert error.count("\n") == 1
    assert contents(run) == before
    assert attack(run, "--name=one", "--step=7") == 2
    assert "--step = 7: one of the saved steps 6, 9 is needed" in capsys.readouterr().err


def test_the_images_of_a_client(run, saved):
    """With the model that it would start the next round with, as it is not in this one."""
    _, _, config, dataset = saved
    assert attack(run, "--targets=client:2", "--step=6") == 0
    found = report(run, "conv_normN0C4-client2")
    held = partition_of(config, 60, dataset.train.labels).client(2)
    assert (found["client"], found["step"]) == (2, 6)
    assert found["target_images"] == len(held)


@pytest.mark.parametrize(("step", "client", "slot"), [(9, 1, 1), (9, 2, None), (6, 3, None)])
def test_whose_model_is_attacked(saved, step, client, slot):
    """A participant's own in the middle of a round, else the model that starts the next one."""
    folder, state, _, _ = saved
    found = victim.read_victim(folder, read_run(folder), step, client)
    models = state.server.client.params if slot is None else at(state.cohort.client.params, slot)
    jax.tree.map(np.testing.assert_array_equal, found.participant.client.params, models)
    assert found.latent_shape == (8, 8, 4)


def test_checkpoints_that_are_replaced_meanwhile(run, monkeypatch):
    folder, reads = run / "checkpoints", []
    (folder / "9").rename(run / "later")

    def find(path, *args, **kwargs):
        reads.append(1)
        if len(reads) > 1:
            return find_newest(path, *args, **kwargs)
        (run / "later").rename(folder / "9")  # and the one that was to be read is deleted
        shutil.rmtree(folder / "6")
        return Found(None, {6: "damaged"})

    find_newest = victim.find_newest
    monkeypatch.setattr(victim, "find_newest", find)
    assert victim.read_victim(run, read_run(run), None, None).step == 9


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--decoder=res_normN4", "--decoder = 'res_normN4': res_normN<blocks>C<channels> or"),
        (
            "--decoder=conv_normN99999C4",
            "--decoder = 'conv_normN99999C4': res_normN<blocks>C<channels> or"
            " conv_normN<blocks>C<channels> with 0 to 9999 blocks and 1 to 9999 channels",
        ),
        ("--targets=client", "--targets = 'client': 'test', or 'client:'"),
        ("--targets=client:4", "--targets = 'client:4': the run has 4 clients"),
        ("--num_targets=0", "--num_targets = 0: a number from 1"),
        ("--auxiliary=nan", "--auxiliary = nan: a number in (0, 1]"),
        ("--auxiliary=0.1", "--auxiliary = 0.1: 6 of 60 training images, at least 10"),
        ("--epochs=x", "--epochs = 'x': an integer is needed"),
        ("--learning_rate=0", "--learning_rate = 0.0: a number in (0, 1]"),
        ("--seed=-1", "--seed = -1: a number from 0"),
        ("--step=7", "--step = 7: one of the saved steps 6, 9 is needed"),
        ("--name=../x", "--name = '../x': a name of at most 100"),
        ("--config.cut=2", "--config.cut = '2': there is no such option"),
        ("word", "command line = 'word': options start with --"),
    ],
)
def test_options_that_are_refused(run, capsys, option, words):
    before = contents(run)
    assert attack(run, option) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"mocosfl_jax.attack: {words}") and error.count("\n") == 1
    assert contents(run) == before


def test_folders_that_are_refused(run, tmp_path, capsys):
    assert command.main(["attack"]) == 2
    assert "--workdir = None" in capsys.readouterr().err
    assert attack(tmp_path / "none") == 2
    assert "none': the folder of a run is needed" in capsys.readouterr().err
    shutil.rmtree(run / "checkpoints")
    assert attack(run) == 2
    assert "no checkpoint lies there yet" in capsys.readouterr().err


class Sends:
    """A method whose clients send arrays of this shape, or nothing."""

    def __init__(self, *shape):
        self.shape = shape

    def sent(self, participant, images, key):
        return jnp.zeros((len(images), *self.shape)) if self.shape else None


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Sends(), r"config\.method = 'mocosfl': its clients send no latents"),
        (Sends(7), r"config\.method = 'mocosfl': its latents \(7,\) are no square maps"),
        (Sends(5, 5, 2), r"config\.cut = 1: maps of 5 pixels cannot be doubled up to images of 8"),
    ],
)
def test_latents_that_no_decoder_can_answer(run, method, words):
    with pytest.raises(InputError, match=words):
        victim._latent_shape(read_run(run).config, method, None)


def test_damaged_checkpoints(run, capsys):
    """The one before is taken; where none is left, one line says why."""
    (run / "checkpoints" / "9" / "state" / "_METADATA").unlink()
    assert victim.read_victim(run, read_run(run), None, None).step == 6
    assert attack(run, "--step=9") == 2
    error = capsys.readouterr().err
    assert "checkpoints = [9]: none can be used (9: damaged: " in error
    assert error.count("\n") == 1


# --------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("targets", ["test", "client:1"])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_image_is_both(npz, targets, seed):
    """Nor are copies: here some training images equal test images and each other."""
    config, dataset = tiny.load(npz)
    images, test = dataset.train.images, dataset.test.images
    partition = partition_of(config, 60, dataset.train.labels)
    others = [i for i in range(60) if i not in partition.client(1)]
    images[others[:4]], images[others[4:6]] = test[:4], images[partition.client(1)[:2]]
    options = Options(targets=targets, auxiliary=0.5, num_targets=7, seed=seed)
    found = choose_images(options, dataset, partition)
    assert (len(found.train), len(found.validate), len(found.targets)) == (27, 3, 7)
    auxiliary = {images[i].tobytes() for i in (*found.train, *found.validate)}
    assert len({*found.train, *found.validate}) == 30
    pixels = {found.split.images[i].tobytes() for i in found.targets}
    assert not auxiliary & pixels
    if targets == "test":
        assert found.split is dataset.test and found.targets.tolist() == list(range(7))
    else:
        held = partition.client(1)
        assert found.split is dataset.train and found.targets.tolist() == sorted(held)[:7]
        assert not set(held) & {*found.train, *found.validate}
    other = choose_images(Options(auxiliary=0.5, seed=seed + 1), dataset, partition)
    assert set(other.train) != set(found.train)


def test_images_that_would_overlap(npz):
    config, dataset = tiny.load(npz)
    partition = partition_of(config, 60, dataset.train.labels)
    with pytest.raises(
        InputError, match=r"--auxiliary = 0\.9: 54 of 60 .* overlap .* at most 46 do not"
    ):
        choose_images(Options(targets="client:1", auxiliary=0.9), dataset, partition)
    dataset.train.images[:52] = dataset.test.images[0]
    with pytest.raises(InputError, match=r"--auxiliary = 0\.2: 12 of 60 .* at most 8 do not"):
        choose_images(Options(auxiliary=0.2), dataset, partition)
