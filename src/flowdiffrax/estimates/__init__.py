"""Estimates of the error of a jump, without the true solution."""

from ._alekseev_groebner import AlekseevGroebner as AlekseevGroebner
from ._base import AbstractErrorEstimate as AbstractErrorEstimate
from ._bounds import lagrangian_bound as lagrangian_bound
from ._bounds import logarithmic_norm as logarithmic_norm
from ._corrected import DefectCorrectedFlowMap as DefectCorrectedFlowMap
from ._defects import LagrangianDefect as LagrangianDefect
from ._defects import SemigroupDefect as SemigroupDefect
from ._eulerian import eulerian_error as eulerian_error
from ._krylov import Krylov as Krylov
from ._linearised import LinearisedError as LinearisedError
from ._picard import PicardDefect as PicardDefect
