"""What MocoSFL tells the config: the fields that it reads, their rules and checks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mocosfl_jax.config.averaging import Averaging
from mocosfl_jax.config.defences import DEFENCES
from mocosfl_jax.config.fields import Config, Resolved
from mocosfl_jax.config.measure import MOST_AGES, Measure
from mocosfl_jax.config.recipe import Facts, FormerLayout, Recipe
from mocosfl_jax.config.rich import Rich, rich_of
from mocosfl_jax.config.saving import Saving
from mocosfl_jax.data.dataset import DatasetInfo
from mocosfl_jax.errors import InputError
from mocosfl_jax.methods.mocosfl.build import build, keys_per_step, queue_rows, queue_steps
from mocosfl_jax.methods.mocosfl.defences import check_defences, check_holdings
from mocosfl_jax.methods.mocosfl.defences import facts as facts_of_defences
from mocosfl_jax.methods.mocosfl.former import from_former, to_former
from mocosfl_jax.methods.mocosfl.saving import LATENTS_ONLY
from mocosfl_jax.methods.mocosfl.sizes import stored_latents
from mocosfl_jax.models.heads import HEADS
from mocosfl_jax.models.split import bytes_of


def _rules(config: Config) -> dict[str, Any]:
    """Values of the fields below, from those that all methods share."""
    syncs = 1000 // (config.batch_size * config.num_clients)
    return {
        "syncs_per_round": min(max(1, syncs), config.steps_per_round),
        "client_state": "persistent",
        "loss": "one_way" if config.head == "V1" else "server",
        "feature_sharing": True,
        "queue_length": 6000,
        "temperature": 0.1,
        "ema": 0.99,
        "align_momentum": False,
        "client_learning_rate": config.learning_rate,
        "cohort_chunks": None,
    }


def _check(config: Resolved, info: DatasetInfo) -> None:
    """Raises: InputError: values that contradict each other."""
    _check_queue(config)
    _check_client_state(config)
    _check_chunks(config)
    _check_averaging(config)
    _check_measure(config)
    _check_saving(config)
    _check_rich(config)
    check_defences(config)


def _check_queue(config: Resolved) -> None:
    length, keys = queue_rows(config), keys_per_step(config)
    if keys <= length:
        return
    brought = "1 key" if keys == 1 else f"{keys} keys"
    allowed = f"a step brings {brought}: at least {keys}"
    if not config.feature_sharing:
        clients = f"{config.num_clients} clients, each of which brings {brought} a step"
        allowed = f"divided among {clients}: at least {keys * config.num_clients}"
    raise InputError("config.queue_length", config.queue_length, allowed)


def _check_client_state(config: Resolved) -> None:
    """Stateless clients keep nothing between rounds."""
    if config.client_state != "stateless":
        return
    if not config.align_momentum:
        lost = "a client's own key encoder would be lost: set config.align_momentum=True"
        raise InputError("config.client_state", config.client_state, lost)
    if not config.feature_sharing:
        lost = "a client's private queue would be lost"
        allowed = f"{lost}: set 'persistent', or config.feature_sharing=True"
        raise InputError("config.client_state", config.client_state, allowed)


def _check_chunks(config: Resolved) -> None:
    chunks = config.cohort_chunks or 1
    if chunks > 1 and HEADS[config.head].batch_norm:
        allowed = f"1 is needed with head {config.head}, whose BatchNorm sees all rows at once"
        raise InputError("config.cohort_chunks", chunks, allowed)


_NEVER_AVERAGED = "frozen clients (config.client_learning_rate=0) are never averaged"


def _check_averaging(config: Resolved) -> None:
    tau = config.section_or_default(Averaging).tau
    if not tau:
        return
    if config.client_learning_rate == 0:
        raise InputError("config.averaging.tau", tau, f"{_NEVER_AVERAGED}: set 0")
    if config.client_state == "stateless":
        lost = "what clients keep of their own models would be lost"
        allowed = f"{lost}: set 'persistent', or config.averaging.tau=0"
        raise InputError("config.client_state", config.client_state, allowed)


def _check_measure(config: Resolved) -> None:
    measure = config.section_or_default(Measure)
    if measure.divergence and config.client_learning_rate == 0:
        raise InputError("config.measure.divergence", True, f"{_NEVER_AVERAGED}: set False")
    if measure.hardness and queue_steps(config) > MOST_AGES:
        allowed = (
            f"a queue holds the keys of {queue_steps(config)} steps, and at most {MOST_AGES} ages"
            " are logged: set a larger batch or a shorter config.queue_length"
        )
        raise InputError("config.measure.hardness", True, allowed)


def _check_saving(config: Resolved) -> None:
    saving = config.section_or_default(Saving)
    if not saving.threshold:
        return
    first = max(saving.warmup_rounds, 1) + 2
    if first > config.rounds:
        allowed = f"the first round that can save is round {first}, and there are {config.rounds}"
        field, value = "config.saving.warmup_rounds", saving.warmup_rounds
        raise InputError(field, value, f"{allowed}: set fewer, or more config.rounds")
    if not config.feature_sharing and config.cohort_size < config.num_clients:
        allowed = (
            "a round in C would meet the queues of other clients than those whose latents are"
            " stored: set config.feature_sharing, or all clients take part in each round"
        )
        raise InputError("config.saving.threshold", saving.threshold, allowed)


def _facts(config: Resolved, most_draws: Callable[[], int]) -> Facts:
    return facts_of_defences(config, most_draws).with_others(_facts_of_saving(config))


def _facts_of_saving(config: Resolved) -> Facts:
    method = build(config)
    if method.saving is None:
        return Facts()
    images = jax.ShapeDtypeStruct(method.saving.images, jnp.float32)
    sent, times = {True: 0, False: 0}, {"step": config.steps_per_round, "round": 1}
    for message in method.in_status(LATENTS_ONLY).traffic(images):
        sent[message.up] += times[message.when] * bytes_of(message.content)
    stored = bytes_of(stored_latents(method, config.cohort_size))
    notes = (
        f"latents of a round, stored for rounds in C: {stored / 1e6:,.2f} MB",
        f"in a round in B a client sends {sent[True] / 1e6:,.2f} MB and receives"
        f" {sent[False]:,} bytes, in C nothing",
    )
    return Facts({"stored_latents_bytes": stored}, notes)


def _check_rich(config: Resolved) -> None:
    rich = rich_of(config)
    if rich is not None and not config.feature_sharing:
        allowed = "with private queues (config.feature_sharing=False) all clients must be alike: 0"
        raise InputError("config.rich.clients", rich.clients, allowed)
    if rich is not None and config.section_or_default(Saving).threshold:
        allowed = "config.saving.threshold is set, and what it stores is of clients alike: 0"
        raise InputError("config.rich.clients", rich.clients, allowed)


MOCOSFL = Recipe(
    reads=frozenset(
        {
            "syncs_per_round",
            "client_state",
            "cut",
            "bottleneck",
            "loss",
            "feature_sharing",
            "queue_length",
            "temperature",
            "ema",
            "align_momentum",
            "client_learning_rate",
            "cohort_chunks",
        }
    ),
    build=build,
    rules=_rules,
    check=_check,
    check_holdings=check_holdings,
    sections={
        **DEFENCES,
        "averaging": Averaging,
        "measure": Measure,
        "rich": Rich,
        "saving": Saving,
    },
    facts=_facts,
    memory_hints={
        "population": ("client_state", "stateless clients (with align_momentum) keep nothing"),
        "server.queue": ("queue_length", "a shorter queue"),
        "cohort.stored_latents": (
            "saving.threshold",
            "config.bottleneck to narrow them, fewer config.steps_per_round, or 0 to store none",
        ),
    },
    former=FormerLayout(to_former, from_former),
)
