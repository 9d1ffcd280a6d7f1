"""The defences of a config: what they do to a run, its bytes, its ledger and its encoder."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.core import FrozenDict

from mocosfl_jax import load_encoder
from mocosfl_jax.config import check_types, default_config
from mocosfl_jax.config.data import deal, partition_of, prepare
from mocosfl_jax.config.defences import DEFENCES, release_of
from mocosfl_jax.config.network import model_of
from mocosfl_jax.config.stored import run_values
from mocosfl_jax.data.cohort import CohortSampler
from mocosfl_jax.errors import InputError
from mocosfl_jax.evaluation.features import encode
from mocosfl_jax.evaluation.protocols import DrawnEncoder
from mocosfl_jax.federated.placement import single_device
from mocosfl_jax.federated.slots import Group, Slots
from mocosfl_jax.main import main
from mocosfl_jax.methods.mocosfl.defences import LATENTS_ONLY, WHOLE_RUN, facts
from mocosfl_jax.privacy.accounting import epsilon_of
from mocosfl_jax.privacy.nopeek import NoPeek
from mocosfl_jax.privacy.release import Release
from mocosfl_jax.privacy.simulated import SimulatedAttacker
from mocosfl_jax.privacy.together import Together
from mocosfl_jax.run.feed import dispatches, most_draws
from mocosfl_jax.run.plan import plan
from mocosfl_jax.run.program import program_of
from mocosfl_jax.run.rounds import Rounds, place_inputs, run_constants
from mocosfl_jax.run.summary import results_table
from mocosfl_jax.run.workdir import WorkDir
from mocosfl_jax.train import Interrupted, train
from tests import tiny
from tests.test_main import CONFIG, command, refused
from tests.tiny_method import assert_close

FIELDS = {  # a cohort of 3 clients leaves a slot of padding on each mesh
    "cohort_size": 3,
    "batch_size": 4,
    "steps_per_round": 2,
    "steps_per_dispatch": 1,
    "rounds": 2,
    "blocks_per_stage": (1,),
    "learning_rate": 0.003,
    "schedule": "constant",
    "augmentation": "v1",
    "knn_every": 0,
}
SENT = {
    "clip": {"norm": 2.0},
    "prune": {"kind": "random", "fraction": 0.25},
    "noise": {"multiplier": 0.05, "delta": 1e-3},
    "quantize": {"bits": 16},
}
ATTACKED = {
    "nopeek": {"weight": 0.5},
    "ressfl": {"alpha": 2.0, "threshold": 0.0, "decoder": "conv_normN0C4"},
}
ALL = {**SENT, **ATTACKED}
LATENTS = 8 * 8 * 4  # of an image
RELEASE = Release(clip_norm=2.0, dropped=0.25, pruning="random", noise_std=0.1, bits=16)


@pytest.fixture(scope="module")
def npz(tmp_path_factory) -> Path:
    return tiny.write_npz(tmp_path_factory.mktemp("data") / "images.npz", train=67, test=21)


def resolved(npz: Path, **fields):
    return tiny.load(npz, **{**FIELDS, **fields})[0]


def run(folder: Path, npz: Path, **fields) -> dict:
    config, dataset = tiny.load(npz, **{**FIELDS, **ALL, **fields})
    workdir = WorkDir(folder)
    try:
        return train(config, dataset, workdir)
    finally:
        workdir.close()


def saved_state(folder: Path, npz: Path):
    return tiny.saved_state(folder, npz, **FIELDS, **ALL)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(npz, tmp_path_factory) -> Path:
    """The folder of a run with all defences, on one device."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, npz)
    return folder


# ------------------------------------------------------------------------------- off, and built


def lowered(config, dataset) -> str:
    """The program of a dispatch, as it is given to the compiler."""
    placement = single_device()
    program = program_of(config, placement)
    rounds = Rounds(config, placement, program)
    partition = partition_of(config, len(dataset.train.images), dataset.train.labels)
    sampler = CohortSampler(partition, config.cohort_size, config.seed)
    dispatch = next(dispatches(config, partition, sampler, rounds.slots, 0))
    _, _, inputs = place_inputs(placement, dataset, False, dispatch)
    state = jax.eval_shape(rounds.initial_state)
    constants = run_constants(config, placement)
    return placement.dispatch(program, state).lower(state, inputs, constants).as_text()


def test_sections_that_are_off_leave_no_trace_in_the_program(npz):
    pixels = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    config, dataset = tiny.load(npz, **FIELDS, **pixels)
    absent = dataclasses.replace(config, sections=FrozenDict())
    off = resolved(
        npz,
        **pixels,
        prune={"kind": "random", "fraction": 0},
        noise={"delta": 0.1},
        ressfl={"alpha": 0.0, "threshold": 0.1, "decoder": "conv_normN1C8"},
    )
    assert lowered(absent, dataset) == lowered(off, dataset)
    assert lowered(resolved(npz, **SENT, **pixels), dataset) != lowered(off, dataset)


def test_values_of_the_sections_belong_to_the_identity(npz):
    fields = {name.partition(".")[0] for name in run_values(resolved(npz))}
    assert fields.isdisjoint(DEFENCES)
    values = run_values(resolved(npz, **ALL))
    assert (values["clip.norm"], values["ressfl.decoder"]) == (2.0, "conv_normN0C4")
    assert "ressfl.learning_rate" not in values and "ressfl.warmup" not in values


def test_what_a_config_says_is_what_the_client_does(npz):
    config = resolved(npz, **ALL)
    client = program_of(config).method.client
    assert client.release == release_of(config) == RELEASE
    nopeek, ressfl = client.extra_gradient.parts
    assert isinstance(client.extra_gradient, Together)
    assert nopeek == NoPeek(0.5)
    assert isinstance(ressfl, SimulatedAttacker)
    assert (ressfl.alpha, ressfl.threshold, ressfl.learning_rate) == (2.0, 0.0, 1e-3)
    assert ressfl.decoder.norm == "group" and ressfl.latent_shape == (8, 8, 4)
    many = resolved(npz, loss="client", batch_size=10, queue_length=120, **ATTACKED)
    attacker = program_of(many).method.client.extra_gradient.parts[1]
    assert attacker.decoder.norm == "batch"  # both views: 20 rows
    small = resolved(npz, bottleneck="C3S2", ressfl={"alpha": 1.0, "warmup": 0.3})
    alone = program_of(small).method.client.extra_gradient
    assert (alone.latent_shape, alone.warmup, ressfl.warmup) == ((4, 4, 3), 0.3, 0.0)


# -------------------------------------------------------------------------------------- a whole run


def test_metrics_of_the_extra_gradients_are_logged(whole):
    found = lines(whole)[1:]
    assert len(found) == 4
    for line in found:
        assert -1 <= line["attacker_ssim"] <= 1
        assert line["attacker_above_threshold"] in (
            0,
            pytest.approx(1 / 3),
            pytest.approx(2 / 3),
            1,
        )
        assert 0 < line["distance_correlation"] <= 1
    assert len({line["attacker_ssim"] for line in found}) == 4


def test_the_summary_has_the_ledger_and_accuracies_with_noise(whole, npz):
    summary = json.loads((whole / "summary.json").read_text())
    config, dataset = tiny.load(npz, **FIELDS, **ALL)
    partition = partition_of(config, 67, dataset.train.labels)
    draws = most_draws(config, dataset.info, partition)
    assert summary["releases_of_an_image"] == 2 * draws
    # Random pruning scales what it keeps: the noise is that much smaller beside it.
    expected = epsilon_of(0.05 * 0.75, 2 * draws, 1e-3)
    assert summary["epsilon"] == pytest.approx(expected)
    assert (summary["delta"], summary["epsilon_scope"]) == (1e-3, LATENTS_ONLY)
    for name in ("knn_top1_released", "linear_top1_released", "knn_top1", "linear_top1"):
        assert 0 <= summary[name] <= 100
    table = results_table(summary)
    assert f"{summary['epsilon']:.4g} at delta 0.001" in table and LATENTS_ONLY in table
    assert "kNN with noise or random pruning" in table
    assert "accuracies are without noise and random pruning" in table


def test_the_encoder_applies_what_is_not_random(whole, npz):
    encoder = load_encoder(whole)
    config, dataset = tiny.load(npz, **FIELDS, **ALL)
    assert encoder.model == model_of(config)
    assert encoder.model.release == Release(clip_norm=2.0, pruning="random", bits=16)
    images = dataset.test.images[:8]
    pixels = (images.astype(np.float32) / 255 - encoder.mean) / encoder.std

    @jax.jit
    def by_hand(variables, pixels):
        latents = encoder.model.latents(variables.client, pixels)
        kept = Release(clip_norm=2.0, bits=16)(latents)
        return [encoder.model.encode_sent(variables, x).features for x in (kept, latents)]

    expected, clean = by_hand(encoder.variables, np.float32(pixels))
    np.testing.assert_allclose(encoder(images), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(np.asarray(clean) - encoder(images)).max() > 1e-3


def test_noise_in_evaluation_belongs_to_the_image(whole, npz):
    """Not to the batch, nor to the device; and no two images share it."""
    encoder = load_encoder(whole)
    drawn = DrawnEncoder(encoder.model, RELEASE, seed=0)
    images = np.repeat(tiny.load(npz)[1].test.images[:1], 12, axis=0)

    def features(batch_size: int, first_row: int = 0) -> np.ndarray:
        args = drawn, encoder.variables, images, encoder.mean, encoder.std, batch_size
        return encode(*args, first_row=first_row).features

    one = features(32)
    np.testing.assert_allclose(features(8), one, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(features(8, 4)[:8], one[4:], rtol=1e-4, atol=1e-5)
    assert min(np.abs(a - b).max() for i, a in enumerate(one) for b in one[:i]) > 1e-4


def test_chunks_and_devices_change_nothing(whole, npz, tmp_path):
    run(tmp_path, npz, devices=4, cohort_chunks=2)
    got, want = saved_state(tmp_path, npz), saved_state(whole, npz)
    assert_close(got.server, want.server, "server", 2e-3)
    assert_close(got.population.opt_state, want.population.opt_state, "momentum", 1e-2)
    assert_close(got.population.extra, want.population.extra, "attackers", 2e-2)
    for name in ("loss", "attacker_ssim", "distance_correlation"):
        values = [[line[name] for line in lines(folder)[1:]] for folder in (tmp_path, whole)]
        np.testing.assert_allclose(*values, rtol=2e-3, err_msg=name)


def test_a_run_resumes_bit_for_bit(whole, npz, tmp_path, stop_at):
    """Stopped in the middle of a round."""
    stop_at(3)
    with pytest.raises(Interrupted):
        run(tmp_path, npz)
    run(tmp_path, npz)
    states = (saved_state(folder, npz) for folder in (tmp_path, whole))
    jax.tree.map(np.testing.assert_array_equal, *states)


# ----------------------------------------------------------------------------- bytes and the ledger


@pytest.mark.parametrize(
    ("fields", "bytes_an_image"),
    [
        ({"clip": {"norm": 1.0}}, 4 * LATENTS),
        ({"prune": {"fraction": 0.75}}, LATENTS + LATENTS / 8),
        ({"prune": {"kind": "random", "fraction": 0.75}}, LATENTS),
        ({"quantize": {"bits": 4}}, LATENTS / 2 + 8),
        ({"prune": {"fraction": 0.5}, "quantize": {"bits": 16}}, LATENTS + LATENTS / 8 + 8),
    ],
)
def test_the_plan_counts_what_is_sent(npz, fields, bytes_an_image):
    sizes, plain = plan(resolved(npz, **fields)), plan(resolved(npz))
    steps, images = 2, 4
    saved = plain.bytes_up_per_client_round - sizes.bytes_up_per_client_round
    assert saved == steps * 2 * images * (4 * LATENTS - bytes_an_image)
    assert sizes.bytes_down_per_client_round == plain.bytes_down_per_client_round


@pytest.mark.parametrize("fields", [{}, {"images_per_client": 9, "classes_per_client": None}])
def test_draws_are_those_of_the_run(npz, fields):
    config, dataset = tiny.load(npz, **{**FIELDS, **fields})
    partition = partition_of(config, 67, dataset.train.labels)
    sampler = CohortSampler(partition, 3, config.seed)
    counts: dict[int, int] = {}
    for dispatch in dispatches(config, partition, sampler, Slots((Group(3),), 4), 0):
        for image, counted in zip(dispatch.image_ids.flat, dispatch.mask.flat, strict=True):
            counts[int(image)] = counts.get(int(image), 0) + bool(counted)
    assert most_draws(config, dataset.info, partition) == max(counts.values())


@pytest.mark.parametrize(
    ("overrides", "latents", "scope"),
    [
        ([], 2, LATENTS_ONLY),
        (["--config.client_learning_rate=0.", "--config.loss=client"], 4, WHOLE_RUN),
    ],
)
def test_a_dry_run_prints_epsilon_and_what_it_covers(npz, capsys, overrides, latents, scope):
    argv = ["main", "--config", CONFIG, *tiny.flags(npz), "--config.clip.norm=1."]
    argv += ["--config.noise.multiplier=8.", "--dry_run", *overrides]
    assert main(argv) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("epsilon ")]
    config, dataset = tiny.load(npz)
    draws = most_draws(config, dataset.info, partition_of(config, 67, dataset.train.labels))
    epsilon = epsilon_of(8.0, latents * draws, 1e-5)
    assert line == (
        f"epsilon {epsilon:.4g} at delta 1e-05 for one image, of which {latents * draws} latents"
        f" are sent at most: {scope}"
    )


def test_without_noise_there_is_no_ledger(npz, capsys):
    assert main(["main", "--config", CONFIG, *tiny.flags(npz), "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "\nepsilon" not in said and "accuracies are" not in said


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prune": {"fraction": 0.5}, "quantize": {"bits": 8}}, ["with pruning and rounding of"]),
        ({"prune": {"fraction": 0.5, "kind": "random"}}, ["accuracies are without noise"]),
        (SENT, ["epsilon ", "with clipping and rounding of", "accuracies are without noise"]),
        (
            {**SENT, "client_learning_rate": 0.0, "init_from": "elsewhere"},
            ["epsilon ", "not channel means and stds", "with clipping", "accuracies are without"],
        ),
    ],
)
def test_notes_say_what_a_number_covers(npz, fields, words):
    notes = facts(resolved(npz, **fields), lambda: 3).notes
    assert len(notes) == len(words)
    assert all(word in note for word, note in zip(words, notes, strict=True)), notes
    assert ("config.init_from" in " ".join(notes)) == ("init_from" in fields)


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"clip": {"norm": -1.0}}, "config.clip.norm = -1.0: 0 (off), or"),
        ({"prune": {"fraction": 1.0}}, "config.prune.fraction = 1.0: a number in [0, 1)"),
        ({"prune": {"kind": "best"}}, "config.prune.kind = 'best': one of top_k, random"),
        ({"quantize": {"bits": 5}}, "config.quantize.bits = 5: 4, 8, 16 or 32"),
        ({"noise": {"delta": 0.0}}, "config.noise.delta = 0.0: "),
        ({"noise": {"multiplier": 1.0}}, "config.noise.multiplier = 1.0: the noise and its eps"),
        (
            {"nopeek": {"weight": 1.0}, "batch_size": 3},
            "config.nopeek.weight = 1.0: a client has 3",
        ),
        ({**ATTACKED, "client_learning_rate": 0.0}, "config.nopeek.weight = 0.5: clients are froz"),
        (
            {"ressfl": {"alpha": 1.0}, "client_state": "stateless", "align_momentum": True},
            "config.client_state = 'stateless': a client's simulated attacker would be lost",
        ),
        ({"ressfl": {"decoder": "N4C64"}}, "config.ressfl.decoder = 'N4C64': "),
        (
            {"ressfl": {"alpha": 1.0}, "image_size": 9, "stem": "3x3s2"},
            "config.ressfl.decoder = 'res_normN4C64': maps of 5 pixels cannot be doubled",
        ),
        ({"ressfl": {"alpha": 1.0, "threshold": 2.0}}, "config.ressfl.threshold = 2.0: "),
        ({"ressfl": {"alpha": 1.0, "warmup": 1.0}}, "config.ressfl.warmup = 1.0: "),
    ],
)
def test_values_that_cannot_hold_are_refused(npz, fields, words):
    with pytest.raises(InputError) as error:
        resolved(npz, **fields)
    assert str(error.value).startswith(words)


@pytest.mark.parametrize("classes", [None, 2])
def test_nopeek_is_refused_where_a_client_holds_too_few_images(npz, classes):
    """67 images of 20 clients: 3 or 4 each."""
    fields = {**FIELDS, "num_clients": 20, "classes_per_client": classes, "nopeek": {"weight": 1.0}}
    with pytest.raises(InputError, match=r"config.nopeek.weight = 1.0: a client holds [1-3] image"):
        dealt(npz, **fields)
    dealt(npz, **{**fields, "num_clients": 5})


def dealt(npz: Path, **fields) -> None:
    raw = default_config()
    raw.update({"dataset": f"npz:{npz}", **tiny.FIELDS, **fields})
    config = check_types(raw)
    deal(config, prepare(config))


def test_nopeek_alone_leaves_clients_stateless(npz):
    config = resolved(npz, nopeek={"weight": 1.0}, client_state="stateless", align_momentum=True)
    assert jax.tree.leaves(program_of(config).method.client.extra_gradient.init(None)) == []


@pytest.mark.parametrize("value", ["-1.", "1."])
def test_noise_below_0_or_without_clipping_ends_with_one_line(npz, capsys, value):
    line = refused(capsys, command(npz, f"--config.noise.multiplier={value}"))
    assert line.startswith(f"mocosfl_jax: config.noise.multiplier = {value}0: ")
