"""Batches of paths, and toy data sets."""

from ._batches import ConditionedPoints as ConditionedPoints
from ._batches import GaussianBase as GaussianBase
from ._batches import InterpolantBatches as InterpolantBatches
from ._batches import StateBatches as StateBatches
from ._batches import TrajectoryBatches as TrajectoryBatches
from ._batches import finite_rows as finite_rows
from ._conditions import ConditionDropout as ConditionDropout
from ._conditions import PowerLawScale as PowerLawScale
from ._disk import StoredTrajectories as StoredTrajectories
from ._disk import load_trajectories as load_trajectories
from ._disk import store_trajectories as store_trajectories
from ._splines import SplineBatches as SplineBatches
from ._stream import StreamBatches as StreamBatches
from ._stream import stream as stream
from ._toy import checkerboard as checkerboard
from ._toy import checkerboard_boxes as checkerboard_boxes
from ._toy import checkerboard_density as checkerboard_density
