"""metrics.jsonl: no kill and no full disk loses a line that was on disk."""

import errno
import itertools
import json
import os
from pathlib import Path

import pytest

from mocosfl_jax.errors import InputError
from mocosfl_jax.run import metrics
from mocosfl_jax.run.metrics import MetricsFile, missing_steps, read_metrics
from mocosfl_jax.run.storage import StorageError


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "metrics.jsonl"


def on_disk(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_line_a_step_whatever_is_added_when(path):
    file = MetricsFile(path, {})
    file.add(0, knn=1.0)
    file.add(1, loss=2.5)
    file.flush()
    file.add(1, knn=30.123456789)  # grows on disk
    file.flush()
    file.add(1, knn=3.0)  # shrinks
    file.flush()
    file.add(2, loss=0.5)
    file.close()
    assert on_disk(path) == [
        {"step": 0, "knn": 1.0},
        {"step": 1, "loss": 2.5, "knn": 3.0},
        {"step": 2, "loss": 0.5},
    ]


def test_no_moment_lacks_a_line_that_was_on_disk(path, monkeypatch):
    """A kill may come before or after any call of the system that changes the file."""
    seen: list[set[int]] = []

    def watched(call):
        def calls(*args):
            for _ in range(2):
                seen.append({line["step"] for line in read_metrics(path).values()})
            result = call(*args)
            seen.append({line["step"] for line in read_metrics(path).values()})
            return result

        return calls

    names = ("pwrite", "write", "ftruncate", "open", "replace")
    path.write_text("".join(json.dumps({"step": s, "loss": 1.0}) + "\n" for s in range(5)))
    for name in names:
        monkeypatch.setattr(metrics.os, name, watched(getattr(os, name)))
    kept = {step: line for step, line in read_metrics(path).items() if step <= 3}
    file = MetricsFile(path, kept)
    file.add(3, knn=2.0)
    file.flush()
    for step in (4, 5, 6):
        file.add(step, loss=2.0 * step)
    file.flush()
    file.add(6, knn=77.5)
    file.close()
    assert len(seen) > 12
    lost = [(a, b) for a, b in itertools.pairwise(seen) if not (a - {4}) <= b]
    assert not lost  # 4 lies behind the checkpoint, and comes again
    assert sorted(read_metrics(path)) == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("room", [0, 1, 7, 30])
def test_a_full_disk_keeps_the_line_as_it_was(path, monkeypatch, room):
    file = MetricsFile(path, {})
    file.add(1, loss=0.125)
    file.flush()
    pwrite, size = os.pwrite, path.stat().st_size

    def full(fd: int, data: bytes, offset: int) -> int:
        free = size + room - offset
        if free <= 0 or not data:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, data[:free], offset)

    monkeypatch.setattr(metrics.os, "pwrite", full)
    file.add(1, knn=1 / 3, linear=2 / 3, other=1 / 7)
    with pytest.raises(StorageError, match=r"metrics\.jsonl cannot be written: No space left"):
        file.flush()
    assert on_disk(path) == [{"step": 1, "loss": 0.125}]


def test_a_torn_last_line_is_left_out_and_the_last_of_two_counts(path):
    path.write_text('{"step": 1, "a": 1}\n{"step": 2}\n{"step": 1, "a": 3}  \n{"step": 3, "a"')
    lines = read_metrics(path)
    assert lines == {1: {"step": 1, "a": 3}, 2: {"step": 2}}
    MetricsFile(path, lines).close()
    assert on_disk(path) == [{"step": 1, "a": 3}, {"step": 2}]


@pytest.mark.parametrize("line", ["5", "{}", "[]", "null", '{"step": "1"}', "nothing", ""])
def test_a_line_that_is_none_is_refused(path, line):
    path.write_text('{"step": 1}\n' + line + '\n{"step": 2}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2 = "):
        read_metrics(path)


def test_bytes_that_are_no_text_and_folders_are_refused(path):
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n')
    with pytest.raises(InputError, match="unreadable"):
        read_metrics(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match="unreadable"):
        read_metrics(path)


@pytest.mark.parametrize(
    ("steps", "resumed", "gaps"),
    [
        ([], 0, []),
        ([], 3, [[1, 3]]),
        ([0, 1, 2, 3], 3, []),
        ([0, 3], 3, [[1, 2]]),
        ([1, 4, 5, 9], 7, [[2, 3], [6, 7]]),
    ],
)
def test_missing_steps(steps, resumed, gaps):
    assert missing_steps({step: {"step": step} for step in steps}, resumed) == gaps


def test_tensorboard_scalars(tmp_path):
    """Read back with TensorBoard's own record format and protocol buffers."""
    from tensorboardX.proto.event_pb2 import Event

    board = metrics.Board(tmp_path / "tensorboard", 5)
    MetricsFile(tmp_path / "m", {}, board).add(7, loss=0.5, knn=2.0)
    board.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    raw, events = path.read_bytes(), []
    while raw:
        length = int.from_bytes(raw[:8], "little")
        events.append(Event.FromString(raw[12 : 12 + length]))
        raw = raw[16 + length :]
    assert events[0].file_version == "brain.Event:2"
    assert (events[1].step, events[1].session_log.status) == (5, 1)  # START: purge later ones
    scalars = {(e.step, v.tag, v.simple_value) for e in events[2:] for v in e.summary.value}
    assert scalars == {(7, "loss", 0.5), (7, "knn", 2.0)}
