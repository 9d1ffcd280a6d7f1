"""What a method tells the config: the fields that it reads, its rules, checks and sections."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Annotated

import pytest
from ml_collections import ConfigDict

from mocosfl_jax.config import Config, Resolved, check_types, default_config, resolve
from mocosfl_jax.config.fields import EXECUTION_FIELDS, METHOD_FIELDS
from mocosfl_jax.config.ranges import FROM_0_BELOW_1, one_of
from mocosfl_jax.config.recipe import Recipe
from mocosfl_jax.config.stored import (
    config_from_json,
    differences,
    flat_fields,
    run_values,
    to_json,
)
from mocosfl_jax.config.types import FIELDS
from mocosfl_jax.data.dataset import DatasetInfo
from mocosfl_jax.errors import InputError
from mocosfl_jax.methods.mocosfl.build import keys_per_step

INFO = DatasetInfo(name="cifar10", num_train=50_000, num_test=10_000, image_size=32, num_classes=10)
# Fields, at their defaults.
NEWER = {"local_epochs", "mix_fraction", "mix_batch_size", "init_parts", "init_digest"}


def mocosfl_config(**fields) -> Resolved:
    raw = default_config()
    raw.update(fields)
    return resolve(check_types(raw), INFO)


def as_json(config: Config) -> dict:
    return json.loads(json.dumps(to_json(config)))


@dataclass(frozen=True)
class Toy:
    """A section."""

    # Share of something, in [0, 1).
    rate: Annotated[float, FROM_0_BELOW_1] = 0.5
    # Form of something.
    form: Annotated[str, one_of(("round", "square"))] = "round"
    # None: as many as there are.
    sizes: tuple[int, ...] | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Other:
    """Another one."""

    big: bool = True


def _refuse_square(config: Resolved, info: DatasetInfo) -> None:
    if config.section(Toy).form == "square":
        raise InputError("config.toy.form", "square", "round is needed with these clients")


TOY = Recipe(
    reads=frozenset({"temperature", "queue_length"}),
    build=lambda config, axes, devices: pytest.fail("nothing is built here"),
    rules=lambda config: {"temperature": 0.07, "queue_length": 2 * config.batch_size, "cut": 3},
    check=_refuse_square,
    sections={"toy": Toy, "other": Other},
)
NO_RECIPE = "TOY"
NAME = f"{__name__}:TOY"


def toy_config(**fields) -> Resolved:
    """Of the toy method; fields of the section `toy` are given as a dict."""
    raw = default_config(NAME)
    raw.update(fields)
    return resolve(check_types(raw), INFO)


def test_a_method_fills_the_fields_that_it_reads():
    config = toy_config(queue_length=7)
    assert (config.temperature, config.queue_length) == (0.07, 7)
    assert toy_config(batch_size=3).queue_length == 6
    assert (config.cut, config.bottleneck) == (1, "none")
    for name in METHOD_FIELDS - {"temperature", "queue_length", "cut", "bottleneck"}:
        assert getattr(config, name) is None, name
    assert sum(config.sync_steps) == 1 and config.sync_steps[-1]


@pytest.mark.parametrize("value", [("ema", 0.5), ("cut", 1), ("align_momentum", False)])
def test_a_field_that_the_method_does_not_read_cannot_be_set(value):
    name, set_to = value
    with pytest.raises(InputError) as error:
        toy_config(**{name: set_to})
    does_not = f"method '{NAME}' does not read it: leave it unset"
    assert str(error.value) == f"config.{name} = {set_to!r}: {does_not}"


def test_mocosfl_reads_every_field():
    assert not any(
        value is None
        for name, value in vars(mocosfl_config(cohort_chunks=1)).items()
        if name in METHOD_FIELDS
    )


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("moco", "one of mocosfl, local, or package.module:NAME, is needed"),
        ("", "one of mocosfl, local, or"),
        ("tests.test_recipe", "one of mocosfl, local, or"),
        (":TOY", "one of mocosfl, local, or"),
        ("no_such.module:TOY", "cannot be imported: ModuleNotFoundError: No module named"),
        ("..up:TOY", "cannot be imported: TypeError: "),
        (f"{__name__}:TOYS", "has no Recipe of the name TOYS"),
        (f"{__name__}:NO_RECIPE", "has no Recipe of the name NO_RECIPE"),
        (3, "a string is needed"),
        (None, "a string is needed"),
    ],
)
def test_a_method_that_does_not_exist_is_named(method, words):
    with pytest.raises(InputError, match=r"^config\.method = ") as error:
        check_types({**default_config().to_dict(), "method": method})
    assert words in str(error.value)


@pytest.mark.parametrize("text", ["1 / 0", "raise SystemExit(3)", "def f(:", "raise BaseException"])
def test_a_module_that_fails_is_named(text, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "failing_method.py").write_text(text)
    with pytest.raises(InputError, match=r"^config\.method = 'failing_method:X': .* imported: \w+"):
        default_config("failing_method:X")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"reads": frozenset({"seed"})}, "seed"),
        ({"sections": {"loss": Toy}}, "loss"),
        ({"sections": {"a": dataclasses.make_dataclass("A", [("x", int)])}}, "x of section a"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        Recipe(**{"reads": frozenset(), "build": TOY.build, **fields})


def test_a_section_has_types_and_defaults():
    config = toy_config(toy={"rate": 0, "sizes": [1, 2]})
    assert config.section(Toy) == Toy(rate=0.0, form="round", sizes=(1, 2))
    assert config.section(Other).big is True
    assert config.sections == {"toy": Toy(rate=0.0, sizes=(1, 2)), "other": Other()}
    with pytest.raises(KeyError, match="Toy"):
        mocosfl_config().section(Toy)


@pytest.mark.parametrize(
    ("section", "rate"),
    [(None, 0.5), ({}, 0.5), ({"steps": None}, 0.5), (ConfigDict({"rate": 0.25}), 0.25)],
)
def test_a_section_may_be_left_out_in_part(section, rate):
    raw = {**default_config().to_dict(), "method": NAME}
    assert check_types(raw).section(Toy) == Toy()
    assert check_types({**raw, "toy": section}).section(Toy) == Toy(rate=rate)


def test_an_unset_field_of_a_section_has_its_default():
    raw = default_config(NAME)
    assert raw.toy.rate is None
    assert check_types(raw).section(Toy) == Toy()


def test_a_section_in_which_nothing_is_set_leaves_the_method_free():
    """A sweep may compare methods on one base config."""
    raw = default_config(NAME)
    raw.method = "mocosfl"
    assert "toy" not in check_types(raw).sections
    raw.toy.rate = 0.25
    with pytest.raises(InputError, match=r"config.toy = \{'rate': 0.25\}: method 'mocosfl' has no"):
        check_types(raw)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("toy", {"rate": 1.0}, "config.toy.rate = 1.0: a number in [0, 1) is needed"),
        ("toy", {"rate": "fast"}, "config.toy.rate = 'fast': a number is needed"),
        ("toy", {"rate": 1e-300}, "config.toy.rate = 1e-300: "),
        ("toy", {"sizes": 3}, "config.toy.sizes = 3: a tuple"),
        ("toy", {"form": "flat"}, "config.toy.form = 'flat': one of round, square is needed"),
        ("toy", {"form": "square"}, "config.toy.form = 'square': round is needed with"),
        ("toy", {"rates": 1}, "config.toy.rates = 1: no such field; see Toy in "),
        ("toy", 3, "config.toy = 3: a section is needed"),
        ("tow", {"rate": 1}, f"config.tow = {{'rate': 1}}: method '{NAME}' has no such section"),
        ("sections", {"toy": 1}, "config.sections = {'toy': 1}: "),
    ],
)
def test_a_value_of_a_section_that_cannot_hold_is_named(name, value, words):
    raw = {**default_config(NAME).to_dict(), name: value}
    with pytest.raises(InputError) as error:
        resolve(check_types(raw), INFO)
    assert str(error.value).startswith(words)


def test_a_stored_section_comes_back():
    config = toy_config(toy={"rate": 0.25, "sizes": (1, 2)})
    stored = as_json(config)
    assert stored["toy"] == {"rate": 0.25, "form": "round", "sizes": [1, 2], "steps": None}
    assert config_from_json(stored, "config.json") == config
    del stored["toy"]["rate"], stored["other"]
    found = config_from_json(stored, "config.json")
    assert type(found) is Resolved
    assert differences(config, found) == ["toy.rate 0.25 -> 0.5"]
    other_method = differences(config, mocosfl_config())
    assert f"method {NAME!r} -> 'mocosfl'" in other_method
    assert "toy.rate 0.25 -> None" in other_method
    assert {config, found, found} == {found, config}  # hashable


def test_values_have_the_names_of_the_command_line():
    config = toy_config(toy={"rate": 0.25})
    values = flat_fields(to_json(config))
    assert (values["toy.rate"], values["other.big"], values["seed"]) == (0.25, True, 0)
    assert len(values) == len(FIELDS) + 4 + 1
    assert run_values(config) == {
        name: value for name, value in values.items() if name not in EXECUTION_FIELDS | NEWER
    }


def test_runs_keep_the_identity_that_they_had_before_methods():
    assert run_values(mocosfl_config()).keys() == {
        field.name for field in FIELDS if field.name not in EXECUTION_FIELDS | {"method"} | NEWER
    }


@pytest.mark.parametrize(
    ("fields", "keys"),
    [
        ({"loss": "one_way"}, 100),
        ({"loss": "server"}, 200),
        ({"loss": "client"}, 200),
        ({"loss": "one_way", "feature_sharing": False}, 20),
        ({"loss": "client", "feature_sharing": False}, 40),
    ],
)
def test_keys_of_a_step(fields, keys):
    assert keys_per_step(mocosfl_config(num_clients=5, **fields)) == keys
