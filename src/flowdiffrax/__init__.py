"""Flow maps of ODEs as Equinox modules, and as learned solvers for Diffrax."""

import importlib.metadata

from . import data as data
from . import exact as exact
from . import metrics as metrics
from . import nn as nn
from . import plot as plot
from . import train as train
from ._coupling import AbstractCoupling as AbstractCoupling
from ._coupling import IndependentCoupling as IndependentCoupling
from ._estimate import AbstractErrorEstimate as AbstractErrorEstimate
from ._estimate import LagrangianDefect as LagrangianDefect
from ._estimate import SemigroupDefect as SemigroupDefect
from ._flow_map import AbstractFlowMap as AbstractFlowMap
from ._flow_map import ComposedFlowMap as ComposedFlowMap
from ._flow_map import FlowMap as FlowMap
from ._flow_map import InverseFlowMap as InverseFlowMap
from ._flow_map import ODEFlowMap as ODEFlowMap
from ._flow_map import RescheduledFlowMap as RescheduledFlowMap
from ._identities import eulerian_residual as eulerian_residual
from ._identities import inverse_residual as inverse_residual
from ._identities import lagrangian_residual as lagrangian_residual
from ._identities import semigroup_residual as semigroup_residual
from ._identities import tangent_residual as tangent_residual
from ._interpolant import AbstractInterpolant as AbstractInterpolant
from ._interpolant import BrownianLatent as BrownianLatent
from ._interpolant import Interpolant as Interpolant
from ._interpolant import InterpolantPath as InterpolantPath
from ._interpolant import LinearInterpolant as LinearInterpolant
from ._interpolant import SineSquaredLatent as SineSquaredLatent
from ._interpolant import TrigonometricInterpolant as TrigonometricInterpolant
from ._interpolant import VarianceExplodingInterpolant as VarianceExplodingInterpolant
from ._interpolant import (
    VariancePreservingInterpolant as VariancePreservingInterpolant,
)
from ._objective import AbstractObjective as AbstractObjective
from ._objective import AbstractWeight as AbstractWeight
from ._objective import DataEndWeight as DataEndWeight
from ._objective import FlowMatching as FlowMatching
from ._objective import InverseGap as InverseGap
from ._objective import LagrangianMapDistillation as LagrangianMapDistillation
from ._objective import Mixture as Mixture
from ._objective import NoWeight as NoWeight
from ._objective import ProgressiveFlowMapMatching as ProgressiveFlowMapMatching
from ._objective import TrajectoryMatching as TrajectoryMatching
from ._objective import VelocityDistillation as VelocityDistillation
from ._objective import batch_loss as batch_loss
from ._sample import sample as sample
from ._solver import AdaptiveFlowMapSolver as AdaptiveFlowMapSolver
from ._solver import FlowMapSolver as FlowMapSolver
from ._teacher import VelocityFromDenoiser as VelocityFromDenoiser
from ._teacher import VelocityFromNoise as VelocityFromNoise
from ._teacher import VelocityFromScore as VelocityFromScore
from ._teacher import denoiser_from_velocity as denoiser_from_velocity
from ._teacher import noise_from_velocity as noise_from_velocity
from ._teacher import score_from_velocity as score_from_velocity
from ._teacher import velocity_from_denoiser as velocity_from_denoiser
from ._teacher import velocity_from_noise as velocity_from_noise
from ._teacher import velocity_from_score as velocity_from_score
from ._times import AbstractTimes as AbstractTimes
from ._times import Diagonal as Diagonal
from ._times import DiagonalMixture as DiagonalMixture
from ._times import Dyadic as Dyadic
from ._times import EndAt as EndAt
from ._times import GridTimes as GridTimes
from ._times import LogitNormal as LogitNormal
from ._times import MixedTimes as MixedTimes
from ._times import OnInterval as OnInterval
from ._times import StartAt as StartAt
from ._times import Stratified as Stratified
from ._times import UniformSquare as UniformSquare
from ._times import UniformTriangle as UniformTriangle
from ._trajectory import TrajectoryPath as TrajectoryPath
from ._trajectory import solve_trajectories as solve_trajectories

__version__ = importlib.metadata.version("flowdiffrax")
