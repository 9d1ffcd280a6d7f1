"""The numbers of the paper's PyTorch code, replayed through the public functions."""

from pathlib import Path

import pytest

from tests.golden_errors import absolute
from tests.golden_replay import replay

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
