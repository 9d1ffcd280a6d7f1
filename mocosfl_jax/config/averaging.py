"""How much of its own model a client keeps at a sync; nothing by default."""

from dataclasses import dataclass
from typing import Annotated

from mocosfl_jax.config.ranges import FROM_0_BELOW_1


@dataclass(frozen=True)
class Averaging:
    """The fields `config.averaging.NAME`."""

    # Divergence-aware averaging (Zhuang et al. 2022; there 0.7): the share of its own model that a
    # client keeps at its first sync, in [0, 1). At later ones the share is larger the more its
    # model diverges. It takes persistent clients. 0: off, all take the average.
    tau: Annotated[float, FROM_0_BELOW_1] = 0.0
