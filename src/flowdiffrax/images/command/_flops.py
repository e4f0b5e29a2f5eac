from typing import Any

import jax.tree_util as jtu
import numpy as np


def count_products(jaxpr: Any) -> int:
    """Floating-point operations of the matrix products and convolutions of a program.

    A loop of known length counts as often as it runs, unlike in the cost analysis of XLA,
    which counts its body once. Products with the zeros around an image count.
    """
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            inner = np.prod([shape[axis] for axis in contracted], dtype=int)
            total += 2 * equation.outvars[0].aval.size * int(inner)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            total += 2 * equation.outvars[0].aval.size * kernel.size // outputs
        times = params["length"] if name == "scan" else 1
        for value in jtu.tree_leaves(list(params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * count_products(inner)
    return total
