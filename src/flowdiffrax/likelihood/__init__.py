"""Densities under flow maps: traces, log-determinants, inversion and sampling."""

from ._delayed_acceptance import DelayedAcceptance as DelayedAcceptance
from ._delayed_acceptance import DelayedAcceptanceState as DelayedAcceptanceState
from ._importance import ImportanceWeights as ImportanceWeights
from ._importance import importance_weights as importance_weights
from ._inversion import Inversion as Inversion
from ._inversion import invert as invert
from ._likelihood import PullBack as PullBack
from ._likelihood import log_prob as log_prob
from ._likelihood import log_prob_errors as log_prob_errors
from ._likelihood import pull_back as pull_back
from ._likelihood import sample_log_prob as sample_log_prob
from ._log_density import LogDensityFlowMap as LogDensityFlowMap
from ._log_density import LogDensityNet as LogDensityNet
from ._log_density import LogDensityVelocity as LogDensityVelocity
from ._log_det import AbstractLogDet as AbstractLogDet
from ._log_det import DivergenceIntegral as DivergenceIntegral
from ._log_det import ExactJacobian as ExactJacobian
from ._log_det import LearnedLogDet as LearnedLogDet
from ._log_det import PowerSeries as PowerSeries
from ._log_det import log_det as log_det
from ._trace import AbstractTrace as AbstractTrace
from ._trace import ExactTrace as ExactTrace
from ._trace import Hutchinson as Hutchinson
from ._trace import HutchPlusPlus as HutchPlusPlus
from ._trace import divergence as divergence
