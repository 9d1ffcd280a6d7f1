"""What a command line does to its config file: values, no values, and files that fail."""

from pathlib import Path

import pytest

from mocosfl_jax.config import Config, check_types
from mocosfl_jax.errors import InputError
from mocosfl_jax.main import main
from mocosfl_jax.run.commandline import define_flags, parse
from tests.test_recipe import Toy
from tests.test_train import ROOT

QUICKSTART = str(Path(__file__).parent.parent / "configs" / "quickstart.py")


def parsed(*overrides: str, file: str = QUICKSTART) -> Config:
    argv = ["main", "--config", file, *overrides]
    values = define_flags(argv)
    parse(values, argv)
    return check_types(values.config)


def refused(capsys, *arguments: str) -> str:
    """The one line with which a command is refused."""
    assert main(["main", *arguments, "--dry_run"]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    return err


@pytest.mark.parametrize(
    ("overrides", "classes"),
    [
        ((), 2),
        (("--config.classes_per_client=None",), None),
        (("--config.classes_per_client", "None"), None),
        (("-config.classes_per_client=None",), None),
        (("--config.classes_per_client=3", "--config.classes_per_client=None"), None),
        (("--config.classes_per_client=None", "--config.classes_per_client=3"), 3),
        (("--config.classes_per_client", "None", "--config.classes_per_client", "3"), 3),
    ],
)
def test_the_last_value_of_a_field_counts_and_none_unsets_it(overrides, classes):
    config = parsed(*overrides, "--config.seed=5")
    assert (config.classes_per_client, config.seed) == (classes, 5)


def test_fields_of_every_type_can_be_unset():
    config = parsed("--config.blocks_per_stage=None", "--config.stem=None", "--config.seed=5")
    assert (config.blocks_per_stage, config.stem, config.seed) == (None, None, 5)
    assert parsed("--config.data_dir=None").data_dir is None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config.num_clients=None", "config.num_clients = None: an integer is needed"),
        ("--config.dataset=None", "config.dataset = None: a string is needed"),
        ("--config.tensorboard=None", "config.tensorboard = None: True or False is needed"),
        ("--config.no_such_field=None", "config.no_such_field = 'None': there is no such field\n"),
    ],
)
def test_a_field_that_cannot_be_unset_is_named(capsys, override, words):
    assert words in refused(capsys, "--config", QUICKSTART, override)


def test_without_labels_the_quickstart_has_iid_clients(capsys):
    argv = ["main", "--config", QUICKSTART, "--dry_run", "--config.classes_per_client=None"]
    assert main([*argv, "--config.dirichlet_alpha=0.5", "--config.cohort_size=4"]) == 0
    out = capsys.readouterr().out
    assert "classes_per_client: None" in out
    assert "dirichlet_alpha: 0.5" in out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("raise RuntimeError('out of\\ncheese')", "RuntimeError: out of cheese"),
        ("def get_config(): raise ValueError(7)", "the file fails with ValueError: 7"),
        ("def get_config(): return 1 / 0", "ZeroDivisionError: division by zero"),
        ("def get_config(): return None", "get_config() must return a ConfigDict"),
        ("def get_config(): return {'seed': 1}", "must return a ConfigDict, but returns dict"),
        ("import sys\nsys.exit(0)", "the file fails with SystemExit: 0"),
        ("def get_config(): exit()", "the file fails with SystemExit"),
        ("raise BaseException", "the file fails with BaseException"),
        ("def get_config(:", "SyntaxError: invalid syntax"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("config = 1", "the file must define get_config()"),
        ("get_config = 1", "TypeError: 'int' object is not callable"),
        ("def get_config(name): return name", "TypeError: get_config() missing 1 required"),
    ],
)
@pytest.mark.parametrize("overrides", [(), ("--config.seed=1", "--config.knn_every=None")])
def test_a_config_file_that_fails_is_named_with_its_reason(
    capsys, tmp_path, text, words, overrides
):
    path = tmp_path / "mine.py"
    path.write_text(text)
    line = refused(capsys, "--config", str(path), *overrides)
    assert line.startswith(f"mocosfl_jax: --config = '{path}': ")
    assert words in line


def test_a_config_file_may_refuse_its_argument(capsys):
    path = str(ROOT / "configs" / "comparison.py")
    for argument, method in ((":FL-Foo", "FL-Foo"), ("", "")):
        line = refused(capsys, f"--config={path}{argument}")
        says = f"--config = '{path}{argument}': method = '{method}': one of 'MocoSFL-1', "
        assert line.startswith(f"mocosfl_jax: {says}")


def test_a_config_file_that_is_no_text_file_is_named(capsys, tmp_path):
    (tmp_path / "latin.py").write_bytes("name = 'é'\n".encode("latin-1"))
    (tmp_path / "folder.py").mkdir()
    for name, words in (
        ("latin.py", "SyntaxError"),
        ("folder.py", "an existing config file is needed"),
        ("nowhere.py", "an existing config file is needed"),
    ):
        line = refused(capsys, f"--config={tmp_path / name}")
        assert line.startswith(f"mocosfl_jax: --config = '{tmp_path / name}': ")
        assert words in line


# -------------------------------------------------------------------------- methods and sections


@pytest.fixture
def toy_file(tmp_path) -> str:
    """A config file with the sections of the toy method of `test_recipe`."""
    path = tmp_path / "toy.py"
    path.write_text(
        "from mocosfl_jax.config import default_config\n"
        "def get_config():\n"
        "    return default_config('tests.test_recipe:TOY')\n"
    )
    return str(path)


def section(file: str, *overrides: str) -> Toy:
    return parsed(*overrides, file=file).section(Toy)


def test_fields_of_a_section_are_flags(toy_file):
    assert section(toy_file) == Toy()
    assert section(toy_file, "--config.toy.rate=0.25").rate == 0.25
    overrides = ("--config.toy.sizes=(1,2)", "--config.toy.steps", "3")
    assert section(toy_file, *overrides) == Toy(sizes=(1, 2), steps=3)
    assert section(toy_file, *overrides, "--config.toy.sizes=None") == Toy(steps=3)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config.toy.rate=1.5", "config.toy.rate = 1.5: a number in [0, 1) is needed"),
        ("--config.toy.rate=fast", "config.toy.rate = 'fast': a number is needed"),
        (
            "--config.toy.rates=1",
            "config.toy.rates = '1': there is no such field; did you mean rate?",
        ),
        (
            "--config.toy=1",
            "config.toy = '1': this is a section: set a field of it, --config.toy.FIELD",
        ),
        ("--config.cut=2", "config.cut = 2: method 'tests.test_recipe:TOY' does not read it"),
    ],
)
def test_a_section_that_cannot_hold_is_one_line(capsys, toy_file, override, words):
    assert words in refused(capsys, "--config", toy_file, override)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("--config.mean=(1,",), "config.mean = '(1,': "),
        (("--config.blocks_per_stage=(1,",), "config.blocks_per_stage = '(1,': a tuple such as"),
        (("--config.cut=2", "--config.cut=1e3"), "config.cut = '1e3': an integer is needed"),
        (("--config.tensorboard=maybe",), "config.tensorboard = 'maybe': True or False is needed"),
        (("--config.cut.deep=1",), "config.cut.deep = '1': config.cut has no fields"),
        (
            ("--config.resfl.alpha=1",),
            "config.resfl.alpha = '1': method 'mocosfl' has no section 'resfl'; did you mean",
        ),
        (("--work_dir=x",), "--work_dir = 'x': there is no such option; did you mean --workdir?"),
        (("--config.=1",), "fields are set by --config.FIELD=VALUE"),
    ],
)
def test_what_cannot_be_parsed_is_named_in_plain_words(capsys, overrides, words):
    assert words in refused(capsys, "--config", QUICKSTART, *overrides)


def test_a_section_of_another_method(capsys):
    fl_moco = str(Path(QUICKSTART).parent / "baselines" / "fl_moco.py")
    for override in ("--config.saving.threshold=1", "--config.saving.threshold=None"):
        line = refused(capsys, "--config", fl_moco, override)
        assert "config.saving.threshold = " in line
        assert ": method 'local' has no section 'saving'" in line


def test_a_value_that_is_missing():
    with pytest.raises(InputError, match=r"config\.cut = None: a value is needed: --config\.cut=V"):
        parsed("--config.cut")


def test_an_override_needs_its_config_file(capsys):
    line = refused(capsys, "--config.cut=1")
    assert "--config = None: a config file is needed, as --config.cut changes a field" in line


def test_the_config_of_a_sweep_is_no_runs(capsys):
    sweep = str(Path(QUICKSTART).parent / "sweeps" / "client_count.py")
    assert f"--config = '{sweep}': a run's config is needed; this" in refused(
        capsys, "--config", sweep, "--config.cut=1"
    )


def test_objects_have_no_address_in_a_message():
    error = InputError("config.local", object(), f"not {object()}")
    assert str(error) == "config.local = <object object>: not <object object>"


def test_a_method_of_ones_own_is_chosen_on_the_command_line(capsys):
    own = "--config.method=tests.test_recipe:TOY"
    assert parsed(own).section(Toy) == Toy()  # the file has no sections
    assert "method 'mocosfl' has no section 'toy'" in refused(
        capsys, "--config", QUICKSTART, "--config.toy.rate=0.25"
    )


def test_fields_that_a_rule_fills_know_their_type(capsys):
    overrides = ("--noconfig.feature_sharing", "--config.align_momentum", "--config.cut=2")
    config = parsed(*overrides, "--config.temperature=1")
    assert (config.feature_sharing, config.align_momentum, config.cut) == (False, True, 2)
    assert config.temperature == 1.0
    assert "config.cut" in refused(capsys, "--config", QUICKSTART, "--config.cut=1.5")
