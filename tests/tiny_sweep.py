"""Sweeps of tiny runs: their command lines, and what lies in their folders."""

import sys
from pathlib import Path

from ml_collections import ConfigDict

from mocosfl_jax.sweep.command import main
from mocosfl_jax.sweep.definition import default_sweep
from tests import tiny

ROOT = Path(__file__).parent.parent
SWEEP = str(ROOT / "configs" / "sweeps" / "client_count.py")
BASE = str(ROOT / "configs" / "cifar10.py")
FAKE = (sys.executable, str(ROOT / "tests" / "fake_run.py"))


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


def refused(capsys, argv: list[str]) -> str:
    """The one line with which a command is refused."""
    assert main(argv, FAKE) == 2
    _, err = capsys.readouterr()
    assert len(err.splitlines()) == 1, err
    return err
