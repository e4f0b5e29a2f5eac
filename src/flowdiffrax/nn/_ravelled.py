from collections.abc import Callable
from typing import ClassVar

import equinox as eqx

from .._check import check_callable, check_like
from .._tree import ravel
from .._types import Args, State, Time


class Ravelled(eqx.Module):
    """Wraps a network on vectors, so that it takes a state of any PyTree structure.

    All entries of the state are flattened into one vector, in the order of
    `jax.tree_util`, and the network's output is unflattened into a state. `args`, if
    given, is flattened in the same way, and cast to the precision of the state. It may
    consist of numbers, arrays, or a dictionary of parameters.

    **Arguments:**

    - `net`: a callable `net(s, t, vector, args_vector) -> vector`, such as
      [`flowdiffrax.nn.MLP`][]. If `args` is `None`, `args_vector` is `None`.

    **Raises:** `TypeError` if `net` is not callable. When called, `TypeError` for complex
    entries, and `ValueError` or `TypeError` if the output of `net` does not match its
    input vector.
    """

    is_network: ClassVar[bool] = True

    net: Callable

    def __check_init__(self):
        check_callable(self.net, "net", "net(s, t, vector, args_vector)")

    def __call__(self, s: Time, t: Time, x: State, args: Args = None) -> State:
        vector, unravel = ravel(x, "`Ravelled`")
        if args is not None:
            args = ravel(args, "`Ravelled`")[0].astype(vector.dtype)
        return unravel(check_like(self.net(s, t, vector, args), vector, "`Ravelled.net`"))
