"""Loaders of image data sets."""
