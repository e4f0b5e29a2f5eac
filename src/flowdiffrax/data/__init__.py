"""Data sets and batches."""

from ._arrays import load_images as load_images
from ._arrays import save_images as save_images
from ._batches import ConditionedPoints as ConditionedPoints
from ._batches import GaussianBase as GaussianBase
from ._batches import InterpolantBatches as InterpolantBatches
from ._batches import StateBatches as StateBatches
from ._batches import TrajectoryBatches as TrajectoryBatches
from ._batches import finite_rows as finite_rows
from ._cifar import cifar10 as cifar10
from ._conditions import ConditionDropout as ConditionDropout
from ._conditions import PowerLawScale as PowerLawScale
from ._device import DeviceImages as DeviceImages
from ._device import from_uint8 as from_uint8
from ._device import to_uint8 as to_uint8
from ._idx import fashion_mnist as fashion_mnist
from ._imagenet import imagenet32 as imagenet32
from ._images import Images as Images
from ._pictures import image_folder as image_folder
from ._pictures import parquet_images as parquet_images
from ._small import digits as digits
from ._small import twemoji as twemoji
from ._stream import StreamBatches as StreamBatches
from ._stream import stream as stream
from ._toy import checkerboard as checkerboard
from ._toy import checkerboard_boxes as checkerboard_boxes
from ._toy import checkerboard_density as checkerboard_density
