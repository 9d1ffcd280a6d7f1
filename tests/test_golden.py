"""The numbers of the paper's PyTorch code, replayed through the public functions."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import golden_replay
from tests.golden_errors import absolute
from tests.golden_replay import replay, replay_trajectory

FILES = sorted((Path(__file__).parent / "golden").glob("*.npz"))

KINDS = {"forward": 6, "trajectory": 5, "knn": 1, "ssim": 1, "ressfl": 1, "decoder": 1}
KINDS |= {"losses": 1, "fedema": 1}


def test_the_files_are_there():
    kinds = [path.stem.partition("_")[0] for path in FILES]
    assert [kinds.count(kind) for kind in KINDS] == [*KINDS.values()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden_numbers(path):
    errors = replay(path)
    assert errors
    failed = {name: error for name, error in errors.items() if not error <= 1}
    assert not failed, "error over its bound, by array"


def test_nan_is_no_small_error(monkeypatch):
    def run(config, golden):
        return {"loss": absolute(float("nan"), golden["loss"][0], 1.0)}

    monkeypatch.setattr("tests.golden_replay.REPLAYS", {"trajectory": run})
    path = next(path for path in FILES if path.stem.startswith("trajectory"))
    assert replay(path) == {"loss": float("inf")}


@pytest.mark.parametrize(
    ("found", "best"),
    [
        ([{"client_stem_kernel": 0.9}], 0),
        ([{"client_stem_kernel": error} for error in (1.2, 1.1, 0.4)], 2),
        ([{"client_stem_kernel": error} for error in (1.4, 1.1, 1.3, 1.2)], 1),
        ([{"client_stem_kernel": 1.2, "queue": 1.1}], 0),  # more than rounding
        ([{"client_stem_kernel": float("nan")}] * 4, 0),
        ([{"queue": 0.1, "client_stem_kernel": error} for error in (float("nan"), 0.4)], 1),
    ],
)
def test_rounding_explains_client_kernels_only(monkeypatch, found, best):
    runs = iter(found)
    monkeypatch.setattr(golden_replay, "golden_method", lambda config: SimpleNamespace(step=len))
    monkeypatch.setattr(golden_replay, "errors_of_run", lambda *args: next(runs))
    assert replay_trajectory({}, {}) is found[best]
    assert next(runs, None) is None
