"""Distances between samples and what they should be."""

from ._density import HistogramKL as HistogramKL
from ._density import histogram_kl as histogram_kl
from ._density import rms_distance as rms_distance
