"""FedAvg on labels, except that a client begins a round with some of its own last network."""

from dataclasses import dataclass
from typing import Annotated

import jax
import optax

from mocosfl_jax.config import Resolved
from mocosfl_jax.config.network import model_of
from mocosfl_jax.config.ranges import ABOVE_0_TO_1
from mocosfl_jax.config.recipe import Recipe
from mocosfl_jax.federated.average import average
from mocosfl_jax.federated.contract import Metric, StepResult
from mocosfl_jax.federated.whole_network import WholeNetwork
from mocosfl_jax.learning.sgd import sgd, sgd_update


@dataclass(frozen=True)
class Toy:
    # Share of the average in the network that a client begins a round with; 1 is FedAvg.
    rate: Annotated[float, ABOVE_0_TO_1] = 0.5


@dataclass(frozen=True)
class ToyMethod(WholeNetwork):
    config: Resolved
    optimizer: optax.GradientTransformation
    views, labels = 1, True

    def own(self, server, key):
        return server, self.optimizer.init(server)

    def join(self, server, own):
        return optax.incremental_update(server, own[0], self.config.section(Toy).rate), own[1]

    def step(self, server, cohort, batch, messages=False):
        def loss(networks):
            logits = jax.vmap(self.model.encode)(networks, *batch.views).embedding
            each = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
            return each.sum(where=batch.mask)

        total, grads = jax.value_and_grad(loss)(cohort[0])
        rate = self.config.learning_rate * batch.rate_factor
        cohort = sgd_update(self.optimizer, *cohort, grads, rate)
        server = jax.lax.cond(
            batch.sync, lambda: average(cohort[0], batch.weight, self.axes), lambda: server
        )
        return StepResult(server, cohort, {"loss": Metric(total, batch.mask.sum(dtype="float32"))})

    def leave(self, participant):
        return participant


def build(config, axes, devices):
    optimizer = sgd(config.momentum, config.weight_decay)
    return ToyMethod(config, optimizer, model=model_of(config, axes.rows), axes=axes)


TOY = Recipe(reads=frozenset(), build=build, sections={"toy": Toy})
