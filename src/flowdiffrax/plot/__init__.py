"""Plots of densities, trajectories and work-precision curves, and a page on a map.

Matplotlib is installed with the `plot` extra. All functions but `report` draw into axes
that are passed to them.
"""

from ._panels import calibration as calibration
from ._panels import density as density
from ._panels import trajectories as trajectories
from ._panels import work_precision as work_precision
from ._report import MapReport as MapReport
from ._report import report as report
