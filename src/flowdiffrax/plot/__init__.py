"""Plots of densities, trajectories, and work-precision curves.

Matplotlib is installed with the `plot` extra. The functions draw into axes that are
passed to them.
"""

from ._panels import calibration as calibration
from ._panels import density as density
from ._panels import trajectories as trajectories
from ._panels import work_precision as work_precision
