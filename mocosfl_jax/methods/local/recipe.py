"""What local training tells the config: its section, the fields that it reads, rules, checks."""

from dataclasses import dataclass
from typing import Annotated, Any

import jax

from mocosfl_jax.config.fields import Config, Resolved
from mocosfl_jax.config.network import model_of
from mocosfl_jax.config.ranges import ABOVE_0_TO_1, AT_LEAST_0, one_of
from mocosfl_jax.config.recipe import Recipe
from mocosfl_jax.data.dataset import DatasetInfo
from mocosfl_jax.data.partition import ClientImages
from mocosfl_jax.errors import InputError
from mocosfl_jax.federated.axes import NO_MESH, Axes
from mocosfl_jax.learning.sgd import sgd
from mocosfl_jax.methods.local.learner import Learner
from mocosfl_jax.methods.local.merge import MERGES, Average, FedEMA, FedU
from mocosfl_jax.methods.local.method import LocalTraining
from mocosfl_jax.methods.local.objectives import OBJECTIVES, Objective

LEAST_IMAGES = 2
"""Images of a client that can be compared with each other."""


@dataclass(frozen=True)
class Local:
    """The fields `config.local.NAME`."""

    # What a client learns from its images: `supervised` (labels; the embedding holds one score a
    # class), `simclr`, `simsiam`, `moco` (a queue of its own) or `byol`.
    objective: Annotated[str, one_of(OBJECTIVES)] = "moco"
    # What it starts a round with: `average`; `fedu`, but its own predictor if it moved far in its
    # last round; `fedema`, a mean of its own model and the average. Target networks and queues are
    # the client's own in any case.
    merge: Annotated[str, one_of(MERGES)] = "average"
    # FedU: divergence from which on a client goes on with its own predictor (paper: 0.4).
    fedu_threshold: Annotated[float, AT_LEAST_0] = 0.4
    # FedEMA: share of its own model in a client's second round, in (0, 1] (paper: 0.7).
    tau: Annotated[float, ABOVE_0_TO_1] = 0.7


def build(config: Resolved, axes: Axes = NO_MESH, devices: int = 1) -> LocalTraining:
    """Local training on a mesh of so many `devices` with these `axes`."""
    objective = _objective(config)
    queue_rows = config.queue_length if objective.queue else 0
    alike = objective.alike
    return LocalTraining(
        learner=Learner(
            model=model_of(config),
            objective=objective,
            optimizer=sgd(config.momentum, config.weight_decay),
            temperature=config.temperature,
            ema=config.ema,
        ),
        merge=_merge(config.section(Local)),
        learning_rate=config.learning_rate,
        queue_rows=queue_rows,
        chance=alike(config.images_a_step, queue_rows) if alike else None,
        chunks=config.cohort_chunks or _chunks(config, devices),
        axes=axes,
    )


def _objective(config: Config) -> Objective:
    return OBJECTIVES[config.section(Local).objective]


def _merge(section: Local) -> Average:
    if section.merge == "fedu":
        return FedU(section.fedu_threshold)
    return FedEMA(section.tau) if section.merge == "fedema" else Average()


def _chunks(config: Resolved, devices: int) -> int:
    """On a CPU one client at a time, whose activations stay in the cache."""
    return -(-config.cohort_size // devices) if jax.default_backend() == "cpu" else 1


def _rules(config: Config) -> dict[str, Any]:
    objective = _objective(config)
    values = {"temperature": objective.temperature, "ema": 0.99, "queue_length": 6000}
    return {
        "client_state": "persistent",
        **{name: value for name, value in values.items() if name in objective.reads},
    }


def _check(config: Resolved, info: DatasetInfo) -> None:
    """Raises: InputError: values that contradict each other, or the data set."""
    _check_read(config)
    _check_labels(config, info)
    _check_rows(config, info)
    _check_state(config)


def _check_read(config: Resolved) -> None:
    """A field is set that this objective does not read, or that has nothing to act on."""
    section, objective = config.section(Local), _objective(config)
    for name in ("temperature", "ema", "queue_length"):
        value = getattr(config, name)
        if value is not None and name not in objective.reads:
            allowed = f"objective {section.objective!r} does not read it: leave it unset"
            raise InputError(f"config.{name}", value, allowed)
    if MERGES[section.merge].predictor and not objective.predictor:
        able = ", ".join(name for name, row in OBJECTIVES.items() if row.predictor)
        allowed = f"objective {section.objective!r} has no predictor to merge: one of {able}"
        raise InputError("config.local.merge", section.merge, f"{allowed} is needed")


def _check_labels(config: Resolved, info: DatasetInfo) -> None:
    section = config.section(Local)
    if not _objective(config).labels:
        return
    if info.num_classes is None:
        allowed = f"it takes labels, which the images of {info.name} do not have"
        raise InputError("config.local.objective", section.objective, allowed)
    if config.head_width < info.num_classes:
        allowed = f"one score a class is needed: at least {info.num_classes}"
        raise InputError("config.head_width", config.head_width, allowed)


def _check_rows(config: Resolved, info: DatasetInfo) -> None:
    """Contrast and BatchNorm compare the images of one client with each other."""
    section, objective = config.section(Local), _objective(config)
    if not objective.labels:
        least = f"at least {LEAST_IMAGES}"
        needed = f"objective {section.objective!r} compares images of one client: {least}"
        if config.images_a_step < LEAST_IMAGES:
            raise InputError("config.batch_size", config.batch_size, needed)
        if config.images_per_client == 1:
            raise InputError("config.images_per_client", 1, needed)
        if config.images_per_client is None and info.num_train < LEAST_IMAGES * config.num_clients:
            allowed = f"{needed} of the {info.num_train} each"
            raise InputError("config.num_clients", config.num_clients, allowed)
    keys = objective.views * config.images_a_step
    if objective.queue and keys > config.queue_length:
        allowed = f"a client brings {keys} keys a step: at least {keys}"
        raise InputError("config.queue_length", config.queue_length, allowed)


def _check_holdings(config: Resolved, partition: ClientImages) -> None:
    """Raises: InputError: a client that takes part has a single image to compare."""
    if _objective(config).labels:
        return
    held = partition.sizes[partition.sizes > 0] + (config.mix_batch_size or 0)
    if few := int((held < LEAST_IMAGES).sum()):
        objective = config.section(Local).objective
        clients = "1 client holds" if few == 1 else f"{few} clients hold"
        found = f"objective {objective!r} compares images of one client, but {clients} a single one"
        if config.dirichlet_alpha is None:
            raise InputError("config.num_clients", config.num_clients, f"{found}: fewer clients")
        ways = "a larger alpha, fewer config.num_clients or another config.seed"
        raise InputError("config.dirichlet_alpha", config.dirichlet_alpha, f"{found}: {ways}")


def _check_state(config: Resolved) -> None:
    """Stateless clients keep nothing between rounds."""
    section, objective = config.section(Local), _objective(config)
    if config.client_state != "stateless":
        return
    for name, kept in (("queue", objective.queue), ("target network", objective.target)):
        if kept:
            lost = f"with {section.objective!r} a client's own {name} would be lost"
            raise InputError("config.client_state", "stateless", f"{lost}: set 'persistent'")
    if MERGES[section.merge].measures:
        needed = f"{section.merge!r} needs what a client kept of its last round"
        raise InputError("config.client_state", "stateless", f"{needed}: set 'persistent'")


LOCAL = Recipe(
    reads=frozenset({"client_state", "queue_length", "temperature", "ema", "cohort_chunks"}),
    build=build,
    rules=_rules,
    check=_check,
    check_holdings=_check_holdings,
    sections={"local": Local},
    rate_by_round=True,
    memory_hints={"server": ("width", "a narrower network")},
)
