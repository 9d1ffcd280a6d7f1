"""Replays of the golden files on local training: losses of two views, FedEMA's merge."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mocosfl_jax.learning.siamese import byol, nt_xent, simsiam
from mocosfl_jax.methods.local.merge import FedEMA, convolutions, first_record, movement
from mocosfl_jax.methods.local.state import Model
from tests.golden_errors import Errors, Golden, relative
from tests.named_arrays import normal, parameter


def replay_losses(config: dict[str, Any], golden: Golden) -> Errors:
    shape = (config["batch"], config["width"])
    p1, p2, z1, z2 = (
        jnp.asarray(normal(f"losses{config['tag']}/{name}", shape))
        for name in ("p1", "p2", "z1", "z2")
    )
    rows, temperature = jnp.ones(len(p1), bool), config["simclr_temperature"]
    losses = {
        "byol": ("p1", lambda p1: byol((p1, p2), (z1, z2)).mean(), p1),
        "simsiam": ("p1", lambda p1: simsiam((p1, p2), (z1, z2)).mean(), p1),
        "simclr": ("z1", lambda z1: nt_xent((z1, z2), rows, temperature).mean(), z1),
    }
    errors = {}
    for name, (argument, loss, at) in losses.items():
        value, grad = jax.value_and_grad(loss)(at)
        errors[name] = relative(value, golden[name], 1e-4)
        wanted = golden[f"{name}_grad_{argument}"]
        errors[f"{name}_grad_{argument}"] = relative(grad, wanted, 1e-4)
    return errors


NOISE = {"start0": 0.0, "end0": 0.05, "global1": 0.03, "end1": 0.08, "global2": 0.04}


def replay_fedema(config: dict[str, Any], golden: Golden) -> Errors:
    """Rounds 0, 1 and 2 of a client that takes part in all of them."""

    def model(when: str) -> Model:
        params: dict[str, dict] = {"client": {}, "server": {}, "predictor": {}}
        for name, shape in config["shapes"].items():
            noise = normal(f"fedema{config['tag']}/{when}/{name}", tuple(shape), NOISE[when])
            part = "server" if name.startswith("enc/") else "predictor"
            params[part][name] = jnp.asarray(parameter(name, tuple(shape)) + noise)
        return Model(params, {})

    rule, record, start = FedEMA(tau=config["tau"]), first_record(), model("start0")
    errors: Errors = {}
    for round_ in (0, 1):
        end = model(f"end{round_}")
        moved = movement(convolutions(start.network), convolutions(end.network))
        record = rule.remember(record, jnp.int32(round_), moved)
        after = jnp.int32(round_ + 1)
        start = rule.start(model(f"global{round_ + 1}"), rule.kept(end), record, after)
        share = rule.own_share(record, after)
        errors[f"divergence{round_}"] = relative(moved, golden[f"divergence{round_}"], 1e-4)
        errors[f"mu{round_ + 1}"] = relative(share, golden[f"mu{round_ + 1}"], 1e-4)
        errors[f"scale{round_}"] = relative(record.scale, golden["scale"], 1e-4)
        found = start.params["server"] | start.params["predictor"]
        wanted = [name for name in golden if name.startswith(f"start{round_ + 1}:")]
        assert len(wanted) == len(found)
        for name in wanted:
            value = np.asarray(found[name.partition(":")[2]])
            errors[name] = relative(value, golden[name], 1e-4)
    return errors
