"""Forward passes of a whole model that look into its batch normalization.

The model runs as in inference: dropout is off, and nothing is updated. In the
meantime the batch-normalization layers named do something else than their own
`call`: they take the moments of their inputs, and normalize with these or with
the moving statistics, as they are told.
"""

import contextlib
import functools
import math
import re

import keras
import numpy as np
from keras import ops
from keras.src.backend import compute_output_spec
from keras.src.backend import get_keras_mask

from keras_bn import kernels
from keras_bn.channel_axes import split_channel_axes
from keras_bn.diagnostics.compiled import compiled
from keras_bn.diagnostics.compiled import innermost_trace
from keras_bn.dtypes import as_floats
from keras_bn.dtypes import moments_dtype
from keras_bn.kernel_inputs import as_kernels_see
from keras_bn.model_layers import BATCH_NORMALIZATIONS
from keras_bn.moving_statistics import as_vector

# A mean of more standard deviations than this is taken off first.
_FAR = 30.0


class ForwardPasses:
    """The forward passes of a model, each compiled once.

    Weights are read at each call. What else a model holds is compiled in, so
    this is kept no longer than Keras keeps a function of its own, in `fit`.

    Args:
        model: `keras.Model` or layer, built.
    """

    def __init__(self, model):
        self.model = model
        self._made = {}

    def get(self, layers, with_batch=()):
        """A `ForwardPass`, as new."""
        key = tuple(
            (
                layer,
                layer in with_batch,
                getattr(layer, "use_moving_statistics", None),
            )
            for layer in layers
        )
        if key not in self._made:
            self._made[key] = ForwardPass(self.model, layers, with_batch)
        self._made[key].forget()
        return self._made[key]


class ForwardPass:
    """A function of the inputs of a model, compiled where Keras compiles.

    Args:
        model: `keras.Model` or layer, built.
        layers: List of all batch-normalization layers in it, of ours or of
            Keras's.
        with_batch: Those of them that normalize with the moments of the batch.
            The others do with their moving statistics.

    Returns of a call:
        `(outputs, masks, moments)`: what the model returns, as arrays; the
        masks that Keras keeps with these, in the same structure, None where
        there is none; and a list of `(layer, mean, variance, count)` for each
        call of a layer, in order.

    Raises:
        ValueError: in a call, the model does not take the inputs, or calls a
            layer where its moments cannot be had.
    """

    def __init__(self, model, layers, with_batch=()):
        self._model = model
        self._layers = layers
        self._with_batch = with_batch
        self.forget()
        # Of each trace: which layers are called, in order. They do not differ.
        self._called = []
        self._run = compiled(model, functools.partial(self._look, model))

    def forget(self):
        """Forgets what earlier inputs were like."""
        # Taken off the inputs of each layer: a batch's mean in float32 is too
        # coarse for the variance of all batches where it is large.
        self._shifts = [
            np.zeros(math.prod(layer.moving_mean.shape), "float32")
            for layer in self._layers
        ]

    def __call__(self, inputs):
        inputs = inputs_of(self._model, inputs)
        try:
            outputs, masks, moments = self._run(inputs, self._shifts)
        except _Hidden as error:
            raise ValueError(
                f"The moments of a layer cannot be had. {reason_of(error)}"
            ) from error
        except Exception as error:
            # Each framework has kinds of its own.
            shapes = keras.tree.map_structure(
                lambda x: None if x is None else np.shape(x), inputs
            )
            raise ValueError(
                "The model cannot be run on the data. Received: inputs of "
                f"shape {shapes}. It says: {reason_of(error)}"
            ) from error
        far = False
        for number, *of_call in zip(self._called, *zip(*moments)):
            mean, variance, _ = map(ops.convert_to_numpy, of_call)
            if np.any(np.abs(mean) > _FAR * np.sqrt(variance)):
                self._shifts[number] = self._shifts[number] + mean
                far = True
        if far:
            outputs, masks, moments = self._run(inputs, self._shifts)
        outputs, masks = keras.tree.map_structure(_array, (outputs, masks))
        return outputs, masks, [
            (
                self._layers[number],
                self._shifts[number] + np.asarray(mean, "float64"),
                variance,
                count,
            )
            for number, of_call in zip(self._called, moments)
            for mean, variance, count in [map(ops.convert_to_numpy, of_call)]
        ]

    def _look(self, model, inputs, shifts):
        called, moments = [], []
        trace = innermost_trace()

        def call(layer, inputs, mask, training):
            if innermost_trace() != trace:
                raise _Hidden(
                    f"Received: layer {layer.name!r}, which is called in a "
                    "loop or function that the framework compiles by itself. "
                    "Call it outside of that, or in an unrolled loop."
                )
            number = self._layers.index(layer)
            outputs, *of_call = _normalized(
                layer, inputs, mask, shifts[number], layer in self._with_batch
            )
            called.append(number)
            moments.append(tuple(map(ops.convert_to_tensor, of_call)))
            return outputs

        with _calls_replaced(self._layers, call), _unrolled(model):
            outputs = model(inputs, training=False)
        self._called = called
        masks = keras.tree.map_structure(get_keras_mask, outputs)
        return outputs, masks, moments


def inputs_of(model, inputs):
    """`inputs` without what a functional or sequential model does not take.

    Keras warns, and goes by the order of what it is given.

    Raises:
        ValueError: they are fewer or more, or do not have its names.
    """
    expected = getattr(model, "inputs", None)
    if not isinstance(expected, list) or not all(
        isinstance(x, keras.KerasTensor) for x in expected
    ):
        return inputs
    if isinstance(inputs, dict):
        # A sequential model has no such attribute.
        structure = getattr(model, "input", expected)
        names = [x.name for x in expected]
        if isinstance(structure, dict):
            names = list(structure)
        if not set(names) <= set(inputs):
            raise ValueError(
                f"The model takes the inputs {names}. Received: inputs "
                f"{sorted(map(str, inputs))}."
            )
        return {name: inputs[name] for name in names}
    found = len(keras.tree.flatten(inputs))
    if found != len(expected):
        raise ValueError(
            f"The model takes {len(expected)} inputs. Received: {found}."
        )
    return inputs


def called_for_training(model, layers, inputs):
    """Set of those layers that a training call of the model calls for it.

    The others were built into it with `training=False`. Nothing is computed.

    Args:
        model: `keras.Model` or layer, built.
        layers: List of batch-normalization layers in it.
        inputs: Structure of arrays.
    """
    called = set()

    def call(layer, inputs, mask, training):
        if training:
            called.add(layer)
        return ops.cast(inputs, layer.compute_dtype)

    inputs = keras.tree.map_structure(
        lambda x: (
            None
            if x is None
            else keras.KerasTensor(
                x.shape, keras.backend.standardize_dtype(x.dtype)
            )
        ),
        inputs_of(model, inputs),
    )
    with _calls_replaced(layers, call):
        compute_output_spec(lambda x: model(x, training=True), inputs)
    return called


def _array(tensor):
    return None if tensor is None else ops.convert_to_numpy(tensor)


def _normalized(layer, inputs, mask, shift, with_batch):
    """`(outputs, mean, variance, count)` of a layer, the mean without shift."""
    sizes, rank = layer.input_spec.axes, layer.input_spec.ndim
    sizes = {axis % rank: size for axis, size in sizes.items()}
    inputs, merged, axis, mask = as_kernels_see(inputs, mask, sizes)
    dtype = moments_dtype(as_floats(merged, layer.compute_dtype).dtype)
    shift = ops.cast(shift, dtype)
    shape = [-1 if i == axis else 1 for i in range(len(merged.shape))]
    merged = ops.cast(merged, dtype) - ops.reshape(shift, shape)
    mean, variance, count = _moments(merged, axis, mask)
    statistics = mean, variance
    if getattr(layer, "use_moving_statistics", None) is False:
        with_batch = True
    if not with_batch:
        moving_mean, moving_variance = (
            as_vector(v, dtype)
            for v in (layer.moving_mean, layer.moving_variance)
        )
        statistics = moving_mean - shift, moving_variance
    gamma, beta = (
        None if v is None else as_vector(v, dtype)
        for v in (layer.gamma, layer.beta)
    )
    outputs = kernels.normalize_with(
        merged, *statistics, gamma, beta, axis=axis, epsilon=layer.epsilon
    )
    outputs = split_channel_axes(outputs, inputs, tuple(sizes))
    return ops.cast(outputs, layer.compute_dtype), mean, variance, count


def _moments(inputs, axis, mask):
    """`(mean, variance, count)` of inputs that are near zero.

    These need none of the care of `kernels.batch_moments`, which TensorFlow
    takes longer to trace than the rest of a layer.
    """
    if mask is not None:
        return kernels.batch_moments(inputs, axis=axis, mask=mask)
    axes = [i for i in range(len(inputs.shape)) if i != axis]
    mean = ops.mean(inputs, axes, keepdims=True)
    variance = ops.mean(ops.square(inputs - mean), axes)
    count = ops.size(inputs) // inputs.shape[axis]
    return ops.reshape(mean, [-1]), variance, count


class _Hidden(Exception):
    """A layer is called where its moments do not get out of."""


@contextlib.contextmanager
def _unrolled(model):
    """Recurrent layers run step by step, where the moments of each are seen."""
    layers = [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.RNN)
        and not layer.unroll
        and any(
            isinstance(x, BATCH_NORMALIZATIONS)
            for x in layer.cell._flatten_layers()
        )
    ]
    try:
        for layer in layers:
            layer.unroll = True
        yield
    finally:
        for layer in layers:
            layer.unroll = False


@contextlib.contextmanager
def _calls_replaced(layers, call):
    """Calls of `layers` are those of `call(layer, inputs, mask, training)`.

    Set on the classes, so that a subclass that goes on to their `call` is
    looked into as well.
    """

    def replaced(own):
        def call_of_class(layer, inputs, training=None, mask=None):
            if any(layer is one for one in layers):
                return call(layer, inputs, mask, training)
            return own(layer, inputs, training=training, mask=mask)

        return call_of_class

    owns = {one: one.call for one in BATCH_NORMALIZATIONS}
    try:
        for one, own in owns.items():
            one.call = replaced(own)
        yield
    finally:
        for one, own in owns.items():
            one.call = own


def reason_of(error):
    """An error of a framework in one line."""
    text = str(error)
    # Keras has what is wrong in bold, between its tale of the call.
    bold = re.search("\x1b\\[1m(.*?)\x1b\\[0m", text, re.DOTALL)
    if bold:
        text = bold[1]
    text = " ".join(text.split())
    if len(text) > 300:
        # Between the ends there are tensors.
        text = f"{text[:100]} ... {text[-200:]}"
    return text or type(error).__name__
