"""Batch normalization for Keras 3."""

from keras_bn.layer import BatchNormalization

__all__ = ["BatchNormalization"]
__version__ = "0.1.0"
