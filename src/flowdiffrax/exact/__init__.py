"""Closed-form flow maps and velocities: references for tests, docs and benchmarks."""

from ._boxes import UniformBoxesVelocity as UniformBoxesVelocity
from ._boxes import checkerboard_velocity as checkerboard_velocity
from ._gaussian import GaussianFlowMap as GaussianFlowMap
from ._gaussian import GaussianMixtureVelocity as GaussianMixtureVelocity
from ._linear import LinearFlowMap as LinearFlowMap
