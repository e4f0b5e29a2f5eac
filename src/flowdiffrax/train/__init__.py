"""One exported training step, a short loop around it, and checkpoints."""

from ._checkpoint import load as load
from ._checkpoint import save as save
from ._fit import TrainingDiverged as TrainingDiverged
from ._fit import fit as fit
from ._parallel import DataParallel as DataParallel
from ._step import StepInfo as StepInfo
from ._step import TrainState as TrainState
from ._step import make_step as make_step
from ._step import update as update
