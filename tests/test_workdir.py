"""A work directory belongs to one config and one data set, wherever the data lie."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mocosfl_jax.config import check_types, default_config
from mocosfl_jax.config.data import data_options, deal
from mocosfl_jax.data.sources import prepare_dataset
from mocosfl_jax.errors import InputError
from mocosfl_jax.run.processes import Startup
from mocosfl_jax.run.workdir import WorkDir, read_stored
from mocosfl_jax.train import finished, train
from tests import tiny
from tests.test_checkpoint import as_version_0_1, contents

FIELDS = {"image_size": 8, "rounds": 1, "knn_every": 0, "probe_epochs": 0}


def pictures(folder: Path) -> Path:
    """61 pictures of two classes."""
    rng = np.random.default_rng(5)
    for name, count in (("a", 40), ("b", 21)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (8, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:02}.png")
    return folder


def load(dataset: str, **fields):
    raw = default_config()
    raw.update({**tiny.FIELDS, **FIELDS, "dataset": dataset, **fields})
    config = check_types(raw)
    prepared = prepare_dataset(config.dataset, **data_options(config))
    return deal(config, prepared)[0], prepared


def run(workdir: Path, dataset: str, **fields) -> dict:
    config, prepared = load(dataset, **fields)
    held = WorkDir(workdir)
    try:
        return train(config, prepared.load(), held)
    finally:
        held.close()


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A finished run on pictures that lie beside it."""
    folder = tmp_path_factory.mktemp("done")
    run(folder / "run", f"folder:{pictures(folder / 'pictures')}")
    return folder


@pytest.fixture
def copy(done, tmp_path) -> Path:
    return shutil.copytree(done, tmp_path / "copy")


STATS = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


@pytest.mark.parametrize("fields", [{}, STATS], ids=["by rule", "set"])
def test_a_picture_less_is_another_data_set(copy, fields, tmp_path):
    """Whether mean and std were set, and would say nothing, or not."""
    folder = copy / "pictures"
    run(tmp_path / "run", f"folder:{folder}", **fields)
    (folder / "a" / "17.png").unlink()
    before = contents(tmp_path / "run")
    words = r"config\.dataset = .*other data: 61 -> 60 pictures \(first missing: a/17\.png\)"
    with pytest.raises(InputError, match=words):
        run(tmp_path / "run", f"folder:{folder}", **fields)
    assert contents(tmp_path / "run") == before


def test_a_moved_data_set_is_the_same(copy):
    """The path on record follows; a config of other fields is still refused."""
    moved = shutil.move(copy / "pictures", copy / "moved")
    before = json.loads((copy / "run" / "summary.json").read_text())
    assert run(copy / "run", f"folder:{moved}") == before
    (copy / "run" / "summary.json").unlink()
    assert run(copy / "run", f"folder:{moved}")["knn_top1"] == before["knn_top1"]
    assert read_stored(copy / "run").config.dataset == f"folder:{moved}"
    with pytest.raises(InputError, match=r"another config \(temperature 0\.1 -> 0\.2\)"):
        run(copy / "run", f"folder:{moved}", temperature=0.2)


def test_a_run_without_a_record_takes_the_data_set_that_is_found(copy, capsys):
    """As version 0.1.0 left it, whose mean and std must agree."""
    (copy / "run" / "dataset.json").unlink()
    (copy / "run" / "summary.json").unlink()
    as_version_0_1(copy / "run" / "checkpoints" / "6")
    other = pictures(copy / "other")
    Image.new("RGB", (8, 8), (9, 9, 9)).save(other / "a" / "00.png")
    with pytest.raises(InputError, match=r"another config \(mean .* std "):
        run(copy / "run", f"folder:{other}")
    with pytest.raises(InputError, match=r"another config \(dataset 'folder:.*' -> 'npz:.*'\)"):
        run(copy / "run", f"npz:{tiny.write_npz(copy / 'x.npz')}")
    capsys.readouterr()
    run(copy / "run", f"folder:{shutil.move(copy / 'pictures', copy / 'moved')}")
    assert "no record of its data set: the one found is taken" in capsys.readouterr().out
    assert read_stored(copy / "run").data is not None


def test_class_names_are_stored(done):
    assert json.loads((done / "run" / "dataset.json").read_text())["class_names"] == ["a", "b"]


def test_a_finished_run_decodes_no_image(copy, monkeypatch):
    config, prepared = load(f"folder:{copy / 'pictures'}")
    workdir = WorkDir(copy / "run")
    for path in (copy / "pictures").rglob("*.png"):
        path.write_bytes(b"x" * path.stat().st_size)
    assert finished(config, prepared.info, workdir, Startup())["steps"] == 6
    workdir.close()


def test_what_a_run_says_of_its_data(tmp_path, capsys):
    folder = pictures(tmp_path / "pictures")
    run(tmp_path / "run", f"folder:{folder}")
    out = capsys.readouterr().out
    assert "data: 55 training and 6 test images of 2 classes (a, b)" in out
    assert "the test images are held out" in out
    shutil.rmtree(folder / "b")
    for path in (folder / "a").iterdir():
        path.rename(folder / path.name)
    (folder / "a").rmdir()
    run(tmp_path / "unlabelled", f"folder:{folder}", classes_per_client=None)
    assert "data: 40 training and 0 test images, without labels" in capsys.readouterr().out
    assert read_stored(tmp_path / "unlabelled").config.holdout_fraction == 0
