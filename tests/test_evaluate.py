"""Evaluation as a command: the same numbers as at a run's end, other data, where they go."""

import contextlib
import dataclasses
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from mocosfl_jax import load_encoder
from mocosfl_jax.evaluate import command
from mocosfl_jax.evaluate.options import Options
from mocosfl_jax.evaluation.protocols import PROTOCOLS
from mocosfl_jax.run.summary import results_table
from mocosfl_jax.run.workdir import WorkDir
from mocosfl_jax.train import train
from tests import tiny
from tests.test_checkpoint import contents

FIELDS = {"rounds": 1, "semi_supervised": True, "knn_every": 0}
OWN = ("knn_top1", "linear_top1", "linear_top1_best_test_epoch", "semi_10_top1", "semi_1_top1")


@pytest.fixture(scope="module")
def npz(tmp_path_factory) -> Path:
    return tiny.write_npz(tmp_path_factory.mktemp("data") / "images.npz", train=90, test=40)


def carry_out(folder: Path, npz: Path) -> dict:
    config, dataset = tiny.load(npz, **FIELDS)
    with contextlib.closing(WorkDir(folder)) as workdir:
        return train(config, dataset, workdir)


@pytest.fixture(scope="module")
def trained(npz, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    carry_out(folder, npz)
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of a finished run's folder."""
    return shutil.copytree(trained, tmp_path / "run")


def evaluate(folder: Path, *options: str) -> int:
    return command.main(["evaluate", "--workdir", str(folder), *options])


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def write_other(path: Path, scale: int = 30, **without) -> Path:
    """Images of another size and four classes, whose labels are 2, 3, 5 and 8."""
    rng = np.random.default_rng(3)
    arrays = {}
    for split, number in (("train", 30), ("test", 13)):
        labels = np.array([2, 3, 5, 8])[np.arange(number) % 4]
        noise = rng.integers(0, 5 * scale, (number, 11, 14, 3))
        arrays[f"x_{split}"] = (noise + 10 * labels[:, None, None, None]).astype(np.uint8)
        arrays[f"y_{split}"] = labels
    np.savez(path, **{name: x for name, x in arrays.items() if name not in without})
    return path


# ---------------------------------------------------------------------------- the run's own data


def test_the_numbers_of_the_end_are_found_again(run, capsys):
    """To the last digit; they are measured anew, and nothing else in the summary changes."""
    before = summary_of(run)
    assert len({before[name] for name in OWN}) > 2
    wrong = {name: value for name, value in before.items() if name != "semi_1_top1"}
    wrong |= {"knn_top1": 1.0, "linear_top1": None, "semi_10_top1": 2.0}
    (run / "summary.json").write_text(json.dumps(wrong))
    assert evaluate(run) == 0
    assert summary_of(run) == before
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "encoder at step 6 of 6"
    assert said[1].endswith("90 training and 40 test images of 3 classes")
    assert said[2] == "top-1 % ± standard error, 40 test images:"
    assert said[-2].split() == ["linear", "probe", *results_table(before).split()[-3:]]
    assert said[-1] == f"written to {run / 'summary.json'}"


def test_it_asks_for_the_devices_that_the_run_had(run, monkeypatch):
    asked = []
    monkeypatch.setattr(command, "use_virtual_devices", asked.append)
    stored = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(stored | {"devices": 3}))
    assert evaluate(run, "--protocols=knn") == 0
    assert asked == [3]


def test_one_protocol_alone(run):
    before = summary_of(run)
    changed = {**before, "knn_top1": 1.0, "linear_top1": 2.0, "semi_1_top1": 3.0}
    (run / "summary.json").write_text(json.dumps(changed))
    assert evaluate(run, "--protocols=linear, semi_supervised") == 0
    assert summary_of(run) == {**before, "knn_top1": 1.0}


def test_the_run_logs_what_its_table_shows(trained):
    *_, last = (trained / "metrics.jsonl").read_text().splitlines()
    found, summary = json.loads(last), summary_of(trained)
    shown = [name for name in OWN if name != "linear_top1_best_test_epoch"]
    assert {name: found.get(name) for name in OWN} == {
        **{name: summary[name] for name in shown},
        "linear_top1_best_test_epoch": None,
    }


def test_a_run_that_skipped_its_probes_gets_those_of_the_paper(npz):
    for epochs, expected in ((0, 100), (3, 3)):
        config, _ = tiny.load(npz, probe_epochs=epochs)
        assert command._with_probes(config) == dataclasses.replace(config, probe_epochs=expected)


# --------------------------------------------------------------------------------------- transfer


def nearest(encoder, arrays, k: int) -> float:
    """kNN by a loop: of unit embeddings, weighted by exp(similarity / 0.1)."""
    bank, queries = encoder.embed(arrays["x_train"]), encoder.embed(arrays["x_test"])
    correct = 0
    for query, label in zip(queries, arrays["y_test"], strict=True):
        similarity = bank @ query
        scores = dict.fromkeys(range(9), 0.0)
        for row in np.argsort(-similarity)[:k]:
            scores[int(arrays["y_train"][row])] += np.exp(similarity[row] / 0.1)
        correct += max(scores, key=scores.get) == label
    return 100 * correct / len(queries)


def test_transfer_to_another_data_set(run, npz, tmp_path, capsys):
    """Its images are resized as the run's are and normalised with the run's mean and std. The
    numbers stay when the run's own command finds it complete."""
    before, other = summary_of(run), write_other(tmp_path / "other.npz")
    assert evaluate(run, f"--dataset=npz:{other}") == 0
    after = summary_of(run)
    assert {name: value for name, value in after.items() if name in before} == before
    added = {name: value for name, value in after.items() if name not in before}
    assert added.keys() == {
        f"transfer/other/{name}" for name in (*OWN, "dataset", "data", "test_images")
    }
    assert added["transfer/other/dataset"] == f"npz:{other}"
    assert added["transfer/other/test_images"] == 13
    with np.load(other) as arrays:
        expected = nearest(load_encoder(run), dict(arrays), k=5)
    assert added["transfer/other/knn_top1"] == pytest.approx(expected)
    assert "transfer to other, top-1 % ± standard error, 13 test images:" in capsys.readouterr().out
    assert carry_out(run, npz) == summary_of(run) == after
    assert "transfer to other" in results_table(after)

    assert evaluate(run, f"--dataset=npz:{other}", "--protocols=knn", "--name=again") == 0
    found = summary_of(run)
    assert found.pop("transfer/again/knn_top1") == added["transfer/other/knn_top1"]
    for name in ("dataset", "data", "test_images"):
        assert found.pop(f"transfer/again/{name}") == added[f"transfer/other/{name}"]
    assert found == after


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("svhn_cropped", "svhn_cropped"),
        ("imagenet_resized/32x32:0.1.0", "imagenet_resized-32x32-0.1.0"),
        ("folder:/data/my pictures.v2/", "my-pictures.v2"),
        ("npz:~/x.y.npz", "x.y"),
    ],
)
def test_numbers_are_called_after_the_data_set(dataset, name):
    assert Options(dataset=dataset).transfer == name
    assert Options(dataset=dataset, name="other").transfer == "other"


def test_a_name_is_for_one_data_set(run, tmp_path, capsys):
    first, second = (tmp_path / name / "set.npz" for name in "ab")
    for path, scale in ((first, 30), (second, 20)):
        path.parent.mkdir()
        write_other(path, scale)
    assert evaluate(run, f"--dataset=npz:{first}", "--protocols=knn") == 0
    before = contents(run)
    assert evaluate(run, f"--dataset=npz:{second}", "--protocols=knn") == 2
    line = capsys.readouterr().err
    assert f"--name = 'set': summary.json has numbers of 'npz:{first}'" in line
    assert line.count("\n") == 1 and contents(run) == before
    moved = first.rename(tmp_path / "moved.npz")
    assert evaluate(run, f"--dataset=npz:{moved}", "--protocols=knn", "--name=set") == 0


# ------------------------------------------------------------------------------ unfinished runs


def test_a_run_that_goes_on(run, tmp_path, capsys):
    """It is not locked, and gets no summary; numbers of another step are replaced."""
    finished = summary_of(run)
    (run / "summary.json").unlink()
    other = write_other(tmp_path / "other.npz")
    with contextlib.closing(WorkDir(run)):  # held by a process that trains
        assert evaluate(run, "--protocols=knn") == 0
        assert evaluate(run, f"--dataset=npz:{other}", "--protocols=linear") == 0
    assert "encoder at step 6 of 6, the run is not finished" in capsys.readouterr().out
    found = json.loads((run / "evaluation.json").read_text())
    assert not (run / "summary.json").exists()
    assert {name: found[name] for name in ("run", "step", "encoder", "knn_top1")} == {
        **{name: finished[name] for name in ("run", "encoder", "knn_top1")},
        "step": 6,
    }
    assert "transfer/other/linear_top1" in found and "linear_top1" not in found

    (run / "evaluation.json").write_text(json.dumps({**found, "step": 3}))
    assert evaluate(run, "--protocols=linear") == 0
    found = json.loads((run / "evaluation.json").read_text())
    assert found["linear_top1"] == finished["linear_top1"]
    assert found.keys() == {
        *("run", "step", "encoder", "test_images"),
        *("linear_top1", "linear_top1_best_test_epoch"),
    }


@pytest.mark.parametrize("field", ["steps", "run", "encoder"])
def test_a_summary_of_another_network_is_left_alone(run, field):
    summary = {**summary_of(run), field: 5 if field == "steps" else "another"}
    (run / "summary.json").write_text(json.dumps(summary))
    assert evaluate(run, "--protocols=knn") == 0
    assert summary_of(run) == summary
    assert json.loads((run / "evaluation.json").read_text())["step"] == 6


def test_a_finished_run_in_use_is_refused(run, capsys):
    before = contents(run)
    with contextlib.closing(WorkDir(run)):
        assert evaluate(run) == 2
    assert "in use by a running process" in capsys.readouterr().err
    assert contents(run) == before


# --------------------------------------------------------------------------- signals, refusals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_nothing_written(run, monkeypatch, capfd, number):
    before, linear = contents(run), PROTOCOLS["linear"]

    def signalled(evaluation):
        signal.raise_signal(number)
        return linear(evaluation)

    monkeypatch.setitem(PROTOCOLS, "linear", signalled)
    assert evaluate(run, "--protocols=knn,linear") == 128 + number
    # The first line is a thread's, which may be slow.
    assert sorted(capfd.readouterr().err.splitlines()) == [
        "mocosfl_jax.evaluate: stopped, nothing is written; run the same command to start again",
        f"mocosfl_jax: {number.name}: stopping; a second signal stops at once",
    ]
    assert contents(run) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--protocols=knn,mlp"], "--protocols = 'mlp': one or more of knn,linear,semi_sup"),
        (["--protocols="], "--protocols = '': one or more"),
        (["--dataset=npz:/nowhere.npz"], "/nowhere.npz"),
        (["--dataset=cifar11"], "--dataset = 'cifar11': "),
        (["--dataset=npz:OTHER", "--train_split=train"], "--train_split = 'train': npz:"),
        (["--dataset=npz:OTHER", "--holdout_fraction=1"], "--holdout_fraction = 1.0: a number in"),
        (["--dataset=npz:OTHER", "--name=a/b"], "--name = 'a/b': a name of at most 100"),
        (["--dataset=npz:PLAIN"], "the images have no labels: training and test images with"),
        (["--dataset=npz:HALF"], "the test images have no labels: training"),
        (["--dataset=npz:TRAIN", "--holdout_fraction=0"], "there is no test split: training and"),
        (["--dataset=folder:/"], "--name = '': a name of at most 100"),
        (["--name=x"], "--name = 'x': --dataset is not given"),
        (["--test_split=x"], "--test_split = 'x': --dataset is not given"),
        (["--config.knn_k=3"], "--config.knn_k = '3': there is no such option"),
        (["word"], "command line = 'word': options start with --"),
    ],
)
def test_options_that_are_refused(run, tmp_path, capsys, options, words):
    files = {"OTHER": (), "PLAIN": ("y_train", "y_test"), "HALF": ("y_test",)}
    files["TRAIN"] = ("x_test", "y_test")
    for name, without in files.items():
        path = write_other(tmp_path / f"{name.lower()}.npz", **dict.fromkeys(without))
        options = [option.replace(name, str(path)) for option in options]
    before = contents(run)
    assert evaluate(run, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("mocosfl_jax.evaluate: ") and error.count("\n") == 1
    assert words in error
    assert contents(run) == before


def test_folders_that_are_refused(run, npz, tmp_path, capsys):
    def refused() -> str:
        assert evaluate(run) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert command.main(["evaluate"]) == 2
    assert "--workdir = None" in capsys.readouterr().err
    assert evaluate(tmp_path / "none") == 2
    assert "none': the folder of a run is needed" in capsys.readouterr().err
    summary = (run / "summary.json").read_text()
    (run / "summary.json").write_text("{}")
    assert "summary.json" in refused()
    (run / "summary.json").write_text(summary)
    (run / "encoder.safetensors").unlink()
    assert "encoder.safetensors = 'missing': a run writes it" in refused()


def test_data_that_have_changed(run, npz, capsys):
    kept = npz.read_bytes()
    try:
        tiny.write_npz(npz, train=91, test=40)
        assert evaluate(run) == 2
    finally:
        npz.write_bytes(kept)
    assert "the run was trained on other data" in capsys.readouterr().err
