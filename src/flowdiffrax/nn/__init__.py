"""Networks of two times and a state, `net(s, t, x, args)`."""

from ._ddpm_unet import DDPMUNet as DDPMUNet
from ._dilated import DilatedResNet as DilatedResNet
from ._dit import DiT as DiT
from ._dropout import Dropout as Dropout
from ._dropout import with_dropout as with_dropout
from ._embedding import MagnitudePreservingEmbedding as MagnitudePreservingEmbedding
from ._embedding import TwoTimeEmbedding as TwoTimeEmbedding
from ._embedding import two_times as two_times
from ._fno import FNO as FNO
from ._log_units import LogUnits as LogUnits
from ._magnitude import normalise_weights as normalise_weights
from ._magnitude_unet import MagnitudePreservingUNet as MagnitudePreservingUNet
from ._mlp import MLP as MLP
from ._ravelled import Ravelled as Ravelled
from ._relaxation import RelaxationMLP as RelaxationMLP
from ._sets import SetEncoder as SetEncoder
from ._sets import Summarised as Summarised
from ._unet import UNet as UNet
