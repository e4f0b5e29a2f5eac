"""The training step, the training loop, and the folder of a run."""

from ._checkpoint import load as load
from ._checkpoint import save as save
from ._fingerprint import fingerprint as fingerprint
from ._fit import TrainingDiverged as TrainingDiverged
from ._fit import fit as fit
from ._optimisers import muon_and_adam as muon_and_adam
from ._parallel import DataParallel as DataParallel
from ._power_average import PowerAverage as PowerAverage
from ._reports import LossByTimes as LossByTimes
from ._reports import TensorBoard as TensorBoard
from ._reports import WeightsAndBiases as WeightsAndBiases
from ._run import Run as Run
from ._snapshots import Snapshots as Snapshots
from ._snapshots import power_average as power_average
from ._step import StepInfo as StepInfo
from ._step import TrainState as TrainState
from ._step import make_step as make_step
from ._step import update as update
