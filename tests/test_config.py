"""Rules of unset fields, checks of set ones, and that every field is read."""

import ast
import dataclasses
import runpy
import typing
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

import mocosfl_jax
from mocosfl_jax.config import Config, Resolved, check_types, default_config, resolve
from mocosfl_jax.config.checks import check_fields
from mocosfl_jax.config.data import deal
from mocosfl_jax.data.dataset import DatasetInfo, Prepared
from mocosfl_jax.data.partition import dirichlet, iid
from mocosfl_jax.errors import InputError

CIFAR10 = DatasetInfo(
    name="cifar10", num_train=50_000, num_test=10_000, image_size=32, num_classes=10
)


def resolved(info: DatasetInfo = CIFAR10, **fields) -> Resolved:
    config = default_config()
    config.update(fields)
    return resolve(check_types(config), info)


@pytest.mark.parametrize(
    ("clients", "cohort", "batch", "steps", "rounds", "syncs"),
    [  # the paper's rule: 100,000 steps of 100 images whatever the number of clients
        (5, 5, 20, 500, 200, 10),
        (20, 20, 5, 500, 200, 10),
        (50, 50, 2, 500, 200, 10),
        (100, 100, 1, 500, 200, 10),
        (200, 100, 1, 250, 400, 5),
        (1000, 100, 1, 50, 2000, 1),
    ],
)
def test_papers_rule(clients, cohort, batch, steps, rounds, syncs):
    config = resolved(num_clients=clients)
    assert (config.cohort_size, config.batch_size) == (cohort, batch)
    assert (config.steps_per_round, config.rounds, config.syncs_per_round) == (steps, rounds, syncs)
    assert config.total_steps == 100_000


def test_cross_silo_setting_with_sampling():
    config = resolved(num_clients=20, cohort_size=5, batch_size=20, syncs_per_round=10)
    assert (config.steps_per_round, config.rounds) == (125, 800)
    assert config.total_steps == 100_000


def test_set_steps_per_round_keeps_the_number_of_epochs():
    config = resolved(num_clients=100, steps_per_round=50)
    assert config.rounds == 2000


def test_local_epochs_make_rounds_longer_and_fewer():
    """Whole rounds of passes: 2,500 images a client in batches of 128."""
    config = resolved(num_clients=20, cohort_size=5, batch_size=128, local_epochs=5, epochs=100)
    assert (config.steps_per_round, config.rounds) == (5 * 2500 // 128, 80)
    assert resolved(steps_per_round=7, local_epochs=5).steps_per_round == 7
    fewer = resolved(num_clients=500, cohort_size=9, batch_size=128, local_epochs=5)  # 100 images
    assert fewer.steps_per_round == 5
    with pytest.raises(InputError, match=r"config.local_epochs = 50000: with .* 1 to 42949$"):
        resolved(num_clients=50, local_epochs=50_000)


def test_set_fields_are_never_overridden():
    fields = {
        "cohort_size": 7,
        "batch_size": 3,
        "steps_per_round": 12,
        "rounds": 5,
        "syncs_per_round": 4,
        "blocks_per_stage": (1, 2),
        "stem": "7x7s2",
        "head_width": 48,
        "loss": "client",
        "client_learning_rate": 0.01,
        "schedule": "constant",
        "augmentation": "v1",
        "blur_kernel_size": 5,
        "knn_every": 3,
        "steps_per_dispatch": 6,
        "checkpoint_every": 2,
        "image_size": 64,
    }
    config = resolved(head="V1", **fields)
    assert {name: getattr(config, name) for name in fields} == fields


def test_head_v1_brings_its_loss_schedule_and_augmentation():
    config = resolved(head="V1")
    assert (config.loss, config.schedule, config.augmentation) == ("one_way", "step", "v1")
    assert config.head_width == 128


@pytest.mark.parametrize(
    ("size", "stem"), [(32, "3x3s1"), (64, "3x3s2"), (96, "3x3s1"), (224, "7x7s2")]
)
def test_stem_by_image_size(size, stem):
    assert resolved(image_size=size).stem == stem


@pytest.mark.parametrize(("steps", "syncs"), [(500, 10), (7, 3), (5, 5), (9, 1), (5, 4)])
def test_syncs_are_as_many_as_asked_and_the_last_ends_the_round(steps, syncs):
    config = resolved(steps_per_round=steps, syncs_per_round=syncs, rounds=1)
    assert len(config.sync_steps) == steps
    assert sum(config.sync_steps) == syncs
    assert config.sync_steps[-1]


def test_every_field_is_resolved():
    optional = {
        "data_dir",
        "train_split",
        "test_split",
        "mean",
        "std",
        "classes_per_client",
        "dirichlet_alpha",
        "images_per_client",
        "devices",
        "cohort_chunks",
        "mix_dataset",
        "mix_batch_size",
        "init_from",
        "init_digest",
    }
    config = resolved()
    assert type(config) is Resolved
    unset = {name for name, value in vars(config).items() if value is None}
    assert unset == optional


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("cut", {"cut": 10}),
        ("cut", {"cut": 0}),
        ("num_clients", {"num_clients": 50_001}),
        ("cohort_size", {"num_clients": 10, "cohort_size": 11}),
        ("classes_per_client", {"classes_per_client": 11}),
        ("classes_per_client", {"num_clients": 20_000, "classes_per_client": 5}),
        ("dirichlet_alpha", {"dirichlet_alpha": 0.0}),
        ("dirichlet_alpha", {"dirichlet_alpha": 0.5, "classes_per_client": 2}),
        ("queue_length", {"queue_length": 199}),
        ("queue_length", {"queue_length": 199, "feature_sharing": False}),
        ("queue_length", {"queue_length": 99, "loss": "one_way"}),
        ("syncs_per_round", {"steps_per_round": 5, "syncs_per_round": 6, "rounds": 1}),
        ("steps_per_dispatch", {"steps_per_round": 10, "steps_per_dispatch": 4, "rounds": 1}),
        ("backbone", {"backbone": "resnet19"}),
        ("head", {"head": "v2"}),
        ("loss", {"loss": "both"}),
        ("bottleneck", {"bottleneck": "C4S3"}),
        ("bottleneck", {"bottleneck": "C4S4", "image_size": 30}),
        ("width", {"width": 30}),
        ("ema", {"ema": 1.0}),
        ("temperature", {"temperature": 0.0}),
        ("temperature", {"temperature": 1e-37}),
        ("learning_rate", {"learning_rate": -1.0}),
        ("learning_rate", {"learning_rate": float("nan")}),
        ("blocks_per_stage", {"blocks_per_stage": (1, 0)}),
        ("crop_min_scale", {"crop_min_scale": 1.5}),
        ("blur_kernel_size", {"blur_kernel_size": 8}),
        ("mean", {"mean": (0.5, 0.5)}),
        ("mean", {"mean": (0.5, 0.5, 1.01)}),
        ("mean", {"mean": (-0.01, 0.5, 0.5)}),
        ("std", {"std": (0.5, 1e-37, 0.5)}),
        ("std", {"std": (0.5, 0.0, 0.5)}),
        ("std", {"std": (True, 0.5, 0.5)}),
        ("mean", {"mean": (0.5, 0.5, float("inf"))}),
        ("rounds", {"rounds": 2**31}),
        ("knn_temperature", {"knn_temperature": 0.001}),
        ("images_per_client", {"images_per_client": 50_001}),
        ("images_per_client", {"images_per_client": 0}),
        ("client_state", {"client_state": "none"}),
        ("client_state", {"client_state": "stateless"}),
        (
            "client_state",
            {"client_state": "stateless", "align_momentum": True, "feature_sharing": False},
        ),
        ("cohort_chunks", {"cohort_chunks": 2, "head": "largeV2"}),
        ("cohort_chunks", {"cohort_chunks": 6, "num_clients": 5}),
        ("devices", {"devices": 0}),
        ("server_shards", {"server_shards": 0}),
    ],
)
def test_a_value_that_cannot_hold_is_named(field, fields):
    with pytest.raises(InputError, match=rf"config\.{field} = "):
        resolved(**fields)


def test_unlabelled_images_can_only_be_iid():
    unlabelled = dataclasses.replace(CIFAR10, num_classes=None)
    assert resolved(unlabelled).num_clients == 100
    with pytest.raises(InputError, match=r"config\.classes_per_client = 2"):
        resolved(unlabelled, classes_per_client=2)


def test_a_test_set_is_held_out_where_labels_can_be_tested():
    unlabelled = dataclasses.replace(CIFAR10, num_classes=None)
    assert resolved().holdout_fraction == 0.1
    assert resolved(unlabelled).holdout_fraction == 0.0
    assert resolved(unlabelled, holdout_fraction=0.25).holdout_fraction == 0.25


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("num_clients", number) for number in (10**400, -(10**400), 2**63)),
        ("seed", 10**400),
        ("blocks_per_stage", (1, 10**400)),
        ("temperature", 10**400),
        *(("temperature", number) for number in (1e-300, 1e-40, 1e39)),
        ("mean", (0.5, 1e-300, 0.5)),
        ("std", (0.5, 0.5, 1e-300)),
        ("std", (0.5, 10**400, 0.5)),
        ("std", (0.5, "wide", 0.5)),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_number_that_cannot_be_held_is_named(field, value):
    raw = {**default_config().to_dict(), field: value}
    with pytest.raises(InputError, match=rf"^config\.{field} = ") as error:
        check_types(raw)
    assert len(str(error.value)) < 200


def test_every_number_is_checked():
    """One that neither int64 nor float32 can hold, and that Python refuses to print."""
    for name, hint in typing.get_type_hints(Config).items():
        if "int" in str(hint) or "float" in str(hint):
            number = (10**5000,) * 3 if "tuple" in str(hint) else 10**5000
            with pytest.raises(InputError, match=rf"config\.{name} = "):
                check_types({**default_config().to_dict(), name: number})


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("steps_per_round", {"steps_per_round": 3_000_000_000}),
        ("steps_per_round", {"steps_per_round": 2**31 - 1, "rounds": 1}),
        ("rounds", {"steps_per_round": 100_000, "rounds": 100_000}),
        ("epochs", {"epochs": 10**15}),
        ("epochs", {"epochs": 2**31 - 1}),
        ("epochs", {"num_clients": 10**9, "images_per_client": 5}),
        ("epochs", {"epochs": 2**31 - 1, "steps_per_round": 1}),
        ("batch_size", {"batch_size": 10**15}),
        ("batch_size", {"batch_size": 10**9}),
        (
            "cohort_size",
            {"num_clients": 10**6, "images_per_client": 50_000, "cohort_size": 10**6},
        ),
        ("num_clients", {"num_clients": 10**12, "images_per_client": 5}),
        ("queue_length", {"queue_length": 10**12}),
        ("blocks_per_stage", {"blocks_per_stage": (10**9,)}),
        ("blocks_per_stage", {"blocks_per_stage": (1,) * 40}),
        ("width", {"width": 2**31 - 4}),
        ("bottleneck", {"bottleneck": f"C{10**30}S1"}),
    ],
    ids=lambda value: repr(value)[:50],
)
def test_the_field_that_is_too_large_is_named(field, fields):
    with pytest.raises(InputError, match=rf"^config\.{field} = "):
        resolved(**fields)


def test_one_thing_is_not_several():
    with pytest.raises(InputError, match="rounds of 1 step follow"):
        resolved(epochs=2**31 - 1, steps_per_round=1)
    with pytest.raises(InputError, match=r"each of which brings 1 key a step: at least 100$"):
        resolved(queue_length=1, feature_sharing=False, loss="one_way")


def dealt(labels: np.ndarray, **fields) -> Resolved:
    """The resolved config of images with these labels, by the checks in their order."""
    info = DatasetInfo("npz:x", len(labels), 0, 32, int(labels.max()) + 1)
    config = check_types({**default_config().to_dict(), **fields})
    check_fields(config)
    prepared = Prepared(info, lambda: pytest.fail("no pixels are needed"), lambda: labels)
    return deal(config, prepared)[0]


def test_the_cohort_is_drawn_from_clients_that_have_images():
    labels = np.arange(3000) % 10
    fields = {"num_clients": 20, "dirichlet_alpha": 0.05, "seed": 3}
    sizes = dirichlet(labels, 20, 0.05, seed=3).sizes
    holders = int(np.sum(sizes > 0))
    assert 1 < holders < 20
    assert dealt(labels, **fields).cohort_size == holders
    assert dealt(labels, **fields, cohort_size=holders).cohort_size == holders
    beyond = rf"config\.cohort_size = {holders + 1}: .* 1 to {holders}$"
    with pytest.raises(InputError, match=beyond):
        dealt(labels, **fields, cohort_size=holders + 1)
    shared = dealt(labels, **fields, images_per_client=7)  # draws until it has seven
    assert shared.cohort_size == 20


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("images_per_client", {"classes_per_client": 2, "images_per_client": 601}),
        ("images_per_client", {"images_per_client": 3001}),
        ("cohort_size", {"dirichlet_alpha": 0.001, "num_clients": 100, "cohort_size": 100}),
        ("num_clients", {"dirichlet_alpha": 0.5, "num_clients": 3001}),
        ("num_clients", {"num_clients": 3001}),
    ],
)
def test_what_only_labels_tell_is_refused_without_pixels(field, fields):
    with pytest.raises(InputError, match=rf"^config\.{field} = "):
        dealt(np.arange(3000) % 10, **fields)


@pytest.mark.parametrize("pictures", [20, 200, 100_000])
@pytest.mark.parametrize("classes", [None, 3])
def test_the_config_for_a_folder_takes_any_number_of_pictures(pictures, classes):
    path = Path(mocosfl_jax.__file__).parents[1] / "configs" / "folder.py"
    raw = runpy.run_path(str(path))["get_config"]()
    info = DatasetInfo("folder:x", pictures, 0, 64, classes)
    config = resolve(check_types(raw), info, iid(pictures, raw.num_clients, 0))
    assert (config.cohort_size, config.stem, config.image_size) == (10, "3x3s2", 64)
    passes = config.total_steps * config.cohort_size * config.batch_size / pictures
    assert passes == pytest.approx(50, rel=0.1) or pictures < 100


def test_unknown_fields_and_wrong_types_are_named():
    config = ConfigDict(default_config().to_dict())
    config.num_client = 5
    with pytest.raises(InputError, match=r"config\.num_client = 5"):
        check_types(config)
    config = ConfigDict({**default_config().to_dict(), "cut": "one"})
    with pytest.raises(InputError, match=r"config\.cut = 'one'"):
        check_types(config)


def test_every_field_is_read():
    """Each field is an attribute read from a config somewhere in the package."""
    package = Path(mocosfl_jax.__file__).parent
    read = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and "config" in ast.unparse(node.value):
                read.add(node.attr)
    unread = {field.name for field in dataclasses.fields(Config)} - read
    assert not unread


def test_every_field_is_documented():
    """A comment stands above each field, or above the group that it ends."""
    source = (Path(mocosfl_jax.__file__).parent / "config" / "fields.py").read_text()
    lines = source.splitlines()
    for field in dataclasses.fields(Config):
        index = next(i for i, line in enumerate(lines) if line.startswith(f"    {field.name}: "))
        above = index - 1
        while lines[above].startswith("    ") and not lines[above].lstrip().startswith("#"):
            above -= 1
        assert lines[above].lstrip().startswith("#"), field.name
