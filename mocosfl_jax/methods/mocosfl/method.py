"""MocoSFL (Li et al., ICLR 2023): both sides in one program, in the documented order.

The clients' functions are mapped over the slots here, and only here; their latents, joined, are the
server's rows. docs/method.md numbers the steps and lists where the public code differs.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple, cast

import jax
import jax.numpy as jnp

from mocosfl_jax.federated.average import average, hand_out
from mocosfl_jax.federated.axes import NO_MESH, Axes
from mocosfl_jax.federated.chunks import over_chunks
from mocosfl_jax.federated.contract import (
    Batch,
    ClientWork,
    Message,
    Metric,
    Parameters,
    Status,
    StepResult,
    Tree,
)
from mocosfl_jax.federated.slots import by_group, in_one, rich_slots
from mocosfl_jax.learning.divergence import divergence
from mocosfl_jax.learning.queue import Queue
from mocosfl_jax.methods.mocosfl import client as client_side
from mocosfl_jax.methods.mocosfl import rounds, sizes
from mocosfl_jax.methods.mocosfl import saving as saving_rule
from mocosfl_jax.methods.mocosfl import server as server_side
from mocosfl_jax.methods.mocosfl.client import ClientSide, ClientState, Pending, Totals
from mocosfl_jax.methods.mocosfl.groups import by_client, gather_keys, messages_of
from mocosfl_jax.methods.mocosfl.measures import divergence_metric, similarity_metrics
from mocosfl_jax.methods.mocosfl.messages import ClientModel, Latents, Params
from mocosfl_jax.methods.mocosfl.saving import FULL, LATENTS_ONLY, SILENT, STATUSES, Saving
from mocosfl_jax.methods.mocosfl.server import Learned, ServerSide, ServerState
from mocosfl_jax.methods.mocosfl.state import Kept, MocoState, Participant
from mocosfl_jax.models.split import SplitModel, Variables


class _Sums(NamedTuple):
    """What adds up over clients."""

    server_grad: Params
    loss: jax.Array
    correct: jax.Array
    client_metrics: Totals


class _Rows(NamedTuple):
    """What each slot or row has for itself. learned: without the server's gradient. latents: see
    `Messages` in groups.py."""

    clients: ClientState
    learned: Learned
    latents: Any


class _Synced(NamedTuple):
    """After a step. common: what the server sends at a round's start. divergence: of each client
    at this sync, (C,); None where it is not measured."""

    clients: ClientState
    common: ClientModel
    divergence: jax.Array | None


@dataclass(frozen=True)
class MocoSFL:
    """The method, a `federated.contract.Method`; fixed for a run and hashable.

    model: the split network. client, server: what each side computes with.
    learning_rate, client_learning_rate: at the start, of server and clients.
    queue_rows: of the shared queue, or of each private one. private_queues: no feature sharing.
    align: a sync averages key encoders too (MonAcoSFL). persistent: clients keep their state.
    measures_divergence: whether that of the clients at a sync is measured.
    saving: of loss-based saving; None: all rounds are full. status: of the round at hand.
    chunks, axes, batch_factor: see `Method`.
    Raises: ValueError: chunks with a BatchNorm head; stateless clients that would lose something;
      private queues, or saving, of clients whose batches differ.
    """

    model: SplitModel
    client: ClientSide
    server: ServerSide
    learning_rate: float
    client_learning_rate: float
    queue_rows: int
    private_queues: bool = False
    align: bool = False
    persistent: bool = True
    measures_divergence: bool = False
    saving: Saving | None = None
    status: int = FULL
    chunks: int = 1
    axes: Axes = NO_MESH
    batch_factor: int = 1

    views: ClassVar[int] = 2
    labels: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.chunks > 1 and self.model.head.batch_norm:
            raise ValueError(f"chunks = {self.chunks}: a BatchNorm head needs all rows at once: 1")
        if not self.persistent and (self.private_queues or not self.align or self._extra_state()):
            raise ValueError("stateless clients take a shared queue and aligned key encoders")
        if not self.persistent and self.client.tau:
            raise ValueError("stateless clients keep nothing of their own models: tau = 0")
        if self.batch_factor > 1 and (self.private_queues or self.saving):
            raise ValueError("private queues and saving take batches of one size: batch_factor = 1")

    @property
    def chance(self) -> float:
        """Of K + 1 equal logits, each view's loss is ln(K + 1)."""
        return (2 if self.server.loss.swapped else 1) * math.log(self.queue_rows + 1)

    # ------------------------------------------------------------------------- state and rounds

    def init(self, params_key: jax.Array, state_key: jax.Array) -> MocoState:
        return rounds.init(self, params_key, state_key)

    def start(self, server: MocoState, variables: Variables) -> MocoState:
        return rounds.start(self, server, variables)

    def own(self, server: MocoState, key: jax.Array) -> Kept:
        return rounds.own(self, server, key)

    def join(self, server: MocoState, own: Kept) -> Participant:
        return rounds.join(self, server, own)

    def leave(self, participant: Participant) -> Kept:
        return rounds.leave(self, participant)

    def carry(self, before: Participant | None, cohort: Participant) -> Participant:
        return rounds.carry(self, before, cohort)

    @property
    def statuses(self) -> tuple[Status, ...]:
        return STATUSES if self.saving else ()

    def status_of(self, server: MocoState) -> jax.Array:
        return jnp.zeros((), jnp.int32) if server.saving is None else server.saving.status

    def in_status(self, status: int) -> "MocoSFL":
        """In B and C client models stay as frozen ones do, and nothing is averaged."""
        if status == FULL:
            return self
        side = replace(self.client, frozen=True, extra_gradient=None, tau=0.0)
        return replace(self, status=status, client=side, measures_divergence=False)

    def _extra_state(self) -> bool:
        """Whether the extra gradient has a state, which a client would have to keep."""
        extra = self.client.extra_gradient
        return extra is not None and bool(
            jax.tree.leaves(jax.eval_shape(extra.init, jax.random.key(0)))
        )

    # --------------------------------------------------------------------------------- one step

    def step(
        self, server: MocoState, cohort: Participant, batch: Batch, messages: bool = False
    ) -> StepResult:
        axes, saving = self.axes, server.saving
        stored, cohort = cohort.stored_latents, cohort.replace(stored_latents=None)
        replayed = None
        if self.status == SILENT:
            assert self.saving and saving and stored, "they exist where rounds have a status"
            batch, replayed = saving_rule.replay(
                self.saving, saving, stored, batch, self.server.loss.rows
            )
        rows = batch.mask.astype(jnp.float32).sum() * self.server.loss.rows
        count = axes.sum(rows)
        key_params = server_side.move_key_encoder(self.server, server.server)
        models = server.server.replace(key_params=key_params)
        complete = models.replace(
            params=axes.gather_server(models.params), key_params=axes.gather_server(key_params)
        )

        # 1. to 3., and the clients' part of 5.: all that belongs to rows.
        def of_slots(
            cohort: Participant, views: Any, mask: Any, keys: Any, replayed: Any
        ) -> tuple[_Sums, _Rows]:
            slots = batch._replace(views=views, mask=mask, keys=keys)
            return self._of_slots(complete, server.queue, count, cohort, slots, replayed)

        sums, own = over_chunks(
            of_slots, self.chunks, axes, cohort, batch.views, batch.mask, batch.keys, replayed
        )

        # 4. The keys go to the queue.
        queue, queues = self._write_keys(server.queue, cohort.queue, own, batch.mask)

        # 5. The server's update; the clients' were made with their rows.
        server_grad = axes.sum_server(sums.server_grad, models.params)
        rate = self.learning_rate * batch.rate_factor
        models = server_side.update(self.server, models, server_grad, own.learned, rate)

        # 6. Sync. Frozen clients stay alike without one.
        if self.client.frozen:
            common = server.client
            if self.status == LATENTS_ONLY:
                common = saving_rule.moved(common, self.client.ema)
            after = self._unsynced(own.clients, common)
        else:
            after = jax.lax.cond(
                batch.sync,
                lambda clients, _: self._sync(clients, batch.weight),
                self._unsynced,
                own.clients,
                server.client,
            )
        syncs, synced = server.syncs, cohort.synced
        if syncs is not None and synced is not None and not self.client.frozen:
            syncs = syncs + batch.sync.astype(jnp.int32)
            synced = jnp.where(batch.sync, syncs, synced)
        # loss: mean over rows, views added, before the update. accuracy: percent of rows whose
        # positive has a larger logit than every key in the queue (of the last view).
        metrics = {
            **{name: Metric(*parts) for name, parts in sums.client_metrics.items()},
            "loss": Metric(sums.loss, rows),
            "accuracy": Metric(100 * sums.correct, rows),
        }
        if own.learned.queries is not None:
            met = cohort.queue if server.queue is None else server.queue
            assert met is not None, "one of the two exists"
            metrics |= similarity_metrics(self.server, own.learned.queries, met, batch)
        if after.divergence is not None:
            metrics |= divergence_metric(after.divergence, batch)
        if self.saving and saving and stored:
            if self.status != SILENT:
                stored = saving_rule.store(stored, saving.step, own.latents, batch.mask)
            loss = axes.sum(sums.loss) / count
            saving = saving_rule.after_step(self.saving, saving, loss)
        return StepResult(
            MocoState(models, after.common, queue, syncs, saving),
            Participant(after.clients, queues, synced, stored),
            metrics,
            messages_of(own.latents, own.learned.latent_grad, self.chunks) if messages else None,
        )

    def _of_slots(
        self,
        models: ServerState,
        shared_queue: Queue | None,
        count: jax.Array,
        cohort: Participant,
        batch: Batch,
        replayed: Latents | None,
    ) -> tuple[_Sums, _Rows]:
        """Forward and backward pass of some slots, and the updates of their clients.

        Args: models: complete, the key encoder moved. count: rows that count in the step.
          replayed: latents in place of those that clients send; None: they send theirs.
        """
        keys = batch.keys if self.client.needs_key else None
        if replayed is not None:
            rich, held = 0, [(cohort.client, replayed, Pending(None, None), keys)]
        else:
            rich = rich_slots(len(batch.keys), len(batch.mask), self.batch_factor)
            forward = jax.vmap(partial(client_side.forward, self.client))
            held = [
                (*forward(client, query, key, mask, rng), rng)
                for (client, rng), (query, key, mask) in zip(
                    by_group((cohort.client, keys), rich),
                    by_group((*batch.views, batch.mask), rich, self.batch_factor),
                    strict=True,
                )
            ]
        latents = tuple(sent for _, sent, _, _ in held)
        queues = _negatives(shared_queue, cohort.queue)
        rows = in_one([server_side.join(sent) for sent in latents])
        learned = server_side.learn(self.server, models, rows, queues, count)
        rate = self.client_learning_rate * batch.rate_factor
        update = jax.vmap(
            lambda client, pending, gradient, key: client_side.update(
                self.client, client, pending, gradient, rate, batch.to_pixels, key, batch.progress
            )
        )
        gradients = by_client(learned.latent_grad, latents)
        clients, metrics = in_one(
            [
                update(client, pending, gradient, key)
                for (client, _, pending, key), gradient in zip(held, gradients, strict=True)
            ]
        )
        totals = jax.tree.map(lambda x: x.sum(axis=0), metrics)
        sums = _Sums(learned.server_grad, learned.loss, learned.correct, totals)
        sent = latents if rich else latents[0]
        return sums, _Rows(clients, learned._replace(server_grad=None), sent)

    def _write_keys(
        self,
        shared: Queue | None,
        private: Queue | None,
        own: _Rows,
        mask_CB: jax.Array,
    ) -> tuple[Queue | None, Queue | None]:
        """The shared queue and the private ones, one of which is None, with the step's keys."""
        keys = own.learned.keys
        if not isinstance(own.latents, Latents):
            assert shared is not None, "batches of two sizes have a shared queue"
            keys, mask_R = gather_keys(keys, own.latents, self.chunks, self.axes)
            return server_side.write_keys(shared, keys, mask_R), None
        mask_R = jnp.concatenate([mask_CB] * self.server.loss.rows, axis=1).reshape(-1)
        if shared is None:
            assert private is not None, "one of the two exists"
            return None, server_side.write_private_keys(private, keys, mask_R)
        keys = tuple(self.axes.gather_rows(key, axis=0) for key in keys)
        return server_side.write_keys(shared, keys, self.axes.gather_rows(mask_R, axis=0)), None

    def _sync(self, clients: ClientState, weight_C: jax.Array) -> _Synced:
        """All clients with the average of their models, or with some of it, and that average."""
        models = client_side.upload(clients, self.align)
        mean = average(models, weight_C, self.axes)
        apart = None
        if self.measures_divergence:
            apart = jax.vmap(divergence, in_axes=(0, None))(clients.params, mean.params)
        handed = hand_out(mean, models, self.axes)
        received = jax.vmap(partial(client_side.receive, self.client))(clients, handed)
        return _Synced(received, mean, apart)

    def _unsynced(self, clients: ClientState, common: ClientModel) -> _Synced:
        slots = len(jax.tree.leaves(clients)[0])
        apart = self.axes.vary(jnp.zeros(slots)) if self.measures_divergence else None
        return _Synced(clients, common, apart)

    # --------------------------------------------------------------- what else the loop asks

    def network(self, server: MocoState, cohort: Participant | None) -> Variables:
        client = server.client.params
        if cohort is not None:
            client = jax.tree.map(lambda x: x.mean(axis=0), cohort.client.params)
        return Variables(client, server.server.params, server.server.stats)

    def parameters(self, server: MocoState) -> Parameters:
        return Parameters(server.client.params, server.server.params)

    def sharded(self, server: MocoState) -> Tree:
        models = ServerState(True, True, True, stats=False, key_stats=False)
        once = cast(Any, False)
        return MocoState(models, client=once, queue=once, syncs=once, saving=once)

    def traffic(self, images: jax.ShapeDtypeStruct) -> tuple[Message, ...]:
        """Masks, one bit a row, are not counted."""
        return sizes.traffic(self, images)

    def sent(self, participant: Participant, images: jax.Array, key: jax.Array) -> jax.Array:
        """Query latents; key latents are those of the key encoder."""
        return client_side.latents(self.client, participant.client.params, images, key)

    def client_work(self, images: jax.ShapeDtypeStruct) -> ClientWork:
        return sizes.client_work(self, images)

    def working_set(self, images: jax.ShapeDtypeStruct, slots: int) -> Tree:
        return sizes.working_set(self, images, slots)


def _negatives(shared: Queue | None, private: Queue | None) -> jax.Array:
    """Negatives by group of the server's rows: (1, K, D) shared, or (C, K / N, D) private."""
    if shared is not None:
        return shared.keys[None]
    assert private is not None, "one of the two exists"
    return private.keys
