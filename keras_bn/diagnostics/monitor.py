"""`StatisticsMonitor`: the moving statistics, watched while `fit` runs."""

import keras
import numpy as np
from keras import ops

from keras_bn.diagnostics.distances import log_ratio
from keras_bn.diagnostics.distances import mean_distance
from keras_bn.diagnostics.event_files import EventFiles
from keras_bn.diagnostics.event_files import is_chief
from keras_bn.diagnostics.standstill import StandstillCheck
from keras_bn.diagnostics.standstill import checked_arguments
from keras_bn.diagnostics.standstill import copied
from keras_bn.diagnostics.standstill import iterations_of
from keras_bn.diagnostics.standstill import statistics_of
from keras_bn.model_layers import batch_normalizations
from keras_bn.moving_statistics import moving_average


class StatisticsMonitor(keras.callbacks.Callback):
    """Finds moving statistics that stand still, and draws their curves.

    Every so many steps, and at the end of each epoch, the statistics of each
    batch-normalization layer, of ours or built into Keras, are compared with
    what they were. Those that stand still while the layer's gamma or beta moved
    are warned of: the layers, the steps, the likely cause and what to type. A
    layer whose gamma and beta do not train is compared with all weights of the
    model. Layers are left alone that are frozen on purpose: `trainable=False`,
    `update_moving_statistics=False` or `use_moving_statistics=False`.
    `training=False` in a call, and `momentum=1.0`, may be an accident.

    List it before callbacks that change weights, as `RecalibrateStatistics`
    and `keras.callbacks.SwapEMAWeights`.

    With `log_dir` there are curves in two runs, `moving` and `batch`, which
    TensorBoard draws over each other. `<layer>/mean` and `<layer>/variance`
    are the average over channels. The run `moving` also has `<layer>/gamma`,
    the average of its absolute values, and how far the moving statistics are
    from those of the batch: `<layer>/mean_distance`, the root mean square over
    channels in standard deviations of the batch, and
    `<layer>/variance_log_ratio`, that of the logarithm of the ratio.

    The moments of the batch cost no pass of their own. They are what the moving
    statistics took in: `(new - momentum * old) / (1 - momentum)` of two
    successive values, or the like for other kinds of averages and for the
    batches of one execution. Rounding in float32 is as much as `1e-7 / (1 -
    momentum)` of the moving value. It presumes one call of the layer in a
    step; those of a layer that is called more often are off. With ghost
    batches that nobody counts, and `momentum=1.0`, there are none.

    Args:
        log_dir: Path of the folder for TensorBoard; None: no curves. The
            first of several processes writes. Needs the package tensorboard.
        on_stale: `"warn"` for a UserWarning, `"raise"` for a RuntimeError that
            ends `fit`.
        every: Int, steps from one check to the next. Between them nothing is
            read.

    Raises:
        ValueError: an argument is not one of the above, or a file is at
            `log_dir`; in `fit`, the model has no batch normalization.
        ImportError: `log_dir` is given and tensorboard is not installed.
    """

    def __init__(self, log_dir=None, on_stale="warn", every=50):
        super().__init__()
        checked_arguments(every, on_stale)
        self._on_stale = on_stale
        self._every = every
        self._files = None if log_dir is None else EventFiles(log_dir)

    def on_train_begin(self, logs=None):
        self._check = None
        self._to_draw = False
        self._writes = self._files is not None and is_chief(self.model)
        self._steps = iterations_of(self.model)
        if self.model.built:
            self._start()

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch_begins = True

    # At the beginning of a batch: on JAX and PyTorch a callback that hears of
    # the end of batches makes `fit` wait for each of them.
    def on_train_batch_begin(self, batch, logs=None):
        if self._check is not None:
            self._look()
        elif self.model.built:
            self._start()
        self._epoch_begins = False
        self._steps += self._model.steps_per_execution

    def on_epoch_end(self, epoch, logs=None):
        if self._check is None:
            return
        # Of several batches in one execution the last may have had fewer.
        if self._to_draw and self._model.steps_per_execution == 1:
            self._draw()
        self._compare()
        if self._writes:
            self._files.flush()

    def on_train_end(self, logs=None):
        if self._writes:
            self._files.close()

    def _start(self):
        model = self.model
        layers = batch_normalizations("StatisticsMonitor", model)
        self._layers = [layer for layer in layers if layer.built]
        self._check = StandstillCheck(model, self._layers, self._on_stale)
        self._checked_at = self._steps

    def _look(self):
        if self._to_draw:
            self._draw()
        if self._epoch_begins:
            # Others may have changed weights since the last epoch.
            self.model  # On JAX this gives the variables their values.
            self._check.restart()
            self._checked_at = self._steps
        elif self._steps - self._checked_at >= self._every:
            self._compare()
        else:
            return
        self._to_draw = self._writes

    def _compare(self):
        self.model  # As above.
        try:
            self._check.check(self._steps - self._checked_at)
        except RuntimeError:
            if self._writes:
                self._files.close()
            raise
        self._checked_at = self._steps

    def _draw(self):
        """Adds the point after a check, when the next values are there."""
        self.model  # As above.
        self._to_draw = False
        steps = self._steps - self._checked_at
        moving, batch = {}, {}
        for layer in self._layers:
            before = self._check.before.statistics[layer]
            now = statistics_of(layer)
            name = layer.path
            means = now["moving_mean"], now["moving_variance"]
            moving |= _averages(name, *means)
            if layer.gamma is not None:
                gamma = np.abs(copied(layer.gamma))
                moving[f"{name}/gamma"] = gamma.mean()
            moments = _moments_between(layer, before, now, steps)
            if moments is not None:
                batch |= _averages(name, *moments)
                moving |= _distances(name, *means, *moments, layer.epsilon)
        self._files.write("moving", self._steps, moving)
        self._files.write("batch", self._steps, batch)


def _averages(name, mean, variance):
    return {f"{name}/mean": mean.mean(), f"{name}/variance": variance.mean()}


def _distances(name, moving_mean, moving_variance, mean, variance, epsilon):
    by_mean = mean_distance(moving_mean, mean, variance, epsilon)
    by_variance = log_ratio(moving_variance, variance, epsilon)
    return {
        f"{name}/mean_distance": by_mean,
        f"{name}/variance_log_ratio": by_variance,
    }


def _moments_between(layer, before, now, steps):
    """What moving statistics took in, as `(mean, variance)`, or None."""
    average = moving_average(layer.momentum, getattr(layer, "debias", False))
    seen, several = np.zeros(1), np.full(1, steps)
    if average.counts_batches:
        seen = before["num_batches_tracked"]
        # A channel without a batch keeps its value: any weight will do.
        several = np.maximum(now["num_batches_tracked"] - seen, 1)
    elif getattr(layer, "virtual_batch_size", None) is not None:
        return None
    seen, several = (
        ops.convert_to_tensor(np.asarray(x, "float32")) for x in (seen, several)
    )
    kept, new = (
        np.asarray(ops.convert_to_numpy(weight), "float64")
        for weight in average.weights(several, 0.0 * several, several, seen)
    )
    if not np.all(new):
        return None

    def taken_in(name):
        return (now[name] - kept * before[name]) / new

    if "moving_stddev" in now:
        variance = np.square(taken_in("moving_stddev")) - layer.epsilon
    else:
        variance = taken_in("moving_variance")
    return taken_in("moving_mean"), np.maximum(variance, 0.0)
