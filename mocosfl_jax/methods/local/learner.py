"""What one client computes in a step; no client axis, no mesh."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mocosfl_jax.learning.ema import ema_update
from mocosfl_jax.learning.infonce import normalize
from mocosfl_jax.learning.queue import enqueue
from mocosfl_jax.learning.sgd import sgd_update
from mocosfl_jax.methods.local.objectives import Objective, Outputs
from mocosfl_jax.methods.local.state import Model, Participant
from mocosfl_jax.models.split import Params, SplitModel


class Examples(NamedTuple):
    """What a client takes in a step.

    views: (B, S, S, 3) float32 each. labels: (B,) int32 or None. mask: (B,) bool, False for
    padding.
    """

    views: tuple[jax.Array, ...]
    labels: jax.Array | None
    mask: jax.Array


class Learned(NamedTuple):
    """loss: () float32, the sum over images. stats: of the model, after the step. target:
    embeddings (B, D) of each view by the key encoder or target network."""

    loss: jax.Array
    stats: dict[str, Params]
    target: tuple[jax.Array, ...]


@dataclass(frozen=True)
class Learner:
    """What a client computes with, fixed for a run; hashable.

    temperature, ema: None where the objective reads none.
    """

    model: SplitModel
    objective: Objective
    optimizer: optax.GradientTransformation
    temperature: float | None
    ema: float | None

    def init(self, key: jax.Array) -> Model:
        """A random model; its network is that of `SplitModel.init` of the same key."""
        client, server, head = self.model.init(key)
        params, stats = {"client": client, "server": server}, {"head": head}
        if self.objective.predictor:
            embedding, rows = jnp.zeros((1, self.model.head.width)), jnp.ones((1,), bool)
            made = self.model.head.init(jax.random.fold_in(key, 1), embedding, rows, False)
            params["predictor"], stats["predictor"] = made["params"], made.get("batch_stats", {})
        return Model(params, stats)

    def step(
        self, client: Participant, examples: Examples, rate: jax.Array
    ) -> tuple[Participant, jax.Array]:
        """The client after one step of SGD, and the sum of its images' losses before it.

        Args: rate: () float32, the learning rate.
        """
        objective, target = self.objective, client.target
        if objective.queue:  # MoCo: the key encoder moves first
            target = self._towards(target, client.model)
        gradient = jax.grad(self.loss, has_aux=True)
        grads, learned = gradient(client.model.params, client.replace(target=target), examples)
        params, opt_state = sgd_update(
            self.optimizer, client.model.params, client.opt_state, grads, rate
        )
        model, queue = Model(params, learned.stats), client.queue
        if objective.target:  # BYOL: the target network moves last
            target = self._towards(target, model)
        if queue is not None:
            keys = normalize(jnp.concatenate(learned.target))
            queue = enqueue(queue, keys, jnp.concatenate([examples.mask] * objective.views))
        client = client.replace(model=model, opt_state=opt_state, target=target, queue=queue)
        return client, learned.loss

    def loss(
        self, params: dict[str, Params], client: Participant, examples: Examples
    ) -> tuple[jax.Array, Learned]:
        """The mean loss of the client's images, to be differentiated by the parameters.

        Args: client: all else that it has.
        """
        mask, stats = examples.mask, dict(client.model.stats)
        online, stats["head"] = self._embed(params, stats["head"], examples)
        predicted: tuple[jax.Array, ...] = ()
        if self.objective.predictor:
            head = {"head": params["predictor"]}  # of the same form as the network's
            for embedding in online:
                output, stats["predictor"] = self.model.embed(
                    head, stats["predictor"], embedding, mask, train=True
                )
                predicted = *predicted, output
        target: tuple[jax.Array, ...] = ()
        if client.target is not None:
            target, _ = self._embed(client.target, client.model.stats["head"], examples)
        queue = None if client.queue is None else client.queue.keys
        outputs = Outputs(online, predicted, target, queue, examples.labels, mask)
        rows = self.objective.rows(outputs, self.temperature or 1.0)
        total = jnp.sum(rows, where=mask)
        return total / jnp.maximum(mask.sum(dtype=total.dtype), 1), Learned(total, stats, target)

    def _embed(
        self, params: dict[str, Params], stats: Params, examples: Examples
    ) -> tuple[tuple[jax.Array, ...], Params]:
        """Embeddings (B, D) of each view, and the head's statistics after all.

        All views pass through the backbone at once, which sees every image by itself, and one after
        another through the head, whose BatchNorm normalises over the images of one view.
        """
        latents = self.model.latents(params["client"], jnp.concatenate(examples.views))
        features = self.model.features(params["server"], latents)
        embedded: tuple[jax.Array, ...] = ()
        for view in jnp.split(features, len(examples.views)):
            embedding, stats = self.model.embed(
                params["server"], stats, view, examples.mask, train=True
            )
            embedded = *embedded, embedding
        return embedded, stats

    def _towards(self, target: Params | None, model: Model) -> Params:
        assert self.ema is not None and target is not None, "the objective has such a network"
        return ema_update(target, model.network, self.ema)
