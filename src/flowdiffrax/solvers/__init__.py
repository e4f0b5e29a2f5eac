"""Flow maps as solvers of Diffrax, and the fast path beside them."""

from ._adaptive import AdaptiveFlowMapSolver as AdaptiveFlowMapSolver
from ._dense import FlowMapInterpolation as FlowMapInterpolation
from ._fixed import FlowMapSolver as FlowMapSolver
from ._hybrid import HybridSolver as HybridSolver
from ._hybrid import HybridState as HybridState
from ._sample import sample as sample
from ._sample import sample_with_restarts as sample_with_restarts
from ._vmap_sorted import vmap_sorted as vmap_sorted
