from .base import AbstractFlowMap as AbstractFlowMap
from .ode import ODEFlowMap as ODEFlowMap
from .residual import FlowMap as FlowMap
from .wrappers import ComposedFlowMap as ComposedFlowMap
from .wrappers import InverseFlowMap as InverseFlowMap
from .wrappers import RescheduledFlowMap as RescheduledFlowMap
