"""`RecalibrateStatistics`: moving statistics computed anew while `fit` runs."""

import keras
from keras import ops

from keras_bn.diagnostics.batches import BATCH_SIZE
from keras_bn.diagnostics.batches import Batches
from keras_bn.diagnostics.forward_passes import ForwardPasses
from keras_bn.diagnostics.recalibrate import checked_method
from keras_bn.diagnostics.recalibrate import recalibrate_by
from keras_bn.model_layers import batch_normalizations


class RecalibrateStatistics(keras.callbacks.Callback):
    """Evaluates, saves and leaves a model with statistics of its weights.

    Averaged weights, as those of `keras.callbacks.SwapEMAWeights`, meet the
    moving statistics of other weights. And a moving average lags behind the
    weights that it is of. So `keras_bn.recalibrate` runs

    - before each evaluation; after it training goes on with the moving
      statistics that it had,
    - at the end of each epoch, so that callbacks find what was evaluated; the
      next epoch begins with the moving statistics of before,
    - at the end of training, for good.

    Each is a pass over `data`. The order of callbacks matters:

    ```python
    callbacks=[
        keras_bn.StatisticsMonitor(),  # sees training alone
        keras.callbacks.SwapEMAWeights(swap_on_epoch=True),
        keras_bn.RecalibrateStatistics(x_train[:4096]),
        keras.callbacks.ModelCheckpoint(...),  # saves both
    ]
    ```

    With `swap_on_epoch=False` a `ModelCheckpoint` saves the weights of
    training, with statistics of their own.

    Args:
        data: Training data without augmentation, in a form that `recalibrate`
            takes and that can be read again: no generator. Labels in it are
            not used.
        steps: Int, how many batches to read each time; None: all.
        method: `"batch"` or `"layerwise"`, as for `recalibrate`.
        batch_size: Int, samples in a batch of arrays.

    Raises:
        ValueError: an argument is not one of the above; in `fit`, what
            `recalibrate` raises.
    """

    def __init__(
        self, data, steps=None, method="batch", batch_size=BATCH_SIZE
    ):
        super().__init__()
        if hasattr(data, "send"):
            raise ValueError(
                "A generator can be read once, and each evaluation reads the "
                "data. Received: data of type generator. Give arrays, a "
                "tf.data.Dataset or a keras.utils.PyDataset."
            )
        checked_method(method)
        Batches(data, steps=steps, batch_size=batch_size)
        self._data = data
        self._settings = {
            "steps": steps,
            "method": method,
            "labels": None,
            # What labels say of weights that are still being trained is no
            # reason to end the training.
            "force": True,
            "frozen": False,
            "batch_size": batch_size,
            "verbose": 0,
        }
        self._forward_passes = None
        self._of_epoch = None
        self._of_test = None

    def on_train_begin(self, logs=None):
        self._of_epoch = None
        self._forward_passes = None
        # On TensorFlow a model may be built by its first batch.
        if self.model.built:
            batch_normalizations("RecalibrateStatistics", self.model)

    def on_epoch_begin(self, epoch, logs=None):
        self._put_back(self._of_epoch)
        self._of_epoch = None

    def on_test_begin(self, logs=None):
        self._of_test = self._recalibrate()

    def on_test_end(self, logs=None):
        self._put_back(self._of_test)
        self._of_test = None

    def on_epoch_end(self, epoch, logs=None):
        self._of_epoch = self._recalibrate()

    def on_train_end(self, logs=None):
        self._of_epoch = None
        self._recalibrate()
        self._forward_passes = None

    def _recalibrate(self):
        """The statistics of before, as `(variable, array)`."""
        model = self.model
        before = [
            (variable, ops.convert_to_numpy(variable).copy())
            for layer in batch_normalizations("RecalibrateStatistics", model)
            for variable in layer.non_trainable_variables
        ]
        if self._forward_passes is None:
            self._forward_passes = ForwardPasses(model)
        recalibrate_by(self._forward_passes, self._data, **self._settings)
        return before

    def _put_back(self, values):
        for variable, value in values or ():
            variable.assign(value)
