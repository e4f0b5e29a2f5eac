"""Data sets and batches."""

from ._batches import GaussianBase as GaussianBase
from ._batches import InterpolantBatches as InterpolantBatches
from ._batches import StateBatches as StateBatches
from ._batches import TrajectoryBatches as TrajectoryBatches
from ._conditions import ConditionDropout as ConditionDropout
from ._conditions import PowerLawScale as PowerLawScale
from ._toy import checkerboard as checkerboard
from ._toy import checkerboard_boxes as checkerboard_boxes
from ._toy import checkerboard_density as checkerboard_density
