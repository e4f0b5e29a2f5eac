"""Data sets and batches."""

from ._batches import GaussianBase as GaussianBase
from ._batches import InterpolantBatches as InterpolantBatches
from ._batches import TrajectoryBatches as TrajectoryBatches
from ._toy import checkerboard as checkerboard
from ._toy import checkerboard_boxes as checkerboard_boxes
from ._toy import checkerboard_density as checkerboard_density
