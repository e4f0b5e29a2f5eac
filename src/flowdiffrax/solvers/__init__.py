"""Flow maps as Diffrax solvers, and faster functions for sampling and batches."""

from ._adaptive import AdaptiveFlowMapSolver as AdaptiveFlowMapSolver
from ._dense import FlowMapInterpolation as FlowMapInterpolation
from ._fixed import FlowMapSolver as FlowMapSolver
from ._hybrid import HybridSolver as HybridSolver
from ._hybrid import HybridState as HybridState
from ._sample import sample as sample
from ._sample import sample_with_restarts as sample_with_restarts
from ._vmap_sorted import vmap_sorted as vmap_sorted
