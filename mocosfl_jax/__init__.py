"""MocoSFL in JAX: split-federated self-supervised learning (Li et al., ICLR 2023)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mocosfl_jax.encoder import Encoder, load_encoder

__version__ = "0.1.0"
__all__ = ["Encoder", "load_encoder"]


def __getattr__(name: str) -> Any:
    """Loads the public names when they are used, so that importing one piece stays light."""
    if name in __all__:
        from mocosfl_jax import encoder

        return getattr(encoder, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
