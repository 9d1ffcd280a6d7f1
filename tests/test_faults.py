"""Runs that are killed, stopped or out of disk at chosen and at random moments.

They end bit-identical to an undisturbed run once the same command is repeated, or in the one line
that is promised. `tests/broken_run.py` says what a fault is.
"""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mocosfl_jax.run.checkpoint import Checkpoints, Identity, saved_steps
from mocosfl_jax.run.storage import StorageError
from tests import tiny
from tests.test_train import ROOT, lines, without_speed

FIELDS = {"rounds": 4, "knn_every": 2, "checkpoint_every": 1, "probe_epochs": 2}
CHECKPOINTS, TRAIN = "mocosfl_jax.run.checkpoint", "mocosfl_jax.train"


@pytest.fixture(scope="module")
def npz(tmp_path_factory) -> Path:
    return tiny.write_npz(tmp_path_factory.mktemp("data") / "images.npz")


def command(folder: Path, npz: Path, *faults: str, **fields) -> list[str]:
    return [
        *(sys.executable, "-m", "tests.broken_run", *faults, "--"),
        *("--config", str(ROOT / "configs" / "cifar10.py"), "--workdir", str(folder)),
        *tiny.flags(npz, **{**FIELDS, **fields}),
    ]


def go(folder: Path, npz: Path, *faults: str, **fields) -> subprocess.CompletedProcess:
    argv = command(folder, npz, *faults, **fields)
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def whole(npz, tmp_path_factory) -> Path:
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    result = go(folder, npz)
    assert (result.returncode, result.stderr) == (0, "")
    return folder


def assert_same_run(folder: Path, whole: Path) -> None:
    encoders = [(f / "encoder.safetensors").read_bytes() for f in (folder, whole)]
    assert encoders[0] == encoders[1]
    assert without_speed(lines(folder)) == without_speed(lines(whole))
    found, wanted = (json.loads((f / "summary.json").read_text()) for f in (folder, whole))
    assert [n for n in wanted if "top1" in n and found[n] != wanted[n]] == []
    assert found["metrics_missing_steps"] == []
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["18", "24"]


# Where a run is killed, one after the other, each time the same command is given.
KILLS = [
    f"kill_after={TRAIN}:WorkDir.record:1",  # config and data are known, nothing else
    f"kill={TRAIN}:compile_dispatch:1",
    f"kill={CHECKPOINTS}:Checkpoints.save:1",  # the metrics are on disk, the state is not
    f"kill_after={CHECKPOINTS}:Checkpoints.save:1",  # while it is being written
    f"kill={TRAIN}:save_encoder:1",  # arrays on disk, no encoder
    f"kill_after={TRAIN}:save_encoder:1",  # an encoder before its checkpoint has its name
    f"kill={TRAIN}:save_encoder:2",  # of the second checkpoint
    f"kill_after={TRAIN}:begin_or_resume:1",  # on a resume
    f"kill_after={TRAIN}:open_metrics:1",
    f"kill={TRAIN}:Evaluator.final:1",
    f"kill={TRAIN}:write_json:1",  # before the summary
]


def test_a_run_killed_wherever_it_can_be_ends_as_if_it_had_not_been(npz, whole, tmp_path):
    folder, on_disk = tmp_path / "run", set()
    for fault in KILLS:
        result = go(folder, npz, fault)
        assert result.returncode == -signal.SIGKILL, (fault, result.stderr)
        assert result.stderr == "", fault
        assert not (folder / "summary.json").exists()
        newest = max(saved_steps(folder / "checkpoints"), default=-1)
        steps = {line["step"] for line in lines(folder)} if newest >= 0 else set()
        assert {step for step in on_disk if step <= newest} <= steps, fault  # no line is lost
        on_disk = steps
    assert go(folder, npz).returncode == 0
    assert_same_run(folder, whole)


def test_a_run_killed_at_random_ends_as_if_it_had_not_been(npz, whole, tmp_path):
    seed = int(os.environ.get("FAULT_SEED", random.randrange(10**6)))
    print(f"FAULT_SEED={seed}")
    rng = random.Random(seed)
    for _ in range(2):
        process = subprocess.Popen(command(tmp_path / "run", npz), cwd=ROOT)
        time.sleep(rng.uniform(1.0, 9.0))  # seconds, from importing JAX to the last evaluation
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert go(tmp_path / "run", npz).returncode == 0
    assert_same_run(tmp_path / "run", whole)


# ------------------------------------------------------------------------------------- signals


def test_a_run_stopped_at_its_end_gives_the_same_numbers(npz, whole, tmp_path):
    """In the first evaluation, in the last dispatch, and in the linear probe."""
    folder = tmp_path / "run"
    saved = "stopped at step 24 of 24, which is saved; run the same command to continue"
    for fault, words in (
        ("signal=mocosfl_jax.evaluation.features:_encode_batch:3", "before the first step"),
        ("signal=mocosfl_jax.run.recorder:Recorder.push:8", saved),
        ("signal=mocosfl_jax.evaluation.linear_probe:_run_epoch:1", saved),
    ):
        result = go(folder, npz, fault)
        assert result.returncode == 143
        heard, stopped = result.stderr.splitlines()
        assert heard.startswith("mocosfl_jax: SIGTERM") and words in stopped
        assert not (folder / "summary.json").exists()
    assert go(folder, npz).returncode == 0
    assert_same_run(folder, whole)


# ------------------------------------------------------------------------------------ full disks


def test_files_that_cannot_grow(npz, whole, tmp_path):
    """One line says what is saved; with room again the run ends as if nothing had happened, also
    if nobody reads what it prints any more."""
    folder = tmp_path / "run"
    for fault, words in (
        (f"file_size={CHECKPOINTS}:digest:2:400", "checkpoints cannot be written"),
        (f"file_size={TRAIN}:save_encoder:1:3000", "encoder.safetensors cannot be written"),
    ):
        result = go(folder, npz, fault)
        assert result.returncode == 1
        (line,) = result.stderr.splitlines()
        assert words in line and "File too large" in line
        assert line.endswith("step 6 is saved, run the same command to continue once there is room")
    argv, pipe = command(folder, npz), subprocess.PIPE
    process = subprocess.Popen(argv, cwd=ROOT, stdout=pipe, stderr=pipe)
    process.stdout.readline()
    process.stdout.close()
    assert (process.wait(timeout=300), process.stderr.read()) == (0, b"")
    assert_same_run(folder, whole)


@pytest.mark.parametrize("at_wait", [False, True])
@pytest.mark.parametrize("at_close", [False, True])
@pytest.mark.parametrize("acts", [("wait", "close"), ("close",)])
def test_a_save_that_failed_is_told_once(at_wait, at_close, acts, tmp_path):
    """Orbax raises again for each file that failed, the last time when it is closed."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1, Identity(None, ""))
    manager = checkpoints._manager
    checkpoints._manager = Failing(manager, at_wait, at_close)
    told = []
    for act in acts:
        try:
            getattr(checkpoints, act)()
        except StorageError as error:
            told.append((act, error.path.name, error.reason))
    manager.close()
    first, second = (acts[0], "checkpoints", "first"), ("close", "checkpoints", "second")
    assert told == ([first] if at_wait else [second] if at_close else [])


class Failing:
    """A manager of checkpoints whose last save failed, found at these places."""

    def __init__(self, manager, at_wait: bool, at_close: bool):
        self._manager, self._wait, self._close = manager, at_wait, at_close

    def wait_until_finished(self) -> None:
        if self._wait:
            self._wait = False
            raise OSError(errno.EFBIG, "first")

    def close(self) -> None:
        self._manager.close()
        if self._close:
            raise ValueError("second")


def test_metrics_that_cannot_grow(npz, tmp_path):
    """They outgrow the files of a checkpoint, of which the largest has 34 kB."""
    fields = {"rounds": 2, "steps_per_round": 150, "knn_every": 0, "probe_epochs": 0}
    result = go(tmp_path, npz, f"file_size={CHECKPOINTS}:digest:1:40000", **fields)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "metrics.jsonl cannot be written: File too large; step 150 is saved" in line
    on_disk = [line["step"] for line in lines(tmp_path)]
    assert on_disk == list(range(len(on_disk))) and len(on_disk) > 151


# --------------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"[]"),
        ("config.json", b"\xff"),
        ("config.json", b'{"cut": 1, "colour": "red"}'),
        ("config.json", None),
        ("dataset.json", b"{}"),
        ("metrics.jsonl", b"5\n"),
        ("metrics.jsonl", b"{}\n"),
        ("metrics.jsonl", b"\xff\n"),
        ("metrics.jsonl", None),
        ("summary.json", b"[]"),
        ("encoder.safetensors", None),
    ],
)
def test_a_file_that_is_none_of_ours_is_refused(npz, whole, tmp_path, name, content, capsys):
    from mocosfl_jax.main import main
    from tests.test_checkpoint import contents

    folder = shutil.copytree(whole, tmp_path / "run")
    if name == "metrics.jsonl":  # a finished run does not read them
        (folder / "summary.json").unlink()
    (folder / name).unlink()
    if content is None:
        (folder / name).mkdir()
    else:
        (folder / name).write_bytes(content)
    before = contents(folder)
    argv = ["main", "--config", str(ROOT / "configs" / "cifar10.py"), "--workdir", str(folder)]
    assert main([*argv, *tiny.flags(npz, **FIELDS)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert name in line
    assert contents(folder) == before
