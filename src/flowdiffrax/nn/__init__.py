"""Networks of two times and a state, `net(s, t, x, args)`."""

from ._mlp import MLP as MLP
from ._ravelled import Ravelled as Ravelled
