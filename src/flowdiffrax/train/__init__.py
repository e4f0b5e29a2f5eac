"""One exported training step, a loop around it, the folder of a run, and recipes."""

from .._fingerprint import fingerprint as fingerprint
from ._checkpoint import load as load
from ._checkpoint import save as save
from ._fit import TrainingDiverged as TrainingDiverged
from ._fit import fit as fit
from ._parallel import DataParallel as DataParallel
from ._recipe import Recipe as Recipe
from ._recipe import decayed_radam as decayed_radam
from ._recipe import recipe as recipe
from ._recipe import recipes as recipes
from ._reports import LossByTimes as LossByTimes
from ._reports import SampleGrids as SampleGrids
from ._reports import TensorBoard as TensorBoard
from ._reports import WeightsAndBiases as WeightsAndBiases
from ._run import Run as Run
from ._step import StepInfo as StepInfo
from ._step import TrainState as TrainState
from ._step import make_step as make_step
from ._step import update as update
