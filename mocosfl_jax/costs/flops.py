"""Floating-point operations of a function, counted in its jaxpr."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mocosfl_jax.federated.contract import Work

ELEMENTWISE = frozenset(
    {
        *("abs", "add", "add_any", "div", "integer_pow", "max", "min", "mul", "neg", "pow", "rem"),
        *("cos", "erf", "erf_inv", "exp", "exp2", "expm1", "log", "log1p", "logistic", "round"),
        *("rsqrt", "sign", "sin", "sqrt", "square", "sub", "tan", "tanh"),
    }
)
"""Primitives that count one operation for each element that they give."""

REDUCTIONS = frozenset({"argmax", "argmin", "cumsum", "reduce_max", "reduce_min", "reduce_sum"})
"""Primitives that count one operation for each element that they take."""

WINOGRAD = frozenset({"convolve_group", "kernel_gradient"})
"""Programs of `models.winograd`, that make a convolution of fewer products than its definition has.
Counted is the definition, as on any machine."""


@dataclass(frozen=True)
class Flops:
    """products: multiply-adds of convolutions and matrix products. others: operations on floats in
    everything else, such as norms, activations and updates; comparing and moving count nothing."""

    products: int = 0
    others: int = 0

    @property
    def total(self) -> int:
        """A multiply-add is two operations."""
        return 2 * self.products + self.others

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.products + other.products, self.others + other.others)

    def __mul__(self, times: int) -> "Flops":
        return Flops(times * self.products, times * self.others)


def flops_of(work: Work) -> Flops:
    """Of one call; it is traced, not compiled."""
    return _of_jaxpr(jax.make_jaxpr(work.function)(*work.arguments).jaxpr)


def _of_jaxpr(jaxpr: Any) -> Flops:
    """Of what the outputs depend on; a compiler leaves out the rest, e.g. gradients of images."""
    total, needed = Flops(), {id(variable) for variable in jaxpr.outvars}
    for equation in reversed(jaxpr.eqns):
        if needed.intersection(map(id, equation.outvars)):
            total += _of_equation(equation)
            needed.update(map(id, equation.invars))
    return total


def _of_equation(equation: Any) -> Flops:
    name, inner = equation.primitive.name, _inner(equation.params)
    if name == "conv_general_dilated":
        return Flops(products=_products_of_convolution(equation))
    if name == "dot_general":
        return Flops(products=_products_of_dot(equation))
    if equation.params.get("name") in WINOGRAD:
        return Flops(products=_products_of_winograd(equation))
    if name == "cond":  # what is not known is taken to be the worst
        return max((_of_jaxpr(branch) for branch in inner), key=lambda flops: flops.total)
    if inner:
        times = equation.params["length"] if name == "scan" else 1
        return sum((_of_jaxpr(jaxpr) for jaxpr in inner), Flops()) * times
    if name in ELEMENTWISE and _is_float(equation.outvars[0]):
        return Flops(others=_size(equation.outvars[0]))
    if name in REDUCTIONS and _is_float(equation.invars[0]):
        return Flops(others=_size(equation.invars[0]))
    return Flops()


def _inner(params: dict[str, Any]) -> list[Any]:
    """The jaxprs among an equation's parameters."""
    leaves = jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, "eqns"))
    found = [getattr(leaf, "jaxpr", leaf) for leaf in leaves]
    return [jaxpr for jaxpr in found if hasattr(jaxpr, "eqns")]


def _products_of_convolution(equation: Any) -> int:
    """Each pixel of the output meets each weight; of a transposed convolution, each pixel of the
    input, since the zeros between them need no product. Padding counts like pixels."""
    image, kernel = (x.aval.shape for x in equation.invars)
    output = equation.outvars[0].aval.shape
    image_spec, kernel_spec, output_spec = equation.params["dimension_numbers"]
    weights = math.prod(kernel) // kernel[kernel_spec[0]]  # of one output channel
    if max(equation.params["lhs_dilation"], default=1) == 1:
        return math.prod(output) * weights
    pixels = math.prod(image[axis] for axis in image_spec[2:])
    return output[output_spec[0]] * output[output_spec[1]] * pixels * weights


def _products_of_winograd(equation: Any) -> int:
    """Of a 3x3 convolution with stride 1: each pixel, with each input, weight and output."""
    images, other = (x.aval.shape for x in equation.invars)  # other: the kernel, or a gradient
    return math.prod(images) * 9 * other[-1]


def _products_of_dot(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return _size(equation.outvars[0]) * math.prod(left[axis] for axis in contracted)


def _size(variable: Any) -> int:
    return math.prod(variable.aval.shape)


def _is_float(variable: Any) -> bool:
    return bool(jnp.issubdtype(variable.aval.dtype, jnp.floating))
