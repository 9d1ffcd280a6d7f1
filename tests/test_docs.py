"""The documentation holds: commands resolve to what they claim, code runs, links lead somewhere."""

import json
import re
import shlex
import tempfile
from pathlib import Path
from unittest import mock

import pytest

from mocosfl_jax.config import Config, check_types
from mocosfl_jax.config.resolve import resolve
from mocosfl_jax.data.dataset import DatasetInfo, Request
from mocosfl_jax.data.sources import inspect_dataset
from mocosfl_jax.errors import InputError
from mocosfl_jax.main import main
from mocosfl_jax.models.backbones import BACKBONES
from mocosfl_jax.run.commandline import define_flags, parse
from tests import tiny

ROOT = Path(__file__).parent.parent
EXTENDING = ROOT / "docs" / "extending.md"
SETTINGS = ROOT / "docs" / "settings.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
COMMAND = re.compile(r"`python -m mocosfl_jax\.main ([^`]*)`")

# By config file: facts of the data set, and classes of a non-IID client. ImageNet-12 has no
# official size: any number of images serves.
DATA = {
    "cifar10": (DatasetInfo("cifar10", 50_000, 10_000, 32, 10), 2),
    "cifar10_vgg13": (DatasetInfo("cifar10", 50_000, 10_000, 32, 10), 2),
    "cifar10_mobilenetv2": (DatasetInfo("cifar10", 50_000, 10_000, 32, 10), 2),
    "cifar100": (DatasetInfo("cifar100", 50_000, 10_000, 32, 100), 20),
    "taressfl_pretrain": (DatasetInfo("cifar100", 50_000, 10_000, 32, 100, num_mixed=500), 20),
    "taressfl": (DatasetInfo("cifar10", 50_000, 10_000, 32, 10), 2),
    "imagenet12": (DatasetInfo("folder:data/imagenet12", 12_345, 600, 224, 12), 2),
}


def table_rows(text: str) -> list[dict[str, str]]:
    """The rows of all tables that have a command, by column."""
    rows, header = [], []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            header = []
        elif not header:
            header = cells
        elif COMMAND.search(line):
            rows.append(dict(zip(header, cells, strict=True)))
    return rows


def parsed(command: str) -> tuple[Config, str]:
    """The resolved config of a command, and its work directory."""
    match = COMMAND.fullmatch(command)
    assert match is not None
    argv = ["main", *shlex.split(match[1])]
    values = define_flags(argv)
    parse(values, argv)
    info, _ = DATA[Path(argv[argv.index("--config") + 1]).stem]
    return resolve(check_types(values.config), info), values.workdir


ROWS = table_rows(SETTINGS.read_text())
CELLS = [row for row in ROWS if "method" in row]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_every_cell_of_the_papers_tables_is_there():
    cells = {(row.get("data set"), row["command"].split("--workdir")[1]) for row in CELLS}
    assert len(cells) == len(CELLS) == 2 * 2 * 2 + 3 * 2 * 2 * 3


@pytest.mark.parametrize("row", CELLS, ids=lambda row: row["command"].split("runs/")[1].split()[0])
def test_a_cell_of_the_papers_tables(row):
    config, workdir = parsed(row["command"])
    name = workdir.removeprefix("runs/").split("-")[0]
    info, classes = DATA[name]
    assert config.dataset == info.name
    assert config.num_clients == int(row["clients"])
    assert config.cut == {"MocoSFL-1": 1, "MocoSFL-3": 2}[row["method"]]
    assert config.classes_per_client == (None if row.get("data") == "IID" else classes)
    assert config.dirichlet_alpha is None
    assert (config.backbone, config.head, config.loss) == ("resnet18", "V2", "server")
    assert (config.queue_length, config.temperature, config.ema) == (6000, 0.1, 0.99)
    assert config.cohort_size * config.batch_size == 100
    if name.startswith("cifar"):
        assert config.total_steps == 100_000
    if "data set" in row:
        assert row["data set"].replace("-", "").lower() == name
        assert (config.cohort_size, config.batch_size, config.syncs_per_round) == (5, 20, 10)


def test_no_two_commands_share_a_folder():
    folders = [parsed(row["command"])[1] for row in ROWS]
    assert len(set(folders)) == len(folders)


def test_the_other_settings_resolve():
    others = [row for row in ROWS if "setting" in row]
    assert others
    configs = {parsed(row["command"])[0] for row in others}
    assert len(configs) == len(others)


def blocks_of_extending() -> list[str]:
    return re.findall(r"```python\n(.*?)```", EXTENDING.read_text(), re.DOTALL)


def test_code_of_extending_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names = {"__name__": "extending"}
    with mock.patch.dict(BACKBONES):  # the page adds one
        for block in blocks_of_extending():
            exec(compile(block, str(EXTENDING), "exec"), names)

    def request(location: str) -> Request:
        return Request(f"noise:{location}", location, None, None, None, 16, 0.1, 0)

    made = names["prepare"](request("7"))
    assert made.load().train.images.shape == (7, made.info.image_size, 16, 3)
    with pytest.raises(InputError, match="noise:many"):
        names["prepare"](request("many"))
    options = dict(data_dir=None, train_split=None, test_split=None, image_size=None)
    mine = f"npz:{names['folder'] / 'mine.npz'}"
    info = inspect_dataset(mine, holdout_fraction=0.1, seed=0, **options)
    assert (info.num_train, info.num_test, info.num_classes) == (54, 6, 3)


def test_the_method_of_extending_is_run_by_its_command(tmp_path, monkeypatch, capsys):
    """Its module, its config file and its command are as the page has them, on tiny images."""
    *_, method, config = blocks_of_extending()
    (tmp_path / "my_methods").mkdir()
    (tmp_path / "my_methods" / "softstart.py").write_text(method)
    (tmp_path / "softstart_config.py").write_text(config)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (line,) = re.findall(r"python -m mocosfl_jax\.main (.*softstart.*)", EXTENDING.read_text())
    fields = {**tiny.FIELDS, "rounds": 1, "classes_per_client": None, "probe_epochs": 0}
    for name in ("queue_length", "syncs_per_round"):
        del fields[name]
    npz = tiny.write_npz(tmp_path / "images.npz")
    tiny_flags = [f"--config.{name}={value}" for name, value in fields.items()]
    argv = ["main", *shlex.split(line), f"--config.dataset=npz:{npz}", *tiny_flags]
    assert main([*argv, "--dry_run", "--config.head_width=2"]) == 2
    assert "config.head_width = 2: one score a class is needed" in capsys.readouterr().err
    assert main(argv) == 0
    stored = json.loads((tmp_path / "runs/softstart/config.json").read_text())
    assert stored["method"] == "my_methods.softstart:SOFTSTART"
    assert stored["softstart"] == {"rate": 0.5}
    summary = json.loads((tmp_path / "runs/softstart/summary.json").read_text())
    assert summary["steps"] == 6


def anchors(text: str) -> set[str]:
    """The fragments of a page's headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.M)
    return {re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, fragment = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        if fragment:
            assert fragment in anchors(target.read_text()), link
