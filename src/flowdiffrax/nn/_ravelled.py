from collections.abc import Callable
from typing import ClassVar

import equinox as eqx

from .._check import check_callable, check_like
from .._tree import ravel
from .._types import Args, State, Time


class Ravelled(eqx.Module):
    """A network on vectors that serves a state of any structure.

    All entries of the state become one vector, in the order of `jax.tree_util`, and the
    network's vector becomes a state again. So do `args`, if there are any: numbers,
    arrays, a dictionary of parameters; the network sees them in the precision of the
    state.

    **Arguments:**

    - `net`: a callable `net(s, t, vector, args_vector) -> vector`, such as
      [`flowdiffrax.nn.MLP`][]. Without `args` it gets `None`.

    **Raises:** `TypeError` if it cannot be called; when called, `TypeError` for complex
    entries, and `ValueError` or `TypeError` for an output unlike the vector.
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
