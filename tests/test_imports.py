"""The core is pure: arrays and keys in, arrays out. No TensorFlow, flags, files or clocks."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mocosfl_jax

ROOT = Path(mocosfl_jax.__file__).parent
CORE = sorted((ROOT / "core").glob("*.py"))
ALLOWED = (
    "collections",
    "dataclasses",
    "flax",
    "jax",
    "mocosfl_jax.core",
    "mocosfl_jax.data.augment",
    "mocosfl_jax.models",
    "numpy",
    "optax",
    "typing",
)
FORBIDDEN_NAMES = {"open", "print", "input", "exec", "eval", "__import__"}


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def is_allowed(name: str) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in ALLOWED)


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_core_imports_only_array_libraries(path):
    tree = ast.parse(path.read_text())
    assert {name for name in imported(tree) if not is_allowed(name)} == set()
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert names & FORBIDDEN_NAMES == set()


def test_the_rule_sees_what_it_forbids():
    source = (
        "import time\nfrom mocosfl_jax.data import sources\ndef f():\n    from absl import flags"
    )
    found = {name for name in imported(ast.parse(source)) if not is_allowed(name)}
    assert found == {"time", "mocosfl_jax.data.sources", "absl.flags"}
    assert len(CORE) > 5


def test_the_core_runs_without_tensorflow_and_the_shell():
    program = "import sys, mocosfl_jax.federated.dispatch as _; print(*sys.modules, sep='\\n')"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    modules = set(result.stdout.split())
    assert "mocosfl_jax.methods.mocosfl.step" in modules
    outside = {"tensorflow", "tensorflow_datasets", "ml_collections", "mocosfl_jax.config"}
    assert modules & outside == set()
