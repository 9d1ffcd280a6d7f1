"""What clients start their rounds with, against NumPy; clients come and go."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.federated.contract import Batch, Normalisation
from mocosfl_jax.federated.state import begin_round, create_state, end_round
from mocosfl_jax.methods.local.merge import Average, FedEMA, FedU, first_record
from mocosfl_jax.methods.local.state import Model, Record
from tests.tiny_local import EMA, SIZE, local, moved
from tests.tiny_method import assert_close, at

COHORTS = ([0, 1, 2], [2, 0, 3], [1, 2, 3], [3, 1, 0], [0, 3, 1])  # 4 clients
WEIGHTS = np.array([5.0, 1.0, 3.0])
TAU = 0.6
RULES = {"average": Average(), "fedu": FedU(threshold=0.35), "fedema": FedEMA(TAU)}
# How far each client of a round moves: a predictor is kept, and mu reaches 1, in some of them.
MOVES = ([0.1, 0.02, 0.05], [0.2, 0.05, 0.03], [0.02, 0.1, 0.01], [0.2, 0.01, 0.1], [0.1] * 3)


def sync_batch() -> Batch:
    """Images matter little: the rate is 0."""
    images = np.random.default_rng(0).normal(size=(3, 2, SIZE, SIZE, 3)).astype(np.float32)
    return Batch(
        views=(jnp.asarray(images), jnp.asarray(images[::-1].copy())),
        labels=None,
        mask=jnp.ones((3, 2), bool),
        weight=jnp.asarray(WEIGHTS, jnp.float32),
        sync=jnp.asarray(True),
        rate_factor=jnp.float32(1),
        progress=jnp.float32(0),
        keys=jax.random.split(jax.random.key(0), 3),
        normalisation=Normalisation(jnp.zeros(3), jnp.ones(3)),
    )


@functools.partial(jax.jit, static_argnums=0)
def new_state(method):
    return create_state(method, jax.random.key(0), jax.random.key(1), 4, 3)


def arrays(tree):
    return jax.tree.map(np.asarray, tree)


def kernels(params):
    """The stem is the only convolution."""
    return params["client"]["unit0"]["conv"]["kernel"]


def mixed(share, own, average):
    return jax.tree.map(lambda a, b: share * a + (1 - share) * b, own, average)


def network(params):
    return {part: params[part] for part in ("client", "server")}


class ByHand:
    """Clients as dictionaries, one rule after another in plain words."""

    def __init__(self, rule: str, common):
        self.rule, self.common, self.clients = rule, common, {}
        self.round, self.seen = 0, set()

    def start(self, client: int):
        """Parameters, and those of the target network."""
        own, common = self.clients.get(client), self.common
        if own is None:
            return common, network(common)
        if self.rule == "average":
            return common, own["target"]
        if self.rule == "fedu":
            keeps = own["moved"] >= 0.35
            self.seen.add(keeps)
            return {**common, **({"predictor": own["end"]["predictor"]} if keeps else {})}, own[
                "target"
            ]
        if own["round"] != self.round - 1:
            self.seen.add("absent")
            return common, network(common)
        mu = min(1, own["lambda"] * own["moved"])
        self.seen.add("all" if mu == 1 else "some")
        return mixed(mu, own["end"], common), own["target"]

    def leave(self, client: int, start, end, target):
        moved = np.linalg.norm(kernels(end) - kernels(start))
        before = self.clients.get(client)
        scale = before["lambda"] if before else TAU / moved
        target = mixed(EMA, target, network(end))
        self.clients[client] = {
            "end": end,
            "moved": moved,
            "lambda": scale,
            "round": self.round,
            "target": target,
        }

    def sync(self, ends):
        """The new average; the mean over clients of what Eq. 4 adds up over arrays."""
        share = WEIGHTS / WEIGHTS.sum()
        self.common = jax.tree.map(
            lambda *xs: sum(w * x for w, x in zip(share, xs, strict=True)), *ends
        )
        self.round += 1
        apart = 0.0
        for end in ends:
            pairs = zip(jax.tree.leaves(end), jax.tree.leaves(self.common), strict=True)
            apart += sum(np.linalg.norm(a - b) for a, b in pairs)
        return apart / len(ends)


@pytest.mark.parametrize(
    ("objective", "name"),
    [
        *[("byol", name) for name in RULES],
        ("simsiam", "fedu"),
        *[(name, "fedema") for name in ("supervised", "simclr", "simsiam", "moco")],
    ],
)
def test_five_rounds_are_what_numpy_gives(objective, name):
    method = local(objective, RULES[name], rate=0.0)
    state = new_state(method)
    begin, end_ = (jax.jit(functools.partial(f, method)) for f in (begin_round, end_round))
    step = jax.jit(method.step)
    hand = ByHand(name, arrays(state.server.model.params))
    batch = sync_batch()
    if method.labels:
        batch = batch._replace(views=batch.views[:1], labels=jnp.ones((3, 2), jnp.int32))
    for round_, cohort in enumerate(COHORTS):
        state = begin(state, jnp.asarray(cohort, jnp.int32))
        starts = [hand.start(client) for client in cohort]
        for slot, (params, target) in enumerate(starts):
            what = f"round {round_}, client {cohort[slot]}"
            assert_close(at(state.cohort.model.params, slot), params, what, 1e-5)
            if objective == "byol":
                assert_close(at(state.cohort.target, slot), target, f"{what}, target", 1e-5)
            if objective == "moco":  # a key encoder is the online network
                assert_close(at(state.cohort.target, slot), network(params), what, 1e-5)
        assert not any(np.any(x) for x in jax.tree.leaves(state.cohort.opt_state))
        ends = [
            arrays(moved(params, 10 * round_ + slot, MOVES[round_][slot]))
            for slot, (params, _) in enumerate(starts)
        ]
        params = jax.tree.map(lambda *x: jnp.asarray(np.stack(x), jnp.float32), *ends)
        model = state.cohort.model.replace(params=params)
        result = step(state.server, state.cohort.replace(model=model), batch)
        for client, (start, target), end in zip(cohort, starts, ends, strict=True):
            hand.leave(client, start, end, target)
        apart = hand.sync(ends)
        found = result.metrics["divergence"]
        np.testing.assert_allclose(found.total / found.weight, apart, rtol=1e-4)
        assert_close(result.server.model.params, hand.common, f"average of {round_}", 1e-5)
        state = end_(state.replace(server=result.server, cohort=result.cohort))
    # Every case of a rule was there.
    cases = {"average": set(), "fedu": {True, False}, "fedema": {"all", "some", "absent"}}
    assert hand.seen == cases[name]


@pytest.mark.parametrize(("moved_by", "mu"), [(0.5, 0.35), (3.0, 1.0)])
def test_statistics_are_merged_as_parameters_are(moved_by, mu):
    """lambda 0.7; FedU keeps all of a predictor from 0.35 on."""
    own, mean = (
        Model(
            {part: {"w": np.float32(value + i)} for i, part in enumerate(("server", "predictor"))},
            {part: np.float32(2 * value - i) for i, part in enumerate(("head", "predictor"))},
        )
        for value in (3.0, 8.0)
    )
    record = Record(jnp.int32(4), jnp.float32(moved_by), jnp.float32(0.7))
    found = {
        name: rule.start(mean, rule.kept(own), record, jnp.int32(5)) for name, rule in RULES.items()
    }
    assert_close(found["average"], mean, "average", 1e-6)
    assert_close(found["fedema"], mixed(mu, own, mean), "fedema", 1e-6)
    kept = Model(
        {**mean.params, "predictor": own.params["predictor"]},
        {**mean.stats, "predictor": own.stats["predictor"]},
    )
    assert_close(found["fedu"], kept, "fedu", 1e-6)


def test_between_syncs_there_is_no_divergence_and_no_new_average():
    method = local("byol", FedEMA(TAU))
    state = new_state(method)
    batch = sync_batch()._replace(sync=jnp.asarray(False))
    result = jax.jit(method.step)(state.server, state.cohort, batch)
    assert float(result.metrics["divergence"].weight) == 0
    jax.tree.map(np.testing.assert_array_equal, result.server, state.server)
    jax.tree.map(np.testing.assert_array_equal, result.cohort.record, state.cohort.record)


def test_a_divergence_of_zero_is_no_infinite_scale():
    rule = FedEMA(TAU)
    after = rule.remember(first_record(), jnp.int32(0), jnp.float32(0))
    assert float(rule.own_share(after, jnp.int32(1))) == 0


@pytest.mark.parametrize(
    ("objective", "rule", "kept"),
    [
        ("supervised", "average", set()),
        ("simclr", "average", set()),
        ("simsiam", "average", set()),
        ("moco", "average", {"queue"}),
        ("byol", "average", {"target", "record"}),
        ("byol", "fedu", {"model", "target", "record"}),
        ("byol", "fedema", {"model", "target", "record"}),
        ("supervised", "fedema", {"model", "record"}),
        ("moco", "fedema", {"model", "queue", "record"}),
    ],
)
def test_a_client_keeps_what_its_method_needs(objective, rule, kept):
    method = local(objective, RULES[rule])
    server = jax.eval_shape(method.init, jax.random.key(0), jax.random.key(0))
    own = jax.eval_shape(method.own, server, jax.random.key(0))
    assert {name for name, part in vars(own).items() if jax.tree.leaves(part)} == kept
    if rule != "average":
        all_parts = set(server.model.params)
        assert own.model.params.keys() == {"fedu": {"predictor"}, "fedema": all_parts}[rule]
