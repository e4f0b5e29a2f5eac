import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key


def checkerboard_boxes(
    squares: int = 4,
) -> tuple[Float[np.ndarray, "boxes 2"], Float[np.ndarray, "boxes 2"]]:
    """Returns the lower and upper corners of the filled squares of a checkerboard.

    The board covers [-1, 1]^2.

    **Arguments:**

    - `squares`: the number of squares per side. Square `(i, j)` is filled if `i + j` is
      even.
    """
    side = 2 / squares
    filled = [(i, j) for i in range(squares) for j in range(squares) if (i + j) % 2 == 0]
    lower = -1 + side * np.asarray(filled, float)
    return lower, lower + side


def checkerboard(
    key: Key[Array, ""], num_points: int, squares: int = 4
) -> Float[Array, "num_points 2"]:
    """Draws points uniformly from the filled squares of the checkerboard.

    **Arguments:**

    - `key`: a random key.
    - `num_points`: the number of points.
    - `squares`: as for [`flowdiffrax.data.checkerboard_boxes`][].
    """
    box_key, point_key = jr.split(key)
    lower, upper = map(jnp.asarray, checkerboard_boxes(squares))
    box = jr.randint(box_key, (num_points,), 0, lower.shape[0])
    offset = jr.uniform(point_key, (num_points, 2))
    lower, upper = lower.astype(offset.dtype)[box], upper.astype(offset.dtype)[box]
    return lower + (upper - lower) * offset


def checkerboard_density(x: Float[np.ndarray, "*batch 2"], squares: int = 4):
    """The density of the checkerboard at points `x`: 1/2 on filled squares, 0 elsewhere.

    **Arguments:**

    - `x`: points of any batch shape.
    - `squares`: as for [`flowdiffrax.data.checkerboard_boxes`][].
    """
    lower, upper = checkerboard_boxes(squares)
    inside = np.all((x[..., None, :] >= lower) & (x[..., None, :] < upper), axis=-1)
    return inside.any(axis=-1) / np.prod(upper - lower, axis=-1).sum()
