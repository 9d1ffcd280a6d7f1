"""The network of the golden files, and variables that are functions of their names."""

from typing import Any

import jax
import jax.numpy as jnp

from mocosfl_jax.models.bottleneck import parse_bottleneck
from mocosfl_jax.models.contract import Network
from mocosfl_jax.models.split import Params, SplitModel, build_model
from tests.named_arrays import parameter

IMAGE_SIZE = 32


def golden_network(backbone: str) -> Network:
    """At the published width, whatever the defaults of the package are."""
    if backbone == "resnet18":
        return Network(backbone, 64, (2, 2, 2, 2), "3x3s1")
    return Network(backbone, 32 if backbone == "mobilenetv2" else 64)


def golden_model(config: dict[str, Any]) -> SplitModel:
    return build_model(
        golden_network(config.get("backbone", "resnet18")),
        cut=config["cut"],
        bottleneck=parse_bottleneck(config["bottleneck"]),
        head="V2",
        head_width=config["head_width"],
        image_size=IMAGE_SIZE,
    )


def named_variables(model: SplitModel) -> tuple[Params, Params, Params]:
    """The model's variables, every parameter drawn from its golden name."""
    client, server, stats = jax.eval_shape(model.init, jax.random.key(0))

    def named(side: str, tree: Params) -> Params:
        def leaf(path: tuple, x: jax.ShapeDtypeStruct) -> jax.Array:
            name = "/".join(key.key for key in path)
            return jnp.asarray(
                parameter(name.replace("bottleneck/", f"bottleneck/{side}/"), x.shape)
            )

        return jax.tree_util.tree_map_with_path(leaf, tree)

    return named("client", client), named("server", server), stats


def count(tree: Params) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))
