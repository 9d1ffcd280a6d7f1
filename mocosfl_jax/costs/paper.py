"""Costs as Table 1 of the MocoSFL paper (Li et al., ICLR 2023) and its public code count them.

A multiply-add is one operation, an element of a norm is five, and nothing else counts. An image
takes three forward passes of one view in training, one where clients are frozen. Of what travels,
key latents are left out, and so are weights on their way down. MB is 2^20 bytes, G is 2^30.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from mocosfl_jax.costs.communication import Sent, total
from mocosfl_jax.costs.flops import flops_of
from mocosfl_jax.federated.contract import Work
from mocosfl_jax.models.norms import MaskedBatchNorm
from mocosfl_jax.models.units import DEPTHWISE_SIZE, GROUP_NORMS, StandardizedDepthwiseConv

MB, G = 2**20, 2**30
A_NORM = 5
"""Operations for an element."""


@dataclass(frozen=True)
class PaperCosts:
    """Of a client in the whole run.

    flops_an_image: of one forward pass. flops: of all. latents: bytes, gradients of latents
    included. weights: bytes.
    """

    flops_an_image: float
    flops: float
    latents: float
    weights: float


def paper_costs(infer: Work, messages: Iterable[Sent], images: float) -> PaperCosts:
    """Args: infer: of one image. images: that the client trains on in the run, repeats counted."""
    messages = tuple(messages)
    weights = total(messages, "weights", up=True)
    layers = _layers_of(infer)
    forward = flops_of(infer).products + layers.depthwise_products + A_NORM * layers.norm_elements
    latents = total(messages, "latents", up=True) / 2 + total(messages, "gradients", up=False)
    passes = 3 if weights else 1  # frozen clients send no weights
    return PaperCosts(forward, passes * forward * images, latents, weights)


class _Layers(NamedTuple):
    """norm_elements: that the network's norms give. depthwise_products: multiply-adds of depthwise
    convolutions, which are elementwise products to JAX (`models/depthwise.py`)."""

    norm_elements: int
    depthwise_products: int


def _layers_of(work: Work) -> _Layers:
    norm_elements = depthwise_products = 0

    def count(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        nonlocal norm_elements, depthwise_products
        output, module = call(*args, **kwargs), context.module
        if context.method_name != "__call__":
            return output
        if isinstance(module, (*GROUP_NORMS, MaskedBatchNorm)):
            norm_elements += output.size
        if isinstance(module, StandardizedDepthwiseConv):
            depthwise_products += output.size * DEPTHWISE_SIZE**2
        return output

    with nn.intercept_methods(count):  # a function of its own: traces of the same one are cached
        jax.eval_shape(lambda *arguments: work.function(*arguments), *work.arguments)
    return _Layers(norm_elements, depthwise_products)
