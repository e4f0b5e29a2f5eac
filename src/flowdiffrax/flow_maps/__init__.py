"""Flow maps X_{s,t}: the forms that are learned, the exact one, and compositions."""

from ._autonomous import AutonomousFlowMap as AutonomousFlowMap
from ._base import AbstractChordFlowMap as AbstractChordFlowMap
from ._base import AbstractFlowMap as AbstractFlowMap
from ._composed import ComposedFlowMap as ComposedFlowMap
from ._conserve_linear import ConserveLinear as ConserveLinear
from ._conserve_linear import find_linear_invariants as find_linear_invariants
from ._hypersolver import HypersolverFlowMap as HypersolverFlowMap
from ._inverse import InverseFlowMap as InverseFlowMap
from ._normalisation import Normalisation as Normalisation
from ._normalisation import NormalisedFlowMap as NormalisedFlowMap
from ._ode import ODEFlowMap as ODEFlowMap
from ._projected import ConserveInvariants as ConserveInvariants
from ._projected import ProjectedFlowMap as ProjectedFlowMap
from ._ravelled import RavelledFlowMap as RavelledFlowMap
from ._relaxation import RelaxationFlowMap as RelaxationFlowMap
from ._rescheduled import RescheduledFlowMap as RescheduledFlowMap
from ._residual import FlowMap as FlowMap
from ._stepper import StepperFlowMap as StepperFlowMap
