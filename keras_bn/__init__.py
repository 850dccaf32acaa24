"""Batch normalization for Keras 3."""

from keras_bn import backends  # the first, as it says what is missing
from keras_bn.diagnostics.audit import audit
from keras_bn.diagnostics.monitor import StatisticsMonitor
from keras_bn.diagnostics.recalibrate import recalibrate
from keras_bn.diagnostics.recalibrate_in_fit import RecalibrateStatistics
from keras_bn.diagnostics.watch import watch_statistics
from keras_bn.layer import BatchNormalization
from keras_bn.renorm_schedule import renorm_schedule
from keras_bn.serving.export import export_saved_model
from keras_bn.surgery.convert import convert
from keras_bn.surgery.fold import fold
from keras_bn.surgery.freeze import freeze
from keras_bn.surgery.freeze import reset_statistics
from keras_bn.surgery.freeze import thaw

if backends.NAME == "torch":
    from keras_bn import torch_module  # noqa: F401

__all__ = [
    "BatchNormalization",
    "RecalibrateStatistics",
    "StatisticsMonitor",
    "audit",
    "convert",
    "export_saved_model",
    "fold",
    "freeze",
    "recalibrate",
    "renorm_schedule",
    "reset_statistics",
    "thaw",
    "watch_statistics",
]
__version__ = "0.1.0"
