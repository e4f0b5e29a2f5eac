"""From a vector field to a validated learned solver, in one call."""

from ._advise import Advice as Advice
from ._advise import NetworkCost as NetworkCost
from ._advise import advise as advise
from ._costs import Cost as Cost
from ._costs import Solve as Solve
from ._export import export_jump as export_jump
from ._learn_from_data import learn_from_data as learn_from_data
from ._learn_posterior import learn_posterior as learn_posterior
from ._learn_solver import learn_solver as learn_solver
from ._learned import LearnedSolver as LearnedSolver
from ._plan import Plan as Plan
from ._posterior import LearnedPosterior as LearnedPosterior
from ._posterior import PosteriorNetwork as PosteriorNetwork
from ._posterior_units import PosteriorUnits as PosteriorUnits
from ._robust import RobustDifference as RobustDifference
from ._validation import JumpErrors as JumpErrors
