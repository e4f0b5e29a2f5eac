"""Velocities from scores, noise predictors and denoisers, and guided velocities."""

from .._types import GuidanceArgs as GuidanceArgs
from ._conversions import VelocityFromDenoiser as VelocityFromDenoiser
from ._conversions import VelocityFromNoise as VelocityFromNoise
from ._conversions import VelocityFromScore as VelocityFromScore
from ._conversions import denoiser_from_velocity as denoiser_from_velocity
from ._conversions import noise_from_velocity as noise_from_velocity
from ._conversions import score_from_velocity as score_from_velocity
from ._conversions import velocity_from_denoiser as velocity_from_denoiser
from ._conversions import velocity_from_noise as velocity_from_noise
from ._conversions import velocity_from_score as velocity_from_score
from ._guidance import ClassifierFreeGuidance as ClassifierFreeGuidance
from ._guidance import MeanFlowGuidance as MeanFlowGuidance
from ._guided import AutoguidedVelocity as AutoguidedVelocity
from ._guided import GuidedFlowMap as GuidedFlowMap
from ._guided import GuidedVelocity as GuidedVelocity
