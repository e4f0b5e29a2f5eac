"""Velocities from scores, noise predictors and denoisers, and guided velocities."""

from .._types import AugmentationArgs as AugmentationArgs
from .._types import GuidanceArgs as GuidanceArgs
from ._conversions import PredictedVelocity as PredictedVelocity
from ._conversions import Prediction as Prediction
from ._conversions import convert as convert
from ._guidance import ClassifierFreeGuidance as ClassifierFreeGuidance
from ._guidance import MeanFlowGuidance as MeanFlowGuidance
from ._guided import AutoguidedVelocity as AutoguidedVelocity
from ._guided import GuidedFlowMap as GuidedFlowMap
from ._guided import GuidedVelocity as GuidedVelocity
