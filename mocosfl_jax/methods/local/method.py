"""Local training and averaging of whole networks: FedAvg, FL-SimCLR, FL-SimSiam, FL-MoCo, FL-BYOL,
FedU and FedEMA are its settings (docs/baselines.md)."""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp

from mocosfl_jax.federated.average import average
from mocosfl_jax.federated.axes import NO_MESH, Axes
from mocosfl_jax.federated.chunks import over_chunks
from mocosfl_jax.federated.contract import (
    AlikeRounds,
    Batch,
    ClientWork,
    Message,
    Metric,
    Parameters,
    StepResult,
    Tree,
    Work,
)
from mocosfl_jax.learning.divergence import divergence
from mocosfl_jax.learning.queue import Queue, init_queue
from mocosfl_jax.methods.local.learner import Examples, Learner
from mocosfl_jax.methods.local.merge import (
    Average,
    choose,
    convolutions,
    first_record,
    movement,
)
from mocosfl_jax.methods.local.state import Kept, Model, Participant, Record, Server
from mocosfl_jax.models.split import Params, SplitModel, Variables


@dataclass(frozen=True)
class LocalTraining(AlikeRounds):
    """The method, a `federated.contract.Method`; fixed for a run and hashable.

    A round ends with its only sync. Optimizer state starts each round at zero.

    learner: what a client computes with. merge: what it starts a round with.
    learning_rate: at the start of the run. queue_rows: of each client's queue, 0 without one.
    chance, chunks, axes: see `Method`. BatchNorm normalises within the rows of one client: the
    model's head has no row axes.
    """

    learner: Learner
    merge: Average
    learning_rate: float
    queue_rows: int = 0
    chance: float | None = None
    chunks: int = 1
    axes: Axes = NO_MESH

    batch_factor: ClassVar[int] = 1

    @property
    def model(self) -> SplitModel:
        return self.learner.model

    @property
    def views(self) -> int:
        return self.learner.objective.views

    @property
    def labels(self) -> bool:
        return self.learner.objective.labels

    # ------------------------------------------------------------------------- state and rounds

    def init(self, params_key: jax.Array, state_key: jax.Array) -> Server:
        return Server(self.learner.init(params_key), jnp.int32(0))

    def start(self, server: Server, variables: Variables) -> Server:
        """The predictor stays as it is."""
        client, params, stats = variables
        old = server.model
        model = Model(
            {**old.params, "client": client, "server": params}, {**old.stats, "head": stats}
        )
        return server.replace(model=model)

    def own(self, server: Server, key: jax.Array) -> Kept:
        objective = self.learner.objective
        return Kept(
            model=self.merge.kept(server.model),
            target=server.model.network if objective.target else None,
            queue=self._new_queue(key) if objective.queue else None,
            record=first_record() if objective.target or self.merge.measures else None,
        )

    def join(self, server: Server, own: Kept) -> Participant:
        objective, round_ = self.learner.objective, server.round
        model = self.merge.start(server.model, own.model, own.record, round_)
        target: Params | None = None
        if objective.queue:
            target = model.network
        if objective.target:
            restarts = self.merge.restarts(cast(Record, own.record), round_)
            target = choose(restarts, server.model.network, own.target)
        return Participant(
            model=model,
            opt_state=self.learner.optimizer.init(model.params),
            target=target,
            queue=own.queue,
            record=own.record,
            start=convolutions(model.network) if self.merge.measures else None,
        )

    def leave(self, participant: Participant) -> Kept:
        return Kept(
            model=self.merge.kept(participant.model),
            target=participant.target if self.learner.objective.target else None,
            queue=participant.queue,
            record=participant.record,
        )

    def _new_queue(self, key: jax.Array) -> Queue:
        return init_queue(key, self.queue_rows, self.model.head.width)

    # --------------------------------------------------------------------------------- one step

    def step(
        self, server: Server, cohort: Participant, batch: Batch, messages: bool = False
    ) -> StepResult:
        rate = self.learning_rate * batch.rate_factor

        def of_slots(cohort: Participant, examples: Examples) -> tuple[jax.Array, Participant]:
            step = jax.vmap(partial(self.learner.step, rate=rate))
            cohort, losses = step(cohort, examples)
            return losses.sum(), cohort

        examples = Examples(batch.views, batch.labels, batch.mask)
        loss, cohort = over_chunks(of_slots, self.chunks, self.axes, cohort, examples)
        server, record, moved = jax.lax.cond(
            batch.sync,
            lambda: self._sync(server, cohort, batch.weight),
            lambda: (server, cohort.record, self.axes.vary(jnp.float32(0))),
        )
        participants = jnp.sum(batch.weight > 0, dtype=jnp.float32)
        # loss: mean over images, before the update. divergence: Eq. 4 of the MocoSFL paper.
        metrics = {
            "loss": Metric(loss, batch.mask.sum(dtype=jnp.float32)),
            "divergence": Metric(moved, jnp.where(batch.sync, participants, 0.0)),
        }
        return StepResult(server, cohort.replace(record=record), metrics)

    def _sync(
        self, server: Server, cohort: Participant, weight_C: jax.Array
    ) -> tuple[Server, Record | None, jax.Array]:
        """The server after the round, what the clients remember of it, and the distances of their
        parameters from the average, added. The clients keep their own models."""
        mean = average(cohort.model, weight_C, self.axes)

        distances_C = jax.vmap(divergence, (0, None))(cohort.model.params, mean.params)
        moved = jnp.sum(distances_C, where=weight_C > 0)
        record = cohort.record
        if record is not None:
            record = self.axes.vary(jax.vmap(partial(self._remember, server.round))(cohort))
        return Server(mean, server.round + 1), record, moved

    def _remember(self, round_: jax.Array, client: Participant) -> Record:
        moved = jnp.float32(0)
        if self.merge.measures:
            moved = movement(client.start, convolutions(client.model.network))
        return self.merge.remember(cast(Record, client.record), round_, moved)

    # --------------------------------------------------------------- what else the loop asks

    def network(self, server: Server, cohort: Participant | None) -> Variables:
        """That of the last sync, also in the middle of a round."""
        params, stats = server.model.params, server.model.stats
        return Variables(params["client"], params["server"], stats["head"])

    def parameters(self, server: Server) -> Parameters:
        """Clients have all parts of the model."""
        return Parameters(server.model.params, ())

    def sharded(self, server: Server) -> Tree:
        """Nothing: every participant has the whole network anyway."""
        return False

    def traffic(self, images: jax.ShapeDtypeStruct) -> tuple[Message, ...]:
        """Parameters and statistics."""
        model = jax.eval_shape(self.learner.init, jax.random.key(0))
        return (
            Message("model", True, "sync", model),
            Message("average of models", False, "sync", model),
        )

    def sent(self, participant: Participant, images: jax.Array, key: jax.Array) -> None:
        """Images are never sent, in whatever form."""

    def client_work(self, images: jax.ShapeDtypeStruct) -> ClientWork:
        rows = images.shape[0]

        def step(client: Participant, views: tuple[jax.Array, ...], labels: Any) -> Any:
            examples = Examples(views, labels, jnp.ones(rows, bool))
            return self.learner.step(client, examples, jnp.float32(0.1))

        labels = jax.ShapeDtypeStruct((rows,), jnp.int32) if self.labels else None
        client = jax.eval_shape(self._first_participant, jax.random.key(0))
        variables = self.model.shapes()
        return ClientWork(
            train=Work(step, (client, (images,) * self.views, labels), replaces=True),
            infer=Work(self.model.encode, (variables, images), replaces=False),
        )

    def working_set(self, images: jax.ShapeDtypeStruct, slots: int) -> Tree:
        """What a backward pass of each slot keeps, its gradient and its new parameters, those of a
        key encoder or target network included."""
        rows = images.shape[0]

        def backward(client: Participant, images: jax.Array) -> Any:
            labels = jnp.zeros(rows, jnp.int32) if self.labels else None
            examples = Examples((images,) * self.views, labels, jnp.ones(rows, bool))

            def loss(params: dict[str, Params]) -> jax.Array:
                return self.learner.loss(params, client, examples)[0]

            return jax.vjp(loss, client.model.params)[1]

        client = jax.eval_shape(self._first_participant, jax.random.key(0))
        kept = jax.eval_shape(backward, client, images)
        new = (client.model.params, client.model.params, client.target)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((slots, *x.shape), x.dtype), (kept, new))

    def _first_participant(self, key: jax.Array) -> Participant:
        server = self.init(key, key)
        return self.join(server, self.own(server, key))
