"""Sweeps: which runs they make, and what they refuse."""

import json
import re

import numpy as np
import pytest

from mocosfl_jax.data.dataset import DatasetInfo, Prepared
from mocosfl_jax.errors import InputError
from mocosfl_jax.sweep.command import main
from mocosfl_jax.sweep.definition import columns_of, default_sweep, expand
from mocosfl_jax.sweep.preflight import check
from tests.tiny_sweep import (
    BASE,
    FAKE,
    ROOT,
    SWEEP,
    command,
    refused,
    sweep_of,
)

pytestmark = pytest.mark.usefixtures("no_gpu")


# ---------------------------------------------------------------------------------- definition


def test_runs_are_all_combinations_first_seeds_first():
    runs = expand(
        sweep_of(
            fixed={"epochs": 3},
            grid={"num_clients": (50, 7), "queue_length": (600,)},
            variants={"MocoSFL-1": {"cut": 1}, "MonAco 3": {"ema": 0.5, "cut": 2}},
            seeds=(4,),
            more_seeds=({"num_clients": (7,), "variant": ("MocoSFL-1",), "seeds": (4, 9)},),
        )
    )
    assert list(runs) == [
        "MocoSFL-1,num_clients=50,queue_length=600,seed=4",
        "MocoSFL-1,num_clients=7,queue_length=600,seed=4",
        "MonAco_3,num_clients=50,queue_length=600,seed=4",
        "MonAco_3,num_clients=7,queue_length=600,seed=4",
        "MocoSFL-1,num_clients=7,queue_length=600,seed=9",
    ]
    assert runs["MonAco_3,num_clients=7,queue_length=600,seed=4"].arguments == [
        *("--config", BASE, "--config.epochs=3", "--config.cut=2", "--config.ema=0.5"),
        *("--config.num_clients=7", "--config.queue_length=600", "--config.seed=4"),
    ]


def test_some_cells_have_further_fields():
    more = (
        {"num_clients": (7, 9), "fields": {"cohort_size": 5}},
        {"num_clients": (9,), "variant": ("B",), "fields": {"cut": 2, "knn_every": None}},
    )
    variants = {"A": {}, "B": {"ema": 0.5}}
    runs = expand(sweep_of(grid={"num_clients": (4, 7, 9)}, variants=variants, more_fields=more))
    found = {(run.variant, run.cell["num_clients"]): run.overrides for run in runs.values()}
    assert found == {
        ("A", 4): {"num_clients": 4, "seed": 0},
        ("A", 7): {"num_clients": 7, "seed": 0, "cohort_size": 5},
        ("A", 9): {"num_clients": 9, "seed": 0, "cohort_size": 5},
        ("B", 4): {"num_clients": 4, "seed": 0, "ema": 0.5},
        ("B", 7): {"num_clients": 7, "seed": 0, "ema": 0.5, "cohort_size": 5},
        ("B", 9): {
            **{"num_clients": 9, "seed": 0, "ema": 0.5, "cohort_size": 5},
            **{"cut": 2, "knn_every": None},
        },
    }


def test_variants_of_several_methods_have_their_own_config_files():
    """The sweep's own base is then not needed."""
    files = {"A": "configs/baselines/fedema.py", "B": "configs/comparison.py:FL-BYOL"}
    variants = {name: {"base": str(ROOT / file)} for name, file in files.items()}
    variants["A"]["batch_size"] = 3
    runs = expand(sweep_of(base=None, grid={"num_clients": (4,)}, variants=variants))
    assert {name: run.arguments for name, run in runs.items()} == {
        "A,num_clients=4,seed=0": [
            *("--config", variants["A"]["base"], "--config.batch_size=3"),
            *("--config.num_clients=4", "--config.seed=0"),
        ],
        "B,num_clients=4,seed=0": [
            *("--config", variants["B"]["base"], "--config.num_clients=4", "--config.seed=0")
        ],
    }
    variants["C"] = {"cut": 2}
    with pytest.raises(InputError, match=r"config\.variants\['C'\]\.base = None: the config file"):
        expand(sweep_of(base=None, variants=variants))


def test_a_name_is_one_folder_and_tells_values_apart():
    grid = {"dataset": ("folder:/data/a b", "npz:x.npz"), "blocks_per_stage": ((1, 1), (2,))}
    names = list(expand(sweep_of(grid=grid)))
    assert names == [
        "blocks_per_stage=(1,1),dataset=folder:%2Fdata%2Fa_b,seed=0",
        "blocks_per_stage=(1,1),dataset=npz:x.npz,seed=0",
        "blocks_per_stage=(2,),dataset=folder:%2Fdata%2Fa_b,seed=0",
        "blocks_per_stage=(2,),dataset=npz:x.npz,seed=0",
    ]


def test_the_sweep_of_the_documentation():
    page = (ROOT / "docs" / "sweeps.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {}
    exec(compile(block, "docs/sweeps.md", "exec"), names)
    runs = expand(names["get_config"]())
    assert len(runs) == 2 * (3 * 2 + 2)
    assert list(runs)[-1] == "MocoSFL-3,num_clients=1000,seed=3"
    assert runs["MocoSFL-3,num_clients=1000,seed=3"].overrides == {
        **{"classes_per_client": 2, "cut": 2, "num_clients": 1000, "seed": 3}
    }


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        ({"cut": (1, 2), "num_clients": (4, 5)}, "num_clients"),
        ({"width": (4, 8), "cut": (1, 2)}, "cut"),
        ({}, "metrics"),
    ],
)
def test_the_rule_for_the_columns(grid, expected):
    sweep = sweep_of(grid=grid)
    expand(sweep)
    assert columns_of(sweep) == expected
    sweep.columns = "seed"
    assert columns_of(sweep) == "seed"


def test_a_field_of_the_variants_may_be_the_columns():
    sweep = sweep_of(variants={"A": {"cut": 1}, "B": {"cut": 2}}, columns="cut")
    assert len(expand(sweep)) == 2


def test_numbers_of_attacks_and_transfers_that_commands_make():
    """Under the names that the commands give them; a module of one's own may make any."""
    sweep = sweep_of(commands=("mocosfl_jax.attack --targets=client:3", "mocosfl_jax.evaluate"))
    sweep.more_commands = (
        {"variant": ("Q",), "commands": ("mocosfl_jax.evaluate --dataset npz:/data/mine.npz",)},
    )
    sweep.variants = {"P": {}, "Q": {}}
    sweep.metrics = ("transfer/mine/knn_top1", "knn_top1")
    sweep.scatter = ("attack/res_normN4C64-client3/mse_ratio", "linear_top1")
    expand(sweep)
    sweep.metrics = ("transfer/mine.npz/knn_top1",)
    words = r"transfer/mine\.npz; they make attack/res_normN4C64-client3, transfer/mine$"
    with pytest.raises(InputError, match=words):
        expand(sweep)
    sweep.commands = (*sweep.commands, "timeit --name=mine.npz")
    expand(sweep)


def test_a_sweep_unsets_fields():
    """The base deals 2 classes to each client, and monitors every 2 rounds."""
    base = str(ROOT / "configs" / "quickstart.py")
    variants = {"shards": {}, "dirichlet": {"classes_per_client": None, "dirichlet_alpha": 0.3}}
    grid = {"mean": (None, (0.5, 0.25, 0.5))}
    sweep = sweep_of(base=base, variants=variants, grid=grid, unset=("knn_every",))
    runs = expand(sweep)
    assert "--config.classes_per_client=None" in runs["dirichlet,mean=None,seed=0"].arguments
    found = [
        (config.classes_per_client, config.dirichlet_alpha, config.mean, config.knn_every)
        for config in check(runs).values()
    ]
    assert found == [
        *((None, 0.3, mean, None) for mean in grid["mean"]),
        *((2, None, mean, None) for mean in grid["mean"]),
    ]


def test_a_command_leaves_a_fixed_field_as_the_base_has_it(npz, capsys):
    base = str(ROOT / "configs" / "quickstart.py")
    fields = {"base": base, "grid.num_clients": (4,), "fixed.knn_k": None, "fixed.knn_every": None}
    assert main(command(npz, **fields), FAKE) == 0
    (run,) = json.loads((npz.parent / "sweep" / "sweep.json").read_text())["runs"].values()
    assert (run["config"]["knn_k"], run["config"]["knn_every"]) == (200, 2)


def test_labels_are_read_once_for_all_runs(monkeypatch):
    read = []

    def prepare(name, **options):
        prepared = cifar10(name)
        return prepared._replace(
            train_labels=lambda: read.append(options["seed"]) or prepared.train_labels()
        )

    monkeypatch.setattr("mocosfl_jax.config.data.prepare_dataset", prepare)
    grid = {"num_clients": (10, 20), "dirichlet_alpha": (0.3, 1.0)}
    check(expand(sweep_of(grid=grid, seeds=(4, 7))))
    assert read == [4, 7]


def test_every_check_that_needs_labels_is_made(npz):
    """60 images of 3 classes: no two of them give a client of 41 images its 21 of each."""
    fixed = {"dataset": f"npz:{npz}", "classes_per_client": 2, "images_per_client": 41}
    runs = expand(sweep_of(fixed=fixed, grid={"num_clients": (3,)}))
    with pytest.raises(InputError, match=r"images_per_client = 41: .*\(run num_clients=3,seed=0\)"):
        check(runs)


def test_words_in_a_list_on_the_command_line(npz, capsys):
    options = ("--dry_run", "--config.grid.head=('V1','V2')")
    assert main(command(npz, *options, **{"grid.num_clients": 4})) == 0
    assert capsys.readouterr().out.splitlines() == [
        *("head=V1,num_clients=4,seed=0", "head=V2,num_clients=4,seed=0", "2 runs"),
    ]


def test_the_client_count_sweep(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("mocosfl_jax.config.data.prepare_dataset", cifar10)
    assert main(["sweep", "--config", SWEEP, "--dry_run"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        *(f"num_clients={clients},seed=0" for clients in (10, 50, 100, 500, 1000)),
        *(f"num_clients={clients},seed=1" for clients in (10, 1000)),
        "7 runs",
    ]


def cifar10(name, **_) -> Prepared:
    assert name == "cifar10"
    info = DatasetInfo("cifar10", 50_000, 10_000, 32, 10)
    labels = np.arange(50_000, dtype=np.int32) % 10
    return Prepared(info, lambda: pytest.fail("no pixels are needed"), lambda: labels)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("grid.no_such_field", 1, ["no_such_field"]),
        ("grid.num_clients", (4, 61), ["config.num_clients", "61", "60", "run num_clients=61,"]),
        ("grid.num_clients", (4, "many"), ["num_clients", "many"]),
        ("grid.num_clients", (), ["config.grid.num_clients", "at least one value"]),
        ("grid.cut", (1, 9), ["config.cut", "9", "1 to 3", "run cut=9,"]),
        ("grid.momentum", (0.5, None), ["config.momentum = None: a num", "run momentum=None,"]),
        ("unset", ("cuts",), ["config.unset", "cuts", "a field of the runs"]),
        ("unset", ("width",), ["config.unset", "width", "set in fixed too"]),
        ("unset", ("num_clients",), ["config.unset", "num_clients", "set in grid too"]),
        ("unset", ("train_split", "momentum"), ["config.momentum = None: a number is needed"]),
        ("metrics", None, ["config.metrics", "None"]),
        ("grid.cut", (1, 1.5), ["config.cut = '1.5': an integer is needed (run cut=1.5"]),
        ("fixed.num_clients", 3, ["config.fixed.num_clients", "3", "config.grid"]),
        ("fixed.seed", 3, ["seed"]),
        ("seeds", (), ["config.seeds", "at least one"]),
        ("seeds", (0, -1), ["config.seed", "-1"]),
        ("more_seeds", ({"cut": (1,), "seeds": (1,)},), ["config.more_seeds", "cut"]),
        ("more_seeds", ({"method": ("A",), "seeds": (1,)},), ["config.more_seeds", "variant"]),
        ("more_fields", ({"num_clients": (2,), "fields": 1},), ["config.more_fields", "fields: {"]),
        (
            "more_fields",
            ({"num_clients": (2,), "fields": {"cuts": 2}},),
            ["config.more_fields.cuts = 2: no such field"],
        ),
        (
            "more_fields",
            ({"num_clients": (2,), "fields": {"epochs": 2}},),
            ["config.more_fields.epochs = 2: set in another place too"],
        ),
        ("columns", "clients", ["config.columns", "clients"]),
        ("columns", "width", ["config.columns = 'width'", "one of num_clients, seed, metrics"]),
        ("metrics", ("attack/a/mse_ratio",), ["no command of the sweep makes attack/a: set conf"]),
        ("base", "nowhere.py", ["config.base = 'nowhere.py': an existing config file"]),
        ("seeds", (0, 0, 1), ["config.seeds = (0, 0, 1): each seed once"]),
        ("grid.cut", (1, 1), ["config.grid.cut = (1, 1): each value once"]),
        ("fixed.width", "wide", ["config.fixed.width = 'wide': an integer is needed"]),
    ],
)
def test_wrong_fields_are_refused_before_any_run(capsys, npz, field, value, words):
    line = refused(capsys, command(npz, **{field: value}))
    for word in words:
        assert word in line
    assert not (npz.parent / "sweep").exists()


@pytest.mark.parametrize("option", ["--engine=cloud", "--jobs=0", "stray", "--no_such_flag"])
def test_wrong_options_are_refused(capsys, npz, option):
    assert option.lstrip("-").split("=")[0] in refused(capsys, command(npz, option))


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        ({"cuts": 1}, "cuts = 1: no such field"),
        ({"seed": 1}, "config.seeds"),
        ({"epochs": 2}, "set in config.fixed too"),
        ({"num_clients": 2}, "set in config.grid too"),
        ({"cut": {"depth": 1}}, "cut.depth = 1: no such field"),
        (3, "fields and their values"),
    ],
)
def test_wrong_variants_are_refused(variant, words):
    sweep = sweep_of(fixed={"epochs": 3}, grid={"num_clients": (2,)}, variants={"A": variant})
    with pytest.raises(InputError, match=r"config\.variants\['A'\]") as error:
        expand(sweep)
    assert words in str(error.value)


def test_a_config_of_a_run_is_no_sweep(capsys):
    line = refused(capsys, ["sweep", "--config", BASE, "--dry_run"])
    assert f"--config = '{BASE}'" in line and "default_sweep()" in line
    line = refused(capsys, ["sweep", "--config", "nowhere.py", "--dry_run"])
    assert "--config = 'nowhere.py': an existing config file is needed" in line


def test_a_method_that_does_not_exist():
    with pytest.raises(InputError, match=r"config\.method = 'no_such_method'"):
        default_sweep("no_such_method")


def test_the_former_name_of_variants_is_refused(tmp_path, capsys):
    config = tmp_path / "sweep.py"
    config.write_text(
        "from mocosfl_jax.sweep.definition import default_sweep\n"
        f"def get_config():\n    sweep = default_sweep()\n    sweep.base = {BASE!r}\n"
        "    sweep.methods = {'A': {'cut': 1}}\n    return sweep\n"
    )
    line = refused(capsys, ["sweep", "--config", str(config), "--dry_run"])
    assert line.startswith("mocosfl_jax.sweep: config.methods = {'A': {'cut': 1}}: ")
    assert "config.variants" in line


def test_a_variant_may_have_any_name():
    """Names of the sweep's own fields too."""
    variants = {"fixed": {"cut": 1}, "grid": {"cut": 2}}
    runs = expand(sweep_of(fixed={"epochs": 1}, variants=variants, unset=("knn_every",)))
    assert list(runs) == ["fixed,seed=0", "grid,seed=0"]
    with pytest.raises(InputError, match=r"config\.unset = 'epochs': set in fixed too"):
        expand(sweep_of(fixed={"epochs": 1}, variants=variants, unset=("epochs",)))


def test_a_base_is_needed(capsys):
    with pytest.raises(InputError, match=r"config\.base"):
        expand(default_sweep())
    assert main(["sweep", "--workdir", "x"]) == 2
    assert "configs/sweeps" in capsys.readouterr().err
