"""The paths that objectives evaluate: interpolants, splines, and trajectories."""

from ._base import AbstractInterpolant as AbstractInterpolant
from ._base import InterpolantPath as InterpolantPath
from ._coupling import AbstractCoupling as AbstractCoupling
from ._coupling import IndependentCoupling as IndependentCoupling
from ._interpolants import Interpolant as Interpolant
from ._interpolants import LinearInterpolant as LinearInterpolant
from ._interpolants import TrigonometricInterpolant as TrigonometricInterpolant
from ._interpolants import VarianceExplodingInterpolant as VarianceExplodingInterpolant
from ._interpolants import VariancePreservingInterpolant as VariancePreservingInterpolant
from ._latents import BrownianLatent as BrownianLatent
from ._latents import SineSquaredLatent as SineSquaredLatent
from ._optimal_transport import (
    ConditionalOptimalTransportCoupling as ConditionalOptimalTransportCoupling,
)
from ._optimal_transport import OptimalTransportCoupling as OptimalTransportCoupling
from ._plug_in import PlugInPath as PlugInPath
from ._snapshots import couple_snapshots as couple_snapshots
from ._splines import AbstractSpline as AbstractSpline
from ._splines import CubicSpline as CubicSpline
from ._splines import LinearSpline as LinearSpline
from ._splines import SplinePath as SplinePath
from ._trajectory import StatePath as StatePath
from ._trajectory import TrajectoryPath as TrajectoryPath
from ._trajectory import solve_trajectories as solve_trajectories
from ._trajectory import step_trajectories as step_trajectories
