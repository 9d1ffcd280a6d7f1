"""From a config to its network."""

from mocosfl_jax.config.fields import Config
from mocosfl_jax.models.bottleneck import parse_bottleneck
from mocosfl_jax.models.contract import Network
from mocosfl_jax.models.split import SplitModel, build_model


def network_of(config: Config) -> Network:
    """The backbone's description; `blocks_per_stage` and `stem` may be unset."""
    return Network(
        backbone=config.backbone,
        width=config.width,
        blocks_per_stage=config.blocks_per_stage,
        stem=config.stem,
        compute_dtype=config.compute_dtype,
    )


def model_of(config: Config, row_axes: tuple[str, ...] = ()) -> SplitModel:
    """The split network; equal configs give equal models.

    Args:
      config: the fields of the network are filled, and passed `check_fields`.
      row_axes: mesh axes over which server rows are spread, none without a mesh.
    """
    return build_model(
        network_of(config),
        cut=config.cut,
        bottleneck=parse_bottleneck(config.bottleneck),
        head=config.head,
        head_width=config.head_width,
        image_size=config.image_size,
        row_axes=row_axes,
    )
