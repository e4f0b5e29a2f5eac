"""Measures of the quality of samples and flow maps."""

from ._calibration import Calibration as Calibration
from ._calibration import calibrate as calibrate
from ._defect import Defects as Defects
from ._defect import defects as defects
from ._density import HistogramKL as HistogramKL
from ._density import histogram_kl as histogram_kl
from ._density import rms_distance as rms_distance
from ._distances import KernelDistance as KernelDistance
from ._distances import kernel_distance as kernel_distance
from ._distances import sliced_wasserstein as sliced_wasserstein
from ._loss import BinnedLoss as BinnedLoss
from ._loss import loss_by_times as loss_by_times
from ._roll_outs import energy_spectrum as energy_spectrum
from ._roll_outs import first_bad_jump as first_bad_jump
from ._roll_outs import invariant_drift as invariant_drift
from ._roll_outs import roll_out_errors as roll_out_errors
