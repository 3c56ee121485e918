"""Pretrained weights: records, files, conversion, and the authors' names of whole systems."""

from mljax.weights.loading import IMAGENET_MEAN, Weights, load, locate, preprocessing, records, resolve

__all__ = ["IMAGENET_MEAN", "Weights", "load", "locate", "preprocessing", "records", "resolve"]
