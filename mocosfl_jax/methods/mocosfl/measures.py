"""What MocoSFL measures of a step on request, as metrics of the steps with a sync."""

import jax
import jax.numpy as jnp

from mocosfl_jax.federated.contract import Batch, Metric, Metrics
from mocosfl_jax.learning.hardness import similarity_by_age
from mocosfl_jax.learning.queue import Queue
from mocosfl_jax.methods.mocosfl.server import ServerSide


def similarity_metrics(
    side: ServerSide, queries_GD: jax.Array, queue: Queue, batch: Batch
) -> Metrics:
    """Mean similarity of a query and a key by the age of the key: `similarity_age_1` and so on.

    Args:
      queries_GD: sums of the step's queries, G groups in slot order.
      queue: that the queries met. Private ones have the leading axis C; then G = C.
    """
    rows = batch.mask.sum(axis=1, dtype=jnp.float32) * side.loss.keys  # as many queries as keys
    if queue.ptr.ndim == 0:  # one queue, which the rows of all chunks met
        queue = jax.tree.map(lambda x: x[None], queue)
        queries_GD, rows = (x.sum(axis=0, keepdims=True) for x in (queries_GD, rows))
    total_A, pairs_A = similarity_by_age(queries_GD, rows, queue, side.ages)
    pairs_A = jnp.where(batch.sync, pairs_A, 0.0)
    return {f"similarity_age_{i + 1}": Metric(total_A[i], pairs_A[i]) for i in range(side.ages)}


def divergence_metric(divergence_C: jax.Array, batch: Batch) -> Metrics:
    """`divergence`, the mean over participants, not weighted. divergence_C: of each client."""
    counts_C = (batch.sync & (batch.weight > 0)).astype(jnp.float32)
    return {"divergence": Metric(jnp.sum(divergence_C * counts_C), counts_C.sum())}
