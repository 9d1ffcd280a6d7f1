"""Checkpoints: their digest, and what a restart makes of damaged ones or of other runs' ones."""

import dataclasses
import json
import os
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mocosfl_jax.config import check_types, resolve
from mocosfl_jax.data.dataset import DatasetInfo
from mocosfl_jax.errors import InputError
from mocosfl_jax.federated.placement import single_device
from mocosfl_jax.methods.mocosfl.former import to_former
from mocosfl_jax.run.checkpoint import Clock, Found, Identity, data_digest, digest, find_newest
from mocosfl_jax.run.encoder_file import encoder_step
from mocosfl_jax.run.program import program_of
from mocosfl_jax.run.rounds import Rounds
from mocosfl_jax.run.workdir import WorkDir, read_stored
from mocosfl_jax.train import train
from tests import tiny
from tests.test_train import lines, without_speed

# Reads that were given up report to an event loop that is closed; the command drops such words.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

FIELDS = {"keep_checkpoints": 3, "knn_every": 0, "probe_epochs": 0}


def run(folder: Path, npz: Path, **fields) -> dict:
    config, dataset = tiny.load(npz, **{**FIELDS, **fields})
    workdir = WorkDir(folder)
    try:
        return train(config, dataset, workdir)
    finally:
        workdir.close()


@pytest.fixture(scope="module")
def npz(tmp_path_factory) -> Path:
    return tiny.write_npz(tmp_path_factory.mktemp("data") / "images.npz")


@pytest.fixture(scope="module")
def whole(npz, tmp_path_factory) -> Path:
    """A finished run with checkpoints of the steps 6, 12 and 18."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, npz)
    return folder


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """The same, to be damaged."""
    return shutil.copytree(whole, tmp_path / "run")


@pytest.fixture(scope="module")
def find(npz) -> Callable[[Path], Found]:
    config, _ = tiny.load(npz, **FIELDS)
    rounds = Rounds(config, single_device(), program_of(config))
    shapes = rounds.abstract_unpadded()

    def find(folder: Path, kind: Any = None) -> Found:
        """kind: of what clients keep, in place of the method's."""
        stored, kept = read_stored(folder), shapes.population
        identity = Identity(stored.config, data_digest(stored.data))
        kept = kept if kind is None else kind(kept.key_params, kept.opt_state)
        return find_newest(folder / "checkpoints", shapes.replace(population=kept), identity)

    return find


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# --------------------------------------------------------------------------------------- digest


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {
        "kernel": rng.standard_normal((4, 8)).astype(np.float32),
        "ids": np.arange(8, dtype=np.int32),
        "flags": np.array([True, False, False]),
        "step": np.int32(7),
        "empty": np.zeros((0, 3), np.float32),
    }


def test_a_digest_does_not_depend_on_devices_or_sharding():
    clock = dataclasses.asdict(Clock(train_seconds=1.5))
    expected = digest(arrays(), clock)
    grid = np.array(jax.devices()).reshape(4, 2)
    for devices, axes in ((grid, ("a", "b")), (grid[:2, :1], ("a", "b"))):
        mesh = Mesh(devices, axes)
        for spec in (P("a", "b"), P(None, "b"), P()):
            spread = dict(arrays())
            spread["kernel"] = jax.device_put(spread["kernel"], NamedSharding(mesh, spec))
            spread["ids"] = jax.device_put(spread["ids"], NamedSharding(mesh, P("a")))
            assert digest(spread, clock) == expected
    assert digest(jax.tree.map(jnp.asarray, arrays()), clock) == expected


def test_every_flipped_bit_name_shape_and_second_changes_the_digest():
    clock = dataclasses.asdict(Clock())
    seen = {digest(arrays(), clock), digest(arrays(), {**clock, "wall_seconds": 1e-9})}
    variants = 0
    for name, value in arrays().items():
        for bit in range(8 * value.nbytes):
            raw = bytearray(value.tobytes())
            raw[bit // 8] ^= 1 << bit % 8
            flipped = np.frombuffer(bytes(raw), value.dtype).reshape(value.shape)
            seen.add(digest({**arrays(), name: flipped}, clock))
            variants += 1
    seen.add(digest({**arrays(), "kernel": arrays()["kernel"].reshape(8, 4)}, clock))
    seen.add(digest({("sdi" if k == "ids" else k): v for k, v in arrays().items()}, clock))
    seen.add(digest({**arrays(), "ids": arrays()["ids"].view(np.uint32)}, clock))
    assert len(seen) == variants + 5


# --------------------------------------------------------------------------------------- damage


def array_files(checkpoint: Path) -> list[Path]:
    return sorted(p for p in checkpoint.glob("state/**/d/*") if p.is_file())


def flip(path: Path, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(raw))


def test_a_flipped_bit_is_found_or_harms_nothing(copy, find):
    good = find(copy).restored
    rng = np.random.default_rng(11)
    path = max(array_files(copy / "checkpoints" / "18"), key=lambda p: p.stat().st_size)
    before = path.read_bytes()
    reasons = []
    for _ in range(16):
        flip(path, int(rng.integers(8 * len(before))))
        newest = find(copy)
        path.write_bytes(before)
        if newest.bad:
            assert newest.restored.step == 12
            reasons.append(newest.bad[18])
        else:
            jax.tree.map(np.testing.assert_array_equal, newest.restored.state, good.state)
    assert sum("digest" in reason for reason in reasons) >= 3  # which nothing else would notice


def cut(checkpoint: Path) -> None:
    for path in array_files(checkpoint):
        os.truncate(path, path.stat().st_size // 2)


def emptied(checkpoint: Path) -> None:
    for path in array_files(checkpoint):
        path.write_bytes(b"")


def deleted(checkpoint: Path) -> None:
    for path in array_files(checkpoint):
        path.unlink()


def metadata(checkpoint: Path) -> None:
    (checkpoint / "state" / "_METADATA").write_text("{}")


def clock(checkpoint: Path) -> None:
    path = checkpoint / "clock" / "metadata"
    path.write_text(path.read_text().replace('"monitored_step": 0', '"monitored_step": 1'))


def clock_gone(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "clock")


def seal(checkpoint: Path) -> None:
    (checkpoint / "seal" / "metadata").write_text("[]")


def seal_gone(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "seal")


def nothing_left(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def a_file(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.write_text("")


def of_an_earlier_step(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    shutil.copytree(checkpoint.with_name("6"), checkpoint)


DAMAGE = [
    cut,
    emptied,
    deleted,
    metadata,
    clock,
    clock_gone,
    seal,
    seal_gone,
    nothing_left,
    a_file,
    of_an_earlier_step,
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_the_newest_good_checkpoint_counts(copy, find, damage, capfd):
    damage(copy / "checkpoints" / "18")
    before = contents(copy)
    found = find(copy)
    assert list(found.bad) == [18]
    assert len(found.bad[18].splitlines()) == 1
    assert found.restored.step == int(found.restored.state.step) == 12
    assert contents(copy) == before  # looking changes nothing
    assert capfd.readouterr() == ("", "")


def test_a_run_goes_on_from_the_checkpoint_before(copy, whole, npz, capsys):
    """The bad ones are kept, and numbers and encoder go back to the step that is resumed."""
    emptied(copy / "checkpoints" / "18")
    (copy / "checkpoints" / "999").mkdir()
    (copy / "checkpoints" / "0999").mkdir()  # no step of ours
    damaged = contents(copy / "checkpoints" / "18")
    run(copy, npz)
    out = capsys.readouterr().out
    assert "set aside (999: " in out and "18: damaged" in out and "resumed at step 12" in out
    assert contents(copy / "set_aside" / "18") == damaged
    assert (copy / "set_aside" / "999").is_dir() and (copy / "set_aside" / "summary.json").exists()
    assert sorted(p.name for p in (copy / "checkpoints").iterdir()) == ["0999", "12", "18", "6"]
    assert without_speed(lines(copy)) == without_speed(lines(whole))
    assert contents(copy)["encoder.safetensors"] == contents(whole)["encoder.safetensors"]
    states = (tiny.saved_state(f, npz, **FIELDS) for f in (copy, whole))
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_checkpoints_of_other_runs_are_not_continued(copy, npz, tmp_path, find):
    other = tmp_path / "other"
    run(other, npz, seed=1, rounds=1)
    shutil.rmtree(copy / "checkpoints" / "18")
    shutil.copytree(other / "checkpoints" / "6", copy / "checkpoints" / "18")
    found = find(copy)
    assert found.restored.step == 12
    assert "another config (rounds 1 -> 3, seed 1 -> 0)" in found.bad[18]


def as_version_0_1(checkpoint: Path) -> None:
    """In its layout, without a seal, and with a clock that says nothing of padding."""
    config = read_stored(checkpoint.parents[1]).config
    rounds = Rounds(config, single_device(), program_of(config))
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(checkpoint / "state", rounds.abstract_unpadded())
        checkpointer.save(checkpoint / "state", to_former(state), force=True)
    shutil.rmtree(checkpoint / "seal")
    clock = json.loads((checkpoint / "clock" / "metadata").read_text())
    del clock["counts_padding"]
    (checkpoint / "clock" / "metadata").write_text(json.dumps(clock))


def test_a_checkpoint_of_version_0_1_holds_the_same(copy, whole, find):
    as_version_0_1(copy / "checkpoints" / "18")
    found, expected = find(copy), find(whole).restored
    assert not found.bad
    assert jax.tree.structure(found.restored.state) == jax.tree.structure(expected.state)
    jax.tree.map(np.testing.assert_array_equal, found.restored.state, expected.state)


class Fewer(flax.struct.PyTreeNode):
    """What the clients of `whole` keep, without the fields that are None."""

    key_params: Any
    opt_state: Any


class More(Fewer):
    later: Any = None


@pytest.mark.parametrize("kind", [Fewer, More])
def test_fields_that_are_none_are_no_part_of_a_checkpoint(kind, whole, find):
    """So that one can be added without another layout."""
    state, expected = find(whole, kind).restored.state, find(whole).restored.state
    assert type(state.population) is kind
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    bad = find(whole, lambda *kept: More(*kept, np.float32(0))).bad
    assert bad[18] == "damaged: it lacks the array population/later"


def test_checkpoints_of_another_width_are_not_continued(copy, npz):
    """As version 0.1.0 wrote them, without their config."""
    for checkpoint in (copy / "checkpoints").iterdir():
        as_version_0_1(checkpoint)
    stored = read_stored(copy)
    config = dataclasses.replace(stored.config, width=8)
    rounds = Rounds(config, single_device(), program_of(config))
    shapes = rounds.abstract_unpadded()
    identity = Identity(config, data_digest(stored.data))
    found = find_newest(copy / "checkpoints", shapes, identity)
    assert found.restored is None and list(found.bad) == [18, 12, 6]
    for reason in found.bad.values():
        assert "shape" in reason and len(reason.splitlines()) == 1


def test_without_a_good_checkpoint_nothing_is_touched(copy, npz):
    for step in ("6", "12", "18"):
        emptied(copy / "checkpoints" / step)
    (copy / "summary.json").unlink()
    before = contents(copy)
    with pytest.raises(InputError, match=r"checkpoints = \[6, 12, 18\]: none can be used \(18: "):
        run(copy, npz)
    assert contents(copy) == before


@pytest.mark.parametrize("rest", ["summary.json", "metrics.jsonl", "encoder.safetensors"])
def test_checkpoints_that_are_gone_are_not_started_over(copy, npz, rest):
    shutil.rmtree(copy / "checkpoints")
    for name in {"summary.json", "metrics.jsonl", "encoder.safetensors"} - {rest}:
        (copy / name).unlink()
    before = contents(copy)
    with pytest.raises(InputError, match=f"no checkpoint lies beside {rest}"):
        run(copy, npz)
    assert contents(copy) == before


def test_metrics_that_are_missing_are_named(copy, npz, capsys):
    """They cannot be made again, but the run goes on."""
    shutil.rmtree(copy / "checkpoints" / "18")
    kept = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    text = "".join(kept[:4] + kept[6:9] + kept[2:3]) + kept[9][:20]
    (copy / "metrics.jsonl").write_text(text)
    run(copy, npz)
    assert "metrics.jsonl lacks the steps 4 to 5, 9 to 12" in capsys.readouterr().out
    summary = json.loads((copy / "summary.json").read_text())
    assert summary["metrics_missing_steps"] == [[4, 5], [9, 12]]
    assert [line["step"] for line in lines(copy)] == [0, 1, 2, 3, 6, 7, 8, *range(13, 19)]


# -------------------------------------------------------------------------------------- encoder


@pytest.mark.parametrize(
    "stale", ["missing", "of an earlier step", "of no step", "flipped", "of another seed"]
)
def test_a_finished_run_has_its_own_encoder(copy, whole, npz, tmp_path, stale):
    """Whatever happened between the last checkpoint and the encoder."""
    encoder = copy / "encoder.safetensors"
    encoder.unlink()
    if stale == "of an earlier step":
        run(tmp_path / "short", npz, rounds=1)
        shutil.copy(tmp_path / "short" / "encoder.safetensors", encoder)
        assert encoder_step(encoder) == 6
    if stale == "of no step":
        shutil.copy(Path(__file__).parent / "version_0_1" / "persistent.safetensors", encoder)
    if stale == "flipped":
        content = bytearray((whole / "encoder.safetensors").read_bytes())
        content[-9] ^= 1  # in the last tensor
        encoder.write_bytes(content)
    if stale == "of another seed":
        run(tmp_path / "other", npz, seed=1)
        shutil.copy(tmp_path / "other" / "encoder.safetensors", encoder)
    summary = run(copy, npz)
    assert summary == json.loads((whole / "summary.json").read_text())
    assert encoder_step(encoder) == summary["steps"] == 18
    assert encoder.read_bytes() == (whole / "encoder.safetensors").read_bytes()


def test_the_identity_of_a_run_outlives_versions():
    """Computed by version 0.1, from the same config file."""
    file = Path(__file__).parents[1] / "configs" / "quickstart.py"
    raw = runpy.run_path(str(file))["get_config"]()
    info = DatasetInfo("cifar10", 50_000, 10_000, 32, 10)
    config = resolve(check_types(raw), info)
    assert Identity(config, "x").digest == "1925a68e9ca831cc"
