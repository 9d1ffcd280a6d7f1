"""The command line: bad input gives one line on stderr and exit status 2, before anything runs."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mocosfl_jax.config.data import check_apart
from mocosfl_jax.errors import InputError
from mocosfl_jax.main import main
from mocosfl_jax.run.processes import initialize
from mocosfl_jax.run.workdir import WorkDir
from tests import tiny
from tests.data_files import write_classes

CONFIG = str(Path(__file__).parent.parent / "configs" / "cifar10.py")


def command(npz: Path, *overrides: str) -> list[str]:
    return [
        *("main", "--config", CONFIG, "--workdir", str(npz.parent / "run")),
        *tiny.flags(npz),
        *overrides,
    ]


def refused(capsys, argv: list[str]) -> str:
    """The one line with which a command is refused."""
    assert main(argv) == 2
    _, err = capsys.readouterr()
    assert len(err.splitlines()) == 1, err
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config.no_such_field=1", ["config.no_such_field = '1': there is no such field"]),
        ("--workdir=", ["--workdir"]),
        ("--coordinator=host:1", ["--num_processes", "--coordinator"]),
        ("--config.num_clients=many", ["num_clients", "many"]),
        ("--config.dataset=cifar11", ["config.dataset", "cifar11"]),
        ("--config.dataset=npz:/nowhere.npz", ["config.dataset = 'npz:/nowhere.npz': an existing"]),
        ("--config.dataset=folder:/nowhere", ["config.image_size"]),
        ("--config.num_clients=61", ["config.num_clients", "61", "60"]),
        ("--config.classes_per_client=4", ["config.classes_per_client", "4", "3 classes"]),
        ("--config.cut=9", ["config.cut", "9", "1 to 3"]),
        ("--config.cut=0", ["config.cut = 0", "1 to 3"]),
        ("--config.queue_length=23", ["config.queue_length", "23", "24"]),
        ("--config.cohort_size=5", ["config.cohort_size", "5", "1 to 4"]),
        ("--config.learning_rate=fast", ["learning_rate", "fast"]),
        ("--no_such_flag=1", ["no_such_flag"]),
        ("stray", ["stray"]),
    ],
)
def test_bad_input_is_refused_in_one_line(capsys, npz, override, words):
    line = refused(capsys, command(npz, override))
    for word in words:
        assert word in line
    assert not (npz.parent / "run").exists()


@pytest.mark.parametrize("place", ["", "run", "train/runs/one"])
@pytest.mark.parametrize("more", [[], ["--dry_run"]], ids=str)
def test_a_run_among_its_pictures_is_refused(capsys, tmp_path, place, more):
    """It would be read as one of their folders when the run goes on."""
    write_classes(tmp_path / "pictures" / "train", {"a": 20, "b": 20})
    folder = tmp_path / "pictures" / place
    argv = ["main", "--config", CONFIG, "--workdir", str(folder), *more]
    argv += tiny.flags(tmp_path, dataset=f"folder:{tmp_path}/pictures", image_size=8)
    line = refused(capsys, argv)
    assert f"--workdir = '{folder}': a folder outside {tmp_path}/pictures" in line
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"train"}


def test_a_run_beside_its_pictures_is_none_among_them(tmp_path):
    config, _ = tiny.load(tiny.write_npz(tmp_path / "images.npz"))
    config = dataclasses.replace(config, dataset=f"folder:{tmp_path}/pictures")
    check_apart(config, tmp_path / "pictures2")


def test_images_beyond_the_memory_are_refused(capsys, npz):
    line = refused(capsys, command(npz, "--config.image_size=1000000"))
    assert "config.image_size = 1000000" in line and "240000 GB" in line
    assert not (npz.parent / "run" / "checkpoints").exists()


def test_a_data_set_that_is_not_prepared_comes_with_the_command(capsys, npz, tmp_path):
    argv = command(npz, "--config.dataset=cifar10", f"--config.data_dir={tmp_path}")
    line = refused(capsys, argv)
    assert "config.dataset" in line
    assert "download_and_prepare" in line


def test_missing_config_and_workdir(capsys):
    assert "--config" in refused(capsys, ["main", "--workdir", "x"])
    assert "--workdir" in refused(capsys, ["main", "--config", CONFIG])
    assert "nowhere.py" in refused(capsys, ["main", "--config", "nowhere.py", "--workdir", "x"])


def test_a_folder_that_cannot_be_written(capsys, npz):
    (npz.parent / "run").write_text("a file, no folder")
    assert "--workdir" in refused(capsys, command(npz))


@pytest.mark.parametrize("path", ["x" * 300, "odd\x7fname", "~nobody-here/x"])
def test_a_folder_that_no_system_would_make(capsys, npz, path):
    assert "--workdir" in refused(capsys, [*command(npz), "--workdir", path])


def test_a_folder_with_a_broken_image(capsys, npz, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(4):
            pixels = np.full((9, 9, 3), 20 * index, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{index}.png")
    broken = tmp_path / "pictures" / "a" / "2.png"
    broken.write_bytes(b"no image")
    argv = command(npz, f"--config.dataset=folder:{tmp_path / 'pictures'}", "--config.image_size=8")
    assert str(broken) in refused(capsys, argv)


@pytest.mark.parametrize("names", [("train", "val", "misc"), ("Train", "Val")])
def test_folders_beside_the_splits_are_no_classes(capsys, npz, tmp_path, names):
    root = tmp_path / "pictures"
    for name in names:
        (root / name / "cat").mkdir(parents=True)
        for index in range(4):
            picture = Image.new("RGB", (9, 9), (20 * index, 0, 0))
            picture.save(root / name / "cat" / f"{index}.png")
    argv = command(npz, f"--config.dataset=folder:{root}", "--config.image_size=8")
    assert str(root / names[-1 if "misc" in names else 0]) in refused(capsys, argv)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"coordinator": "host", "num_processes": 1, "process_id": 0}, "--coordinator = 'host'"),
        ({"coordinator": "host:1", "num_processes": 2, "process_id": 2}, "--process_id = 2"),
    ],
)
def test_processes_that_cannot_join_are_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        initialize(multihost=False, **arguments)


def test_an_npz_with_wrong_shapes(capsys, npz, tmp_path):
    np.savez(tmp_path / "bad.npz", x_train=np.zeros((4, 8, 8, 2), np.uint8))
    line = refused(capsys, command(npz, f"--config.dataset=npz:{tmp_path / 'bad.npz'}"))
    assert "bad.npz" in line
    assert "(4, 8, 8, 2)" in line


def test_dry_run_prints_the_plan_and_leaves_nothing(capsys, npz):
    assert main(command(npz, "--dry_run")) == 0
    out = capsys.readouterr().out
    for text in (
        "queue_length: 32",
        "cohort C = 4, images a client a step B = 3",
        "rounds: 3, steps a round: 6, steps: 18",
        "syncs a round: 2",
        "client parameters: 116",
        "estimated memory",
        "operations of a client in a step: ",
    ):
        assert text in out
    assert not (npz.parent / "run").exists()


# -------------------------------------------------------------------------------------- dry run


def dry_run(capsys, npz: Path, *overrides: str) -> tuple[int, list[str], list[str]]:
    status = main(command(npz, "--dry_run", *overrides))
    out, err = capsys.readouterr()
    return status, out.splitlines(), err.splitlines()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        # a class of 20 images cannot give 21
        (["--config.images_per_client=21", "--config.classes_per_client=1"], "images_per_client"),
        # few of 40 clients get an image
        (
            [
                "--config.classes_per_client=None",
                "--config.dirichlet_alpha=0.001",
                "--config.num_clients=40",
                "--config.cohort_size=30",
            ],
            "config.cohort_size = 30",
        ),
    ],
)
def test_a_dry_run_refuses_what_the_labels_forbid(capsys, npz, overrides, words):
    status, _, err = dry_run(capsys, npz, *overrides)
    assert (status, len(err)) == (2, 1)
    assert words in err[0]
    assert not (npz.parent / "run").exists()


def test_the_rule_for_the_cohort_counts_clients_with_images(capsys, npz):
    fields = (
        "classes_per_client=None",
        "dirichlet_alpha=0.01",
        "num_clients=40",
        "queue_length=999",
    )
    status, out, _ = dry_run(capsys, npz, *(f"--config.{field}" for field in fields))
    assert status == 0
    (cohort,) = (line for line in out if line.startswith("cohort_size: "))
    holders = int(cohort.removeprefix("cohort_size: "))
    assert 1 <= holders < 40
    argv = [f"--config.{field}" for field in (*fields, f"cohort_size={holders + 1}")]
    assert dry_run(capsys, npz, *argv)[0] == 2


def test_what_another_machine_may_have_is_a_line(capsys, npz):
    status, out, err = dry_run(capsys, npz, "--config.devices=9")
    assert (status, err) == (0, [])
    assert "not on this machine: config.devices = 9: at most 8, as many as there are" in out
    status, out, _ = dry_run(capsys, npz, "--config.image_size=1000000", "--config.stem=7x7s2")
    assert status == 0
    assert any("not on this machine: config.image_size = 1000000" in line for line in out)


def test_a_dry_run_looks_into_the_folder_and_changes_nothing(capsys, npz):
    folder = npz.parent / "run"
    folder.mkdir()
    (folder / "config.json").write_text("[]")
    status, _, err = dry_run(capsys, npz)
    assert (status, len(err)) == (2, 1) and "config.json" in err[0]
    assert err[0].endswith("put an intact one back, or move the folder away")
    (folder / "config.json").unlink()
    (folder / "summary.json").write_text("{}")
    status, _, err = dry_run(capsys, npz)
    assert status == 2 and "no checkpoint lies beside summary.json" in err[0]
    (folder / "summary.json").unlink()
    held = WorkDir(folder)
    status, _, err = dry_run(capsys, npz)
    assert status == 2 and "in use" in err[0]
    held.close()
    assert dry_run(capsys, npz)[0] == 0
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_a_finished_run_answers_with_its_table(capsys, npz):
    argv = command(npz, "--config.rounds=1", "--config.steps_per_round=3")
    assert main(argv) == 0
    first = capsys.readouterr().out.splitlines()
    assert main(argv) == 0
    again = capsys.readouterr().out.splitlines()
    assert again[0] == "this run is complete"
    assert again[1:] == first[-len(again) + 1 :]
    assert again[1].startswith("3 steps in ")
    assert again[2] == "top-1 % ± standard error, 20 test images:"
    labels = [line[2:36].strip() for line in again[3:]]
    assert labels == [
        "kNN of raw pixels, at most 32x32",
        "kNN at the start",
        "kNN",
        "linear probe",
    ]
    summary = json.loads((npz.parent / "run" / "summary.json").read_text())
    share = summary["linear_top1"] / 100
    error = 100 * (share * (1 - share) / 20) ** 0.5
    assert again[-1].split()[-3:] == [f"{100 * share:.2f}", "±", f"{error:.2f}"]
