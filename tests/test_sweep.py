"""Sweeps: which runs they make, what they refuse, how they stop and go on, what they report."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from mocosfl_jax.config.recipe import Recipe
from mocosfl_jax.config.stored import to_json
from mocosfl_jax.data.dataset import DatasetInfo, Prepared
from mocosfl_jax.errors import InputError
from mocosfl_jax.sweep import engines
from mocosfl_jax.sweep.__main__ import main
from mocosfl_jax.sweep.definition import check, default_sweep, expand
from mocosfl_jax.sweep.engines import LocalEngine, RequeuedTask, SlurmEngine, Task, visible_gpus
from mocosfl_jax.sweep.folder import SweepFolder, last_line
from mocosfl_jax.sweep.report import Cell, tabulate
from mocosfl_jax.sweep.runner import Board, StopRequest, Tally, carry_out
from tests import tiny

ROOT = Path(__file__).parent.parent
SWEEP = str(ROOT / "configs" / "sweeps" / "client_count.py")
BASE = str(ROOT / "configs" / "cifar10.py")
FAKE = (sys.executable, str(ROOT / "tests" / "fake_run.py"))


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No GPU, whatever the machine has."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("FAKE_RUN", raising=False)


@pytest.fixture
def npz(tmp_path) -> Path:
    return tiny.write_npz(tmp_path / "images.npz")


def command(npz: Path, *options: str, **sweep) -> list[str]:
    """The client-count sweep on tiny images: 2 and 4 clients, seed 0; changed by fields."""
    tiny_fields = {"dataset": f"npz:{npz}", **tiny.FIELDS}
    del tiny_fields["num_clients"]
    fields = {
        "base": BASE,
        "more_seeds": (),
        "grid.num_clients": (2, 4),
        **{f"fixed.{name}": value for name, value in tiny_fields.items()},
        **sweep,
    }
    return [
        *("sweep", "--config", SWEEP, "--workdir", str(npz.parent / "sweep")),
        *(f"--config.{name}={value}" for name, value in fields.items()),
        *options,
    ]


def run_path(npz: Path, name: str) -> Path:
    return npz.parent / "sweep" / "runs" / name


def calls(npz: Path) -> dict[str, int]:
    """How often each run was started."""
    folders = sorted((npz.parent / "sweep" / "runs").iterdir())
    return {path.name: len((path / "calls").read_text().splitlines()) for path in folders}


def sweep_of(**fields) -> ConfigDict:
    sweep = default_sweep()
    sweep.base = BASE
    for name, value in fields.items():
        if isinstance(value, dict):
            sweep[name].update(value)
        else:
            sweep[name] = value
    return sweep


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
        ("grid.cut", (1, 1.5), ["--config.cut=1.5"]),
        ("fixed.num_clients", 3, ["config.fixed.num_clients", "3", "config.grid"]),
        ("fixed.seed", 3, ["seed"]),
        ("seeds", (), ["config.seeds", "at least one"]),
        ("seeds", (0, -1), ["config.seed", "-1"]),
        ("more_seeds", ({"cut": (1,), "seeds": (1,)},), ["config.more_seeds", "cut"]),
        ("more_seeds", ({"method": ("A",), "seeds": (1,)},), ["config.more_seeds", "variant"]),
        ("columns", "clients", ["config.columns", "clients"]),
        ("base", "nowhere.py", ["config.base = 'nowhere.py': an existing config file"]),
        ("seeds", (0, 0, 1), ["config.seeds = (0, 0, 1): each seed once"]),
        ("grid.cut", (1, 1), ["config.grid.cut = (1, 1): each value once"]),
        ("fixed.width", "wide", ["command line = '--config.fixed.width=wide'"]),
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


def refused(capsys, argv: list[str]) -> str:
    """The one line with which a command is refused."""
    assert main(argv, FAKE) == 2
    _, err = capsys.readouterr()
    assert len(err.splitlines()) == 1, err
    return err


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


# ------------------------------------------------------------------------------------- sections


@dataclass(frozen=True)
class ToySection:
    rate: float = 0.5
    limit: float | None = None


TOY = Recipe(
    reads=frozenset({"queue_length", "syncs_per_round"}),
    build=lambda *_: pytest.fail("a sweep builds no method"),
    sections={"toy": ToySection},
)
TOY_NAME = f"{__name__}:TOY"


def toy_sweep(npz: Path, lines: str) -> list[str]:
    """The command of a sweep of runs of `TOY` whose base has the limit 3."""
    fields = {"dataset": f"npz:{npz}", **tiny.FIELDS}
    base, sweep = npz.with_name("base.py"), npz.with_name("toy_sweep.py")
    base.write_text(
        "from mocosfl_jax.config import default_config\n"
        f"def get_config():\n    config = default_config({TOY_NAME!r})\n"
        f"    config.update({fields!r})\n    config.toy.limit = 3.0\n    return config\n"
    )
    sweep.write_text(
        "from mocosfl_jax.sweep.definition import default_sweep\n"
        f"def get_config():\n    sweep = default_sweep({TOY_NAME!r})\n"
        f"    sweep.base = {str(base)!r}\n    sweep.grid.num_clients = (4,)\n    {lines}\n"
        "    return sweep\n"
    )
    return ["sweep", "--config", str(sweep), "--workdir", str(npz.parent / "sweep")]


def test_a_sweep_over_a_field_of_a_section(npz, capsys):
    lines = "sweep.grid.toy.rate = (0.2, 0.1); sweep.columns = 'toy.rate'"
    assert main(toy_sweep(npz, lines), FAKE) == 0
    out = capsys.readouterr().out
    assert "by toy.rate." in out and "| variant |  | 0.1 | 0.2 |" in out
    records = SweepFolder(npz.parent / "sweep").records()
    assert [(r.name, r.config["toy.rate"], r.config["toy.limit"]) for r in records] == [
        ("num_clients=4,toy.rate=0.2,seed=0", 0.2, 3.0),
        ("num_clients=4,toy.rate=0.1,seed=0", 0.1, 3.0),
    ]
    log = (run_path(npz, records[0].name) / "log.txt").read_text()
    assert "--config.toy.rate=0.2" in log.splitlines()[0]
    assert main(toy_sweep(npz, lines), FAKE) == 0
    assert "2 of 2 runs are finished already" in capsys.readouterr().out
    line = refused(capsys, toy_sweep(npz, f"{lines}; sweep.fixed.toy.limit = 4.0"))
    assert "toy.limit 3.0 -> 4.0" in line


def test_variants_that_set_and_unset_fields_of_a_section(npz, capsys):
    lines = (
        "sweep.variants = {'slow': {'toy': {'rate': 0.1}}, 'fast': {'toy': {'rate': 0.2}}}; "
        "sweep.unset = ('toy.limit',); "
        "sweep.more_seeds = ({'variant': ('fast',), 'seeds': (5,)},)"
    )
    assert main(toy_sweep(npz, lines), FAKE) == 0
    capsys.readouterr()
    records = SweepFolder(npz.parent / "sweep").records()
    assert [(r.variant, r.config["seed"], r.config["toy.rate"]) for r in records] == [
        *(("fast", 0, 0.2), ("slow", 0, 0.1), ("fast", 5, 0.2)),
    ]
    assert {r.config["toy.limit"] for r in records} == {None}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("sweep.grid.toy.rate = ()", "config.grid.toy.rate = (): at least one value"),
        ("sweep.grid.toy.rate = (1.0, 'x')", "--config.toy.rate=x"),
        ("sweep.grid.toy.speed = (1.0,)", "speed"),
        ("sweep.grid.toy = (1.0,)", "toy"),
        ("sweep.unset = ('toy',)", "config.unset = 'toy': a field of the runs"),
        ("sweep.columns = 'toy'", "config.columns = 'toy': a field of the runs"),
        ("sweep.variants = {'A': {'toy': {'speed': 1}}}", "['A'].toy.speed = 1: no such field"),
        ("sweep.variants = {'A': {'toy': 1}}", "config.variants['A'].toy = 1: no such field"),
        (
            "sweep.fixed.toy.rate = 1.0; sweep.variants = {'A': {'toy': {'rate': 2.0}}}",
            "config.variants['A'].toy.rate = 2.0: set in config.fixed too",
        ),
    ],
)
def test_wrong_fields_of_a_section_are_refused(npz, capsys, lines, words):
    assert words in refused(capsys, toy_sweep(npz, lines))


def test_a_method_that_does_not_exist():
    with pytest.raises(InputError, match=r"config\.method = 'no_such_method'"):
        default_sweep("no_such_method")


# ------------------------------------------------------------------------------- earlier versions


@pytest.fixture
def earlier(npz) -> list[str]:
    """The command that continues a sweep of version 0.1.0, one run of which is finished.

    Its sweep.json calls variants `method`, and stores the defaults of fields that are now unset.
    """
    folder = SweepFolder(npz.parent / "sweep")
    text = (Path(__file__).parent / "version_0_1" / "sweep.json").read_text()
    folder.path.mkdir()
    folder.definition_path.write_text(text.replace("DATA", str(npz)))
    for name, summary in (("shared", {"knn_top1": 50.0, "steps": 18}), ("private", None)):
        path = folder.run_path(f"{name},num_clients=4,seed=0")
        path.mkdir(parents=True)
        if summary:
            (path / "summary.json").write_text(json.dumps(summary))
    fields = {name: value for name, value in tiny.FIELDS.items() if name != "num_clients"}
    script = npz.with_name("earlier.py")
    script.write_text(
        "from mocosfl_jax.sweep.definition import default_sweep\n"
        f"def get_config():\n    sweep = default_sweep()\n    sweep.base = {BASE!r}\n"
        f"    sweep.fixed.update({ {'dataset': f'npz:{npz}', **fields}!r})\n"
        "    sweep.grid.num_clients = (4,)\n"
        "    sweep.variants = {'shared': {}, 'private': {'feature_sharing': False}}\n"
        "    return sweep\n"
    )
    return ["sweep", "--config", str(script), "--workdir", str(folder.path)]


def test_a_sweep_of_an_earlier_version_is_reported(earlier, npz, capsys):
    assert main(["sweep", "--workdir", str(npz.parent / "sweep"), "--report"]) == 0
    out = capsys.readouterr().out
    assert "2 runs: 1 finished, 1 unfinished." in out
    assert "| shared | kNN, top-1 % | 50.00 (1) |" in out
    with (npz.parent / "sweep" / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["variant"], row["status"]) for row in rows] == [
        *(("private", "unfinished"), ("shared", "finished")),
    ]


def test_a_sweep_of_an_earlier_version_goes_on(earlier, npz, capsys):
    assert main(earlier, FAKE) == 0
    assert capsys.readouterr().out.startswith("1 of 2 runs are finished already\n")
    assert (run_path(npz, "private,num_clients=4,seed=0") / "calls").exists()
    assert not (run_path(npz, "shared,num_clients=4,seed=0") / "calls").exists()
    assert main(earlier, FAKE) == 0  # the definition has been written anew
    assert capsys.readouterr().out.startswith("2 of 2 runs are finished already\n")


@pytest.mark.parametrize(("field", "value"), [("temperature", 0.2), ("cut", 2), ("epochs", 3)])
def test_an_earlier_version_stored_what_the_rules_fill_now(earlier, capsys, field, value):
    line = refused(capsys, [*earlier, f"--config.fixed.{field}={value}"])
    assert re.search(rf"{field} [\d.]+ -> {value}", line)


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


# ------------------------------------------------------------------------------------- running


def test_failed_and_new_runs_are_run_again_finished_ones_are_not(capsys, npz, monkeypatch):
    monkeypatch.setenv("FAKE_RUN", "2/0=fail")
    assert main(command(npz), FAKE) == 1
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        "mocosfl_jax.sweep: num_clients=2,seed=0 failed, exit status 1: what went wrong"
    ]
    assert "failed num_clients=2,seed=0 (0 of 2 runs done, 0 running, 1 failed, 1 left)" in out
    assert "finished num_clients=4,seed=0 in 00:0" in out
    assert "2 runs: 1 finished, 1 unfinished." in out
    log = (run_path(npz, "num_clients=2,seed=0") / "log.txt").read_text()
    assert "--config.num_clients=2" in log.splitlines()[0]

    monkeypatch.delenv("FAKE_RUN")
    assert main(command(npz, seeds=(0, 3)), FAKE) == 0
    out, err = capsys.readouterr()
    assert (out.splitlines()[0], err) == ("1 of 4 runs are finished already", "")
    assert "4 runs: 4 finished." in out
    assert calls(npz) == {
        "num_clients=2,seed=0": 2,
        "num_clients=2,seed=3": 1,
        "num_clients=4,seed=0": 1,
        "num_clients=4,seed=3": 1,
    }


def test_a_run_that_always_fails_may_be_left_out(capsys, npz, monkeypatch):
    monkeypatch.setenv("FAKE_RUN", "2/0=fail")
    assert main(command(npz), FAKE) == 1
    capsys.readouterr()
    assert main(command(npz, **{"grid.num_clients": (4,)}), FAKE) == 0
    out, _ = capsys.readouterr()
    assert "num_clients=2,seed=0 is left out from now on; its files stay" in out
    assert "1 run: 1 finished." in out
    assert calls(npz) == {"num_clients=2,seed=0": 1, "num_clients=4,seed=0": 1}


def test_finished_runs_do_not_need_their_data(capsys, npz):
    assert main(command(npz), FAKE) == 0
    npz.unlink()
    assert main(command(npz), FAKE) == 0
    capsys.readouterr()
    assert "images.npz" in refused(capsys, command(npz, seeds=(0, 1)))  # a new run needs them
    assert "temperature" in refused(capsys, command(npz, **{"fixed.temperature": 0.25}))


def test_another_sweep_in_the_same_folder_is_refused(capsys, npz):
    assert main(command(npz), FAKE) == 0
    capsys.readouterr()
    line = refused(capsys, command(npz, **{"grid.num_clients": (4, 5)}))
    assert "finished run" in line and "num_clients=2,seed=0" in line
    other = command(npz, **{"fixed.temperature": 0.25})
    assert "temperature None -> 0.25" in refused(capsys, other)
    assert main(command(npz, **{"fixed.knn_every": 2}), FAKE) == 0  # says only how it is run
    assert calls(npz) == {"num_clients=2,seed=0": 1, "num_clients=4,seed=0": 1}


def test_a_field_may_be_set_to_what_its_rule_gave(capsys, npz):
    assert main(command(npz), FAKE) == 0
    for name in calls(npz):
        config, _ = tiny.load(npz, num_clients=int(name[len("num_clients=")]))
        (run_path(npz, name) / "config.json").write_text(json.dumps(to_json(config)))
    capsys.readouterr()
    assert main(command(npz, **{"fixed.temperature": 0.1}), FAKE) == 0
    assert "2 of 2 runs are finished already" in capsys.readouterr().out
    line = refused(capsys, command(npz, **{"fixed.temperature": 0.1, "fixed.ema": 0.9}))
    assert "ema 0.99 -> 0.9" in line


def test_a_folder_is_held_by_one_process_but_can_be_reported_on(capsys, npz):
    assert main(command(npz), FAKE) == 0
    capsys.readouterr()
    with SweepFolder(npz.parent / "sweep").hold():
        assert "in use" in refused(capsys, command(npz))
        assert main(["sweep", "--workdir", str(npz.parent / "sweep"), "--report"]) == 0
        assert "2 runs: 2 finished." in capsys.readouterr().out


def test_a_signal_lets_runs_save_and_the_same_command_goes_on(npz, tmp_path):
    script = tmp_path / "sweep.py"
    script.write_text(
        "import sys\nfrom mocosfl_jax.sweep.__main__ import main\n"
        f"sys.exit(main(sys.argv, {FAKE!r}))\n"
    )
    argv = command(npz, "--jobs=2", seeds=(0, 1))
    environment = {**os.environ, "FAKE_RUN": "2/0=wait 4/0=wait", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, str(script), *argv[1:]]
    sweep = subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True)
    waiting = [run_path(npz, f"num_clients={clients},seed=0") for clients in (2, 4)]
    while not all((path / "ready").exists() for path in waiting):
        assert sweep.poll() is None, sweep.communicate()
        time.sleep(0.05)
    sweep.terminate()
    assert "the same command goes on" in sweep.communicate()[1]
    assert sweep.returncode == 143
    assert all((path / "saved").exists() for path in waiting)
    assert set(calls(npz)) == {path.name for path in waiting}  # no other run was started
    assert main(argv, FAKE) == 0
    assert list(calls(npz).values()) == [2, 1, 2, 1]


def test_a_folder_stays_held_while_runs_outlive_the_sweep(tmp_path):
    folder = SweepFolder(tmp_path / "sweep")
    with folder.hold() as lock:
        engine = LocalEngine(1, keep_open=(lock.fileno(),))
        (job,) = engine.start([Task("a", ("sleep", "120"), tmp_path / "log.txt")])
    with pytest.raises(InputError, match="in use"):
        folder.hold()
    job.kill()
    folder.hold().close()


class StubbornJob:
    """Does not end before it is killed."""

    killed = stopped = False

    def poll(self) -> int | None:
        return -9 if self.killed else None

    def stop(self) -> None:
        self.stopped = True

    def kill(self) -> None:
        self.killed = True


class StubbornEngine:
    slots = 1
    seconds_between_polls = 0.01

    def __init__(self, stop: StopRequest):
        self.jobs, self._stop = [], stop

    def start(self, tasks):
        self.jobs += [StubbornJob() for _ in tasks]
        self._stop(signal.SIGTERM, None)
        return self.jobs


def test_a_run_that_does_not_end_is_killed_after_the_grace_period(monkeypatch, tmp_path):
    monkeypatch.setattr("mocosfl_jax.sweep.runner.GRACE_SECONDS", 0.05)
    stop, tally = StopRequest(), Tally(total=2, slots=1)
    engine = StubbornEngine(stop)
    tasks = [Task(name, (), tmp_path / name) for name in ("a", "b")]
    carry_out(tasks, engine, tally, Board(tally), stop)
    assert [(job.stopped, job.killed) for job in engine.jobs] == [(True, True)]


def test_gpus_are_divided_between_the_processes_of_this_machine(monkeypatch):
    gpus = ("0", "2", "5")

    def shares(slots):
        engine = LocalEngine(slots, gpus)
        return [engine.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(engine.slots)]

    assert shares(None) == ["0", "2", "5"]
    assert shares(2) == ["0,5", "2"]
    assert shares(5) == ["0", "2", "5", "0", "2"]
    assert LocalEngine(5, gpus).environment(3)["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert LocalEngine(None).slots == 1
    assert LocalEngine(2).environment(1) == {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-aa")
    assert visible_gpus() == ["3", "GPU-aa"]


def test_gpus_are_counted_by_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    listing = "GPU 0: A (UUID: GPU-x)\\n  MIG 1g: B\\nGPU 1: A (UUID: GPU-y)\\n"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{listing}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert visible_gpus() == ["0", "1"]


def test_the_last_line_of_a_log(tmp_path):
    log = tmp_path / "log.txt"
    assert last_line(log) == "no output"
    log.write_text("first\n 10%\r 20%\r\n\n")
    assert last_line(log) == "20%"


def test_the_progress_line(monkeypatch):
    monkeypatch.setattr("time.monotonic", lambda: 1000.0)
    tally = Tally(total=9, slots=2, done=3, failed={"x": "why"}, running={"a": 980.0, "b": 990.0})
    assert str(tally) == "3 of 9 runs done, 2 running, 1 failed, 3 left"
    tally.seconds += [50.0, 70.0]  # (5 runs * 60 s - 20 s - 10 s) / 2 at a time
    assert str(tally).endswith(", 3 left, 02:15 to go")


class Terminal:
    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_the_progress_line_is_rewritten_in_place_on_a_terminal():
    terminal, tally = Terminal(), Tally(total=1, slots=1)
    board = Board(tally, terminal)
    board.event("started a")
    tally.done = 1
    board.refresh()
    board.close()
    lines = "0 of 1 runs done, 0 running, 1 left", "1 of 1 runs done, 0 running, 0 left"
    clear = "\r\x1b[K"
    assert terminal.text == f"{clear}started a\n{clear}{lines[0]}{clear}{lines[1]}{clear}"


# --------------------------------------------------------------------------------------- Slurm


def test_slurm_jobs_run_the_same_commands(npz, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_RUN", "4/0=fail")
    parameters = default_sweep().slurm.to_dict()
    engine = SlurmEngine(tmp_path / "slurm", None, {**parameters, "timeout_min": 5}, "local")
    monkeypatch.setattr("mocosfl_jax.sweep.__main__._engine", lambda *_: engine)
    assert main(command(npz), FAKE) == 1
    assert calls(npz) == {"num_clients=2,seed=0": 1, "num_clients=4,seed=0": 1}
    assert SweepFolder(npz.parent / "sweep").is_finished("num_clients=2,seed=0")


def test_a_preempted_slurm_job_saves_and_is_requeued(npz, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_RUN", "4/0=wait")
    engine = SlurmEngine(tmp_path / "slurm", None, {"timeout_min": 5}, "local")
    log = tmp_path / "run" / "log.txt"
    arguments = ("--config.num_clients=4", "--config.seed=0", "--workdir", str(log.parent))
    (job,) = engine.start([Task("run", (*FAKE, *arguments), log)])
    while not (log.parent / "ready").exists():
        assert job.poll() is None
        time.sleep(0.05)
    preempt = ["pkill", "-USR2", "-P", job._job.job_id]  # the children of submitit's controller
    subprocess.run(preempt, check=True)
    while job.poll() is None:
        time.sleep(0.05)
    assert job.poll() == 0
    assert (log.parent / "saved").exists()
    assert json.loads((log.parent / "summary.json").read_text())["steps"] == 4
    assert len((log.parent / "calls").read_text().splitlines()) == 2


def test_a_checkpoint_in_the_middle_waits_for_the_child(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_RUN", "4/0=wait")
    monkeypatch.setattr(engines.signal, "signal", lambda *_: None)  # only in the main thread
    arguments = ("--config.num_clients=4", "--config.seed=0", "--workdir", str(tmp_path))
    task = RequeuedTask(Task("run", (*FAKE, *arguments), tmp_path / "log.txt"))
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(task()))
    thread.start()
    while not (tmp_path / "ready").exists():
        time.sleep(0.05)
    again = task.checkpoint()
    assert (tmp_path / "saved").exists()
    thread.join()
    assert statuses == [143]
    assert again.function() == 0


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Stand-ins for a cluster that takes jobs, or refuses them: returns the batch script."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    (tmp_path / "bin").mkdir()

    def make(sbatch: str) -> Path:
        for name, body in (("srun", "exit 0"), ("sbatch", f'cp "$1" {tmp_path}/batch\n{sbatch}')):
            (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        return tmp_path / "batch"

    return make


def test_slurm_is_asked_for_what_the_config_says(tmp_path, cluster):
    batch = cluster("echo Submitted batch job 12")
    wanted = {"timeout_min": 90, "gpus_per_node": 2, "partition": "long", "account": None}
    engine = SlurmEngine(tmp_path / "slurm", None, {**default_sweep().slurm.to_dict(), **wanted})
    tasks = [Task(name, ("true",), tmp_path / name / "log.txt") for name in "abc"]
    assert [job._job.job_id for job in engine.start(tasks)] == ["12_0", "12_1", "12_2"]
    options = {line for line in batch.read_text().splitlines() if line.startswith("#SBATCH")}
    assert {
        "#SBATCH --array=0-2%3",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --gpus-per-node=2",
        "#SBATCH --partition=long",
        "#SBATCH --signal=USR2@120",
        "#SBATCH --time=90",
    } <= options
    assert not any("account" in option for option in options)


def test_a_cluster_that_refuses(tmp_path, cluster):
    cluster("echo sbatch: error: invalid partition >&2; exit 1")
    engine = SlurmEngine(tmp_path / "slurm", None, {"timeout_min": 5, "partition": "nowhere"})
    with pytest.raises(InputError, match=r"config\.slurm.*nowhere.*invalid partition"):
        engine.start([Task("a", ("true",), tmp_path / "log.txt")])


def test_no_cluster_here(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="--engine = 'slurm'"):
        SlurmEngine(tmp_path, None, default_sweep().slurm.to_dict())


# -------------------------------------------------------------------------------------- report


def finished_sweep(folder: Path) -> SweepFolder:
    """Two variants, two client counts, two seeds; two runs unfinished."""
    results = {
        ("A", 9, 0): (50.0, 40.0),
        ("A", 9, 1): (53.0, None),
        ("A", 100, 0): (60.0, 44.0),
        ("A", 100, 1): None,
        ("B", 9, 0): (70.0, 41.0),
        ("B", 100, 0): None,
    }
    runs = {}
    for (variant, clients, seed), result in results.items():
        name = f"{variant},num_clients={clients},seed={seed}"
        config = {"num_clients": clients, "seed": seed, "cut": 1}
        runs[name] = {"variant": variant, "cell": {"num_clients": clients}, "config": config}
        (folder / "runs" / name).mkdir(parents=True)
        if result:
            summary = dict(zip(("linear_top1", "knn_top1"), result, strict=True), steps=7)
            summary |= {"knn_top1_at_init": 20.0 + seed, "test_images": 1234}
            (folder / "runs" / name / "summary.json").write_text(json.dumps(summary))
    (folder / "runs" / "B,num_clients=100,seed=0" / "log.txt").write_text("what went wrong\n")
    definition = {"columns": "num_clients", "metrics": ["linear_top1", "knn_top1"], "runs": runs}
    (folder / "sweep.json").write_text(json.dumps(definition))
    return SweepFolder(folder)


def test_the_table_of_a_sweep_that_is_not_finished(tmp_path, capsys):
    finished_sweep(tmp_path)
    assert main(["sweep", "--workdir", str(tmp_path), "--report"]) == 0
    page = (tmp_path / "report.md").read_text()
    assert capsys.readouterr().out == page
    # 50 and 53: mean 51.5, each 1.5 away from it, variance 2 * 2.25 / 1 = 4.5
    assert page.splitlines() == [
        "6 runs: 4 finished, 2 unfinished.",
        "",
        "Mean ± standard deviation over seeds (number of seeds), by number of clients.",
        "",
        "| variant |  | 9 | 100 |",
        "| --- | --- | ---: | ---: |",
        "| A | linear probe, top-1 % | 51.50 ± 2.12 (2) | 60.00 (1 of 2) |",
        "| A | kNN, top-1 % | 40.00 (1 of 2) | 44.00 (1 of 2) |",
        "| B | linear probe, top-1 % | 70.00 (1) | - (0 of 1) |",
        "| B | kNN, top-1 % | 41.00 (1) | - (0 of 1) |",
        "",
        "Accuracy on 1,234 test images.",
        "kNN of the untrained encoders, top-1 %: 20.25 ± 0.50 (4).",
        "",
        "Unfinished, with the last line of its log:",
        "",
        "- A,num_clients=100,seed=1: no output",
        "- B,num_clients=100,seed=0: what went wrong",
    ]


def test_a_report_that_cannot_be_written(tmp_path, capsys):
    finished_sweep(tmp_path)
    (tmp_path / "report.csv").mkdir()
    line = refused(capsys, ["sweep", "--workdir", str(tmp_path), "--report"])
    assert "report.csv" in line and "cannot be written" in line


def test_a_signal_does_not_break_the_report(capsys, npz, monkeypatch):
    def interrupted(*_, **__):
        signal.raise_signal(signal.SIGINT)
        return "the report\n"

    monkeypatch.setattr("mocosfl_jax.sweep.__main__.write_report", interrupted)
    assert main(command(npz), FAKE) == 130
    out, err = capsys.readouterr()
    assert out.endswith("the report\n")
    assert err == "mocosfl_jax.sweep: stopped; the same command goes on\n"


@pytest.mark.filterwarnings("error")
def test_a_report_before_any_run_is_finished(tmp_path, capsys):
    folder = finished_sweep(tmp_path)
    for name in folder.definition()["runs"]:
        (folder.run_path(name) / "summary.json").unlink(missing_ok=True)
    assert main(["sweep", "--workdir", str(tmp_path), "--report"]) == 0
    assert "6 runs: 0 finished, 6 unfinished." in capsys.readouterr().out
    assert (tmp_path / "report.png").exists()


def test_the_long_form_has_a_row_a_run(tmp_path):
    finished_sweep(tmp_path)
    assert main(["sweep", "--workdir", str(tmp_path), "--report"]) == 0
    with (tmp_path / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    first, *_, last = rows
    assert len(rows) == 6
    assert list(first)[:7] == [
        *("run", "variant", "num_clients", "seed", "status", "linear_top1", "knn_top1")
    ]
    assert (first["variant"], first["num_clients"], first["status"]) == ("A", "9", "finished")
    assert (first["linear_top1"], first["steps"], first["wall_seconds"]) == ("50.0", "7", "")
    assert (last["run"], last["status"], last["linear_top1"]) == (
        *("B,num_clients=100,seed=0", "unfinished", ""),
    )


def test_speeds_that_counted_padding_are_not_shown_beside_others(tmp_path, capsys):
    """Version 0.1.0 did, and its summaries do not say so."""
    folder = finished_sweep(tmp_path)
    report = ["sweep", "--workdir", str(tmp_path), "--report"]
    paths = sorted(tmp_path.glob("runs/*/summary.json"))
    for path, speed in zip(paths, (400.0, 100.0, 200.0, 300.0), strict=True):
        path.write_text(json.dumps({"images_per_second": speed}))
    config = tmp_path / "config.py"
    config.write_text(
        "from mocosfl_jax.sweep.definition import default_sweep\n"
        "def get_config():\n    sweep = default_sweep()\n"
        "    sweep.metrics = ('images_per_second',)\n    return sweep\n"
    )
    report += ["--config", str(config)]
    assert main(report) == 0  # old ones among themselves
    assert (
        "| A | training speed, images/s | 150.00 ± 70.71 (2) | 400.00 (1 of 2) |"
        in capsys.readouterr().out
    )
    new = {"images_per_second": 300.0, "padding_counted": False}
    (folder.run_path("B,num_clients=9,seed=0") / "summary.json").write_text(json.dumps(new))
    assert main(report) == 0
    out = capsys.readouterr().out
    assert "| A | training speed, images/s | - (2) | - (1 of 2) |" in out
    assert "| B | training speed, images/s | 300.00 (1) |" in out
    assert "counted padding" in out


def test_the_plot_is_an_image(tmp_path):
    from PIL import Image

    finished_sweep(tmp_path)
    assert main(["sweep", "--workdir", str(tmp_path), "--report"]) == 0
    with Image.open(tmp_path / "report.png") as image:
        pixels = image.convert("RGB").getcolors(image.width * image.height)
    assert len(pixels) > 50


def test_rows_are_what_the_columns_leave(tmp_path):
    records = finished_sweep(tmp_path).records()
    table = tabulate(records, "seed", ["linear_top1"])
    assert (table.columns, table.rows) == (
        (0, 1),
        ("A, num_clients=9", "A, num_clients=100", "B, num_clients=9", "B, num_clients=100"),
    )
    assert table.cells["A, num_clients=9", "linear_top1", 1] == Cell((53.0,), 1, 1)
    assert str(table.cells["B, num_clients=9", "linear_top1", 1]) == ""


def test_other_columns_and_metrics_from_the_config(tmp_path, capsys):
    finished_sweep(tmp_path)
    report = ["sweep", "--workdir", str(tmp_path), "--report", "--config", SWEEP]
    assert main([*report, "--config.columns=seed", "--config.metrics=steps"]) == 0
    assert "| A, num_clients=9 | steps | 7.00 (1) | 7.00 (1) |" in capsys.readouterr().out
    assert main([*report, "--config.metrics=accuracy"]) == 2
    assert "config.metrics = 'accuracy'" in capsys.readouterr().err


def test_a_metric_that_no_run_has_is_refused_before_any_run(tmp_path, capsys):
    argv = ["sweep", "--workdir", str(tmp_path), "--dry_run", "--config", SWEEP]
    assert main([*argv, "--config.metrics=knn_top"]) == 2
    assert "config.metrics = 'knn_top': one of" in capsys.readouterr().err


def test_a_finished_run_without_a_metric_is_finished():
    assert str(Cell((), finished=2, runs=2)) == "- (2)"
    assert str(Cell((), finished=1, runs=2)) == "- (1 of 2)"


def test_numbers_that_a_summary_lacks_or_has_as_text(tmp_path, capsys):
    folder = finished_sweep(tmp_path)
    report = ["sweep", "--workdir", str(tmp_path), "--report", "--config", SWEEP]
    assert main([*report, "--config.metrics=knn_top1_raw_pixels"]) == 0  # older runs have no such
    assert "| B | kNN of raw pixels, at most 32x32, top-1 % | - (1) |" in capsys.readouterr().out
    path = folder.run_path("B,num_clients=9,seed=0") / "summary.json"
    path.write_text(json.dumps({"knn_top1": "high"}))
    assert main([*report, "--config.metrics=knn_top1"]) == 2
    assert "B,num_clients=9,seed=0 = \"knn_top1 'high'\"" in capsys.readouterr().err


def test_no_sweep_to_report_on(tmp_path, capsys):
    assert main(["sweep", "--workdir", str(tmp_path), "--report"]) == 2
    assert "no sweep lies here" in capsys.readouterr().err


# ----------------------------------------------------------------------------------- real runs


def test_a_sweep_of_a_real_run(npz, capsys):
    assert main(command(npz, **{"grid.num_clients": (4,), "fixed.rounds": 1})) == 0
    assert "1 run: 1 finished." in capsys.readouterr().out
    (record,) = SweepFolder(npz.parent / "sweep").records()
    assert (record.summary["num_clients"], record.summary["rounds"]) == (4, 1)
    assert 0 < record.summary["knn_top1"] <= 100
