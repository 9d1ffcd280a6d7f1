"""How learning rates change over a run."""

import jax
import jax.numpy as jnp
import optax

SCHEDULES = ("cosine", "step", "constant")


def rate_schedule(name: str, total_steps: int, hold: int = 1) -> optax.Schedule:
    """Factor on all learning rates at each step.

    `cosine` falls to 0 over the run; `step` drops to 0.1 at 60 % and 0.01 at 80 %; `constant` is 1.

    Args: hold: steps for which the factor stays what it is at the first of them.
    """
    schedule = _of_each_step(name, total_steps)
    if hold == 1:
        return schedule

    def held(step: jax.Array) -> jax.Array:
        return schedule(step - jnp.fmod(step, hold))

    return held


def _of_each_step(name: str, total_steps: int) -> optax.Schedule:
    if name == "cosine":
        return optax.cosine_decay_schedule(1.0, total_steps)
    if name == "step":
        drops = {int(0.6 * total_steps): 0.1, int(0.8 * total_steps): 0.1}
        return optax.piecewise_constant_schedule(1.0, drops)
    return optax.constant_schedule(1.0)
