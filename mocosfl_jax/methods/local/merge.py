"""What a client starts a round with, from the average and from what it kept; a table.

Functions of one client. FedU: Zhuang et al. 2021 (ICCV). FedEMA: Zhuang et al. 2022 (ICLR).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mocosfl_jax.methods.local.state import NEVER, Model, Record
from mocosfl_jax.models.split import Params


def first_record() -> Record:
    """Of a client before its first round."""
    return Record(jnp.int32(NEVER), jnp.float32(0), jnp.float32(0))


def convolutions(params: Params) -> list[jax.Array]:
    """Kernels of an encoder's convolutions, without those of shortcuts: what divergence is measured
    on (EasyFL, the code of both papers)."""
    leaves = jax.tree.leaves_with_path(params)
    return [x for path, x in leaves if x.ndim == 4 and "shortcut" not in jax.tree_util.keystr(path)]


def movement(start: list[jax.Array], end: list[jax.Array]) -> jax.Array:
    """How far a client moved in a round, the divergence of FedU and FedEMA: mean over arrays of the
    L2 norm of their change, () float32."""
    norms = [jnp.linalg.norm((a - b).ravel()) for a, b in zip(start, end, strict=True)]
    return jnp.stack(norms).mean()


def choose(condition: jax.Array, if_true: Any, if_false: Any) -> Any:
    """One of two trees of the same form. condition: () bool."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), if_true, if_false)


@dataclass(frozen=True)
class Average:
    """The average, and nothing of the client's own (FedAvg, McMahan et al. 2017).

    measures: whether a client measures how far it moves in a round. predictor: whether the
    objective must have one.
    """

    measures: ClassVar[bool] = False
    predictor: ClassVar[bool] = False

    def kept(self, model: Model) -> Any:
        """The parts of a client's model at the end of a round that its next start depends on."""
        return None

    def start(self, average: Model, kept: Any, record: Record | None, round_: jax.Array) -> Model:
        """The model at the start of a round.

        Args: kept: see above. record: of the client. round_: () int32, index of the round.
        """
        return average

    def restarts(self, record: Record, round_: jax.Array) -> jax.Array:
        """Whether the client's target network starts as the average, () bool."""
        return record.round == NEVER

    def remember(self, record: Record, round_: jax.Array, moved: jax.Array) -> Record:
        """The record after a round. moved: its divergence; 0 unless the rule measures it."""
        return record._replace(round=round_, divergence=moved)


@dataclass(frozen=True)
class FedU(Average):
    """The average, but for the predictor of a client that moved far in its last round.

    threshold: divergence from which on a client goes on with its own predictor.
    """

    threshold: float

    measures: ClassVar[bool] = True
    predictor: ClassVar[bool] = True

    def kept(self, model: Model) -> Model:
        return Model(*({"predictor": tree["predictor"]} for tree in (model.params, model.stats)))

    def start(self, average: Model, kept: Model, record: Record | None, round_: jax.Array) -> Model:
        assert record is not None, "the rule measures"
        own = (record.round != NEVER) & (record.divergence >= self.threshold)
        return Model(
            average.params | choose(own, kept.params, self.kept(average).params),
            average.stats | choose(own, kept.stats, self.kept(average).stats),
        )


@dataclass(frozen=True)
class FedEMA(Average):
    """A mean of the client's own model and the average: the farther it moved in its last round, the
    more of its own. The plain average where it did not take part in the round before. The paper
    applies it to BYOL; here it goes with any objective.

    tau: share of its own model in a client's second round, in [0, 1].
    """

    tau: float

    measures: ClassVar[bool] = True

    def kept(self, model: Model) -> Model:
        return model

    def own_share(self, record: Record, round_: jax.Array) -> jax.Array:
        """mu of the paper's equation 3, () float32."""
        mu = jnp.minimum(1.0, record.scale * record.divergence)
        return jnp.where(self.restarts(record, round_), 0.0, mu)

    def start(self, average: Model, kept: Model, record: Record | None, round_: jax.Array) -> Model:
        assert record is not None, "the rule measures"
        mu = self.own_share(record, round_)
        return jax.tree.map(lambda own, mean: mu * own + (1 - mu) * mean, kept, average)

    def restarts(self, record: Record, round_: jax.Array) -> jax.Array:
        return (record.round == NEVER) | (record.round != round_ - 1)

    def remember(self, record: Record, round_: jax.Array, moved: jax.Array) -> Record:
        """lambda is set in the client's first round."""
        # A client that did not move at all is the average whatever mu is.
        scale = self.tau / jnp.maximum(moved, 1e-12)
        return Record(round_, moved, jnp.where(record.round == NEVER, scale, record.scale))


MERGES: dict[str, type[Average]] = {"average": Average, "fedu": FedU, "fedema": FedEMA}
