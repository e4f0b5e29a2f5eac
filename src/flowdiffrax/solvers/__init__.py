"""Flow maps as Diffrax solvers, and faster functions for sampling and batches."""

from ._adaptive import AdaptiveFlowMapSolver as AdaptiveFlowMapSolver
from ._dense import FlowMapInterpolation as FlowMapInterpolation
from ._event import EventSolver as EventSolver
from ._fixed import FlowMapSolver as FlowMapSolver
from ._hybrid import HybridSolver as HybridSolver
from ._hybrid import HybridState as HybridState
from ._parareal import PararealSolution as PararealSolution
from ._parareal import parareal as parareal
from ._sample import roll_out as roll_out
from ._sample import sample as sample
from ._sample import sample_with_restarts as sample_with_restarts
from ._solve_batch import BatchSolution as BatchSolution
from ._solve_batch import solve_batch as solve_batch
from ._tilted import TiltedSamples as TiltedSamples
from ._tilted import sample_tilted as sample_tilted
