"""From a config to its network."""

from mocosfl_jax.config.defences import release_of
from mocosfl_jax.config.fields import Config
from mocosfl_jax.models.backbones import default_width, latent_shape
from mocosfl_jax.models.bottleneck import parse_bottleneck
from mocosfl_jax.models.contract import Network
from mocosfl_jax.models.split import SplitModel, build_model


def network_of(config: Config) -> Network:
    """The backbone's description; `width`, `blocks_per_stage` and `stem` may be unset."""
    width = default_width(config.backbone) if config.width is None else config.width
    return Network(
        backbone=config.backbone,
        width=width,
        blocks_per_stage=config.blocks_per_stage,
        stem=config.stem,
        compute_dtype=config.compute_dtype,
    )


def model_of(config: Config, row_axes: tuple[str, ...] = ()) -> SplitModel:
    """The split network; equal configs give equal models.

    What clients do to their latents is part of it, but for what is random.

    Args:
      config: the fields of the network are filled, and passed `check_fields`.
      row_axes: mesh axes over which server rows are spread, none without a mesh.
    """
    release = release_of(config)
    return build_model(
        network_of(config),
        cut=config.cut,
        bottleneck=parse_bottleneck(config.bottleneck),
        head=config.head,
        head_width=config.head_width,
        image_size=config.image_size,
        row_axes=row_axes,
        release=release.deterministic() if release else None,
    )


def sent_shape(config: Config) -> tuple[int, int, int]:
    """Height, width and channels of the latents that a client sends.

    Args: config: as above.
    """
    height, width, channels = latent_shape(network_of(config), config.image_size, config.cut)
    shape = parse_bottleneck(config.bottleneck)
    if shape is None:
        return height, width, channels
    return -(-height // shape.stride), -(-width // shape.stride), shape.channels
