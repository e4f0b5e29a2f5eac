"""Weights for the squared error of an objective."""

from ._base import AbstractWeight as AbstractWeight
from ._base import NoWeight as NoWeight
from ._base import WeightChain as WeightChain
from ._gaps import BandWeight as BandWeight
from ._gaps import DataEndWeight as DataEndWeight
from ._gaps import InverseGap as InverseGap
from ._gaps import InverseNoiseGap as InverseNoiseGap
from ._learned import AbstractLearnedWeight as AbstractLearnedWeight
from ._learned import LearnedWeight as LearnedWeight
from ._norms import NormalisedTangent as NormalisedTangent
from ._norms import PowerWeight as PowerWeight
from ._norms import PseudoHuber as PseudoHuber
