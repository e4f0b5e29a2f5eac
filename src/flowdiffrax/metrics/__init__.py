"""Distances between samples and what they should be."""

from ..data import to_uint8 as to_uint8
from ._alexnet import AlexNetFeatures as AlexNetFeatures
from ._classifier import ClassifierFeatures as ClassifierFeatures
from ._classifier import fit_classifier as fit_classifier
from ._defect import Defects as Defects
from ._defect import defects as defects
from ._density import HistogramKL as HistogramKL
from ._density import histogram_kl as histogram_kl
from ._density import rms_distance as rms_distance
from ._distances import KernelDistance as KernelDistance
from ._distances import NearestNeighbours as NearestNeighbours
from ._distances import kernel_distance as kernel_distance
from ._distances import nearest_neighbours as nearest_neighbours
from ._distances import sliced_wasserstein as sliced_wasserstein
from ._features import AbstractFeatures as AbstractFeatures
from ._features import RandomFeatures as RandomFeatures
from ._features import image_features as image_features
from ._frechet import FeatureStatistics as FeatureStatistics
from ._frechet import frechet_distance as frechet_distance
from ._inception import InceptionFeatures as InceptionFeatures
from ._loss import BinnedLoss as BinnedLoss
from ._loss import loss_by_times as loss_by_times
from ._scores import ImageReference as ImageReference
from ._scores import ImageScores as ImageScores
from ._scores import score_images as score_images
