"""Sweeps over fields of a method's section."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from mocosfl_jax.config.recipe import Recipe
from mocosfl_jax.sweep.command import main
from mocosfl_jax.sweep.folder import SweepFolder
from tests import tiny
from tests.tiny_sweep import FAKE, refused, run_path

pytestmark = pytest.mark.usefixtures("no_gpu")


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
        ("sweep.grid.toy.rate = (1.0, 'x')", "config.toy.rate = 'x': a number is needed"),
        ("sweep.grid.toy.speed = (1.0,)", "speed"),
        ("sweep.grid.toy = (1.0,)", "toy"),
        ("sweep.unset = ('toy',)", "config.unset = 'toy': a field of the runs"),
        ("sweep.columns = 'toy'", "config.columns = 'toy': a field that varies"),
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
