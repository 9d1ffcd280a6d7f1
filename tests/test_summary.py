"""The numbers of a summary: which file is one, and what the end of a run shows of it."""

import json
import math

import pytest

from mocosfl_jax.errors import InputError
from mocosfl_jax.evaluation import numbers
from mocosfl_jax.evaluation.numbers import NUMBERS, TOP1, Number
from mocosfl_jax.run.summary import read_summary, results_table, standard_error

SUMMARY = {
    "steps": 40,
    "wall_seconds": 61.0,
    "images_per_second": 12.4,
    "test_images": 2000,
    "linear_top1": 60.0,
    "linear_top1_best_test_epoch": 61.0,
    "knn_top1": 50.0,
    "knn_top1_at_init": None,
    "knn_top1_raw_pixels": 9.5,
}


def test_the_table_at_the_end_of_a_run():
    """A share p of n images has the standard error sqrt(p (1 - p) / n)."""
    assert results_table(SUMMARY).splitlines() == [
        "40 steps in 01:01, 12 images/s while training",
        "top-1 % ± standard error, 2,000 test images:",
        "  kNN of raw pixels, at most 32x32    9.50 ± 0.66",
        "  kNN                                50.00 ± 1.12",
        "  linear probe                       60.00 ± 1.10",
    ]
    assert standard_error(60.0, 2000) == pytest.approx(100 * math.sqrt(0.6 * 0.4 / 2000))


TRANSFERS = {
    "transfer/svhn/dataset": "svhn_cropped",
    "transfer/svhn/test_images": 900,
    "transfer/svhn/knn_top1": 10.0,
    "transfer/svhn/semi_1_top1": 20.0,
    "transfer/cats/test_images": 100,
    "transfer/cats/linear_top1": 80.0,
}


def test_transfers_come_first_each_with_its_own_test_images():
    lines = results_table({**TRANSFERS, **SUMMARY}).splitlines()
    assert lines[1:-4] == [
        "transfer to cats, top-1 % ± standard error, 100 test images:",
        "  linear probe   80.00 ± 4.00",
        "transfer to svhn, top-1 % ± standard error, 900 test images:",
        "  kNN                                    10.00 ± 1.00",
        "  semi-supervised probe, 1 % of labels   20.00 ± 1.33",
    ]
    assert lines[-4:] == results_table(SUMMARY).splitlines()[-4:]


@pytest.mark.parametrize("value", [None, "7"])
@pytest.mark.parametrize("name", ["test_images", "knn_top1"])
def test_a_transfer_that_is_none(tmp_path, name, value):
    path = tmp_path / "summary.json"
    path.write_text(json.dumps({**SUMMARY, **TRANSFERS}))
    assert read_summary(path) == {**SUMMARY, **TRANSFERS}
    path.write_text(json.dumps({**SUMMARY, **TRANSFERS, f"transfer/svhn/{name}": value}))
    if value is None and name == "knn_top1":
        assert read_summary(path)["transfer/svhn/knn_top1"] is None
        return
    with pytest.raises(InputError, match=f"transfer/svhn/{name} {value!r}.* needed"):
        read_summary(path)


def test_a_run_without_labels_has_no_table():
    accuracies = dict.fromkeys((name for name in SUMMARY if "top1" in name), None)
    assert (
        results_table({**SUMMARY, **accuracies}) == "40 steps in 01:01, 12 images/s while training"
    )
    assert results_table({"steps": 40, "wall_seconds": 61.0}) == "40 steps in 01:01"


def test_a_number_that_is_added_to_the_table(tmp_path, monkeypatch):
    """It is shown with its unit, and checked, without another line anywhere."""
    monkeypatch.setitem(NUMBERS, "psnr", Number("psnr", "reconstruction", "dB", in_table=True))
    lines = results_table({**SUMMARY, "psnr": 21.0}).splitlines()
    assert lines[2] == "  reconstruction                     21.00 dB"
    (tmp_path / "summary.json").write_text(json.dumps({**SUMMARY, "psnr": "low"}))
    with pytest.raises(InputError, match=r"psnr 'low'.*a number is needed"):
        read_summary(tmp_path / "summary.json")


@pytest.mark.parametrize("name", [number.name for number in NUMBERS.values() if number.required])
@pytest.mark.parametrize("value", [None, "7"])
def test_a_summary_without_what_every_run_has(tmp_path, name, value):
    (tmp_path / "summary.json").write_text(json.dumps({**SUMMARY, name: value}))
    with pytest.raises(InputError, match=f"{name} {value!r}.*move it away"):
        read_summary(tmp_path / "summary.json")


def test_a_summary_of_an_earlier_version_may_lack_numbers(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    assert read_summary(tmp_path / "summary.json") == SUMMARY


def test_titles_say_the_unit():
    assert NUMBERS["knn_top1"].title == f"kNN, {TOP1}"
    assert NUMBERS["steps"].title == "steps"
    assert all(name == number.name for name, number in NUMBERS.items())
    assert len(NUMBERS) == len(numbers._IN_ORDER)
