"""Pictures of densities, trajectories, and work against precision.

Matplotlib comes with the `plot` extra; the functions draw into axes of the caller's.
"""

from ._panels import density as density
from ._panels import trajectories as trajectories
from ._panels import work_precision as work_precision
