"""An LSTM that normalizes within each time step."""

import keras
import numpy as np
from keras import layers
from keras import ops

import keras_bn
from experiments import article
from experiments.studies.small_networks import INPUT_SHAPE
from experiments.studies.small_networks import MOMENTUM

# Rows of an image that are read together.
ROWS = 2
# Cooijmans et al., section 4: with 1 the tanh saturates and gradients vanish.
INITIAL_GAMMA = 0.1
_LAYERS = {
    "keras_bn": keras_bn.BatchNormalization,
    "keras": layers.BatchNormalization,
}


def build(
    normalization: str, layer: str, units: int, seed: int
) -> keras.Model:
    """Builds a recurrent network that reads an image row by row.

    Args:
        normalization: "none" and "batch_inputs" (batch normalization of the
            sequence, then a plain LSTM), "batch_recurrent" or "layer".
        layer: whose batch normalization: "keras_bn" or "keras".
        units: of the LSTM.
        seed: int of at least 0.

    Returns:
        A model from images to 10 logits, not compiled.
    """
    height, width, channels = INPUT_SHAPE
    steps = height // ROWS
    state = np.random.SeedSequence(seed).generate_state(3)
    seeds = [int(word) >> 1 for word in state]
    kernel = keras.initializers.GlorotUniform(seed=seeds[0])
    recurrent = keras.initializers.Orthogonal(seed=seeds[1])
    model = keras.Sequential(name="recurrent_network")
    model.add(keras.Input(INPUT_SHAPE))
    model.add(layers.Reshape((steps, ROWS * width * channels)))
    if normalization == "batch_inputs":
        model.add(_LAYERS[layer](momentum=MOMENTUM))
    if normalization in ("none", "batch_inputs"):
        model.add(
            layers.LSTM(
                units,
                kernel_initializer=kernel,
                recurrent_initializer=recurrent,
            )
        )
    else:
        model.add(
            NormalizedLSTM(units, normalization, layer, kernel, recurrent)
        )
    model.add(
        layers.Dense(
            10, kernel_initializer=keras.initializers.GlorotUniform(seeds[2])
        )
    )
    return model


class NormalizedLSTM(layers.Layer):
    """An LSTM whose inputs, states and cells are normalized on their own.

    `gates = norm(inputs W) + norm(h U) + b`, `c = f c + i tanh(g)`,
    `h = o tanh(norm(c))`, with the last h as output.

    Args:
        units: of the state.
        normalization: "batch_recurrent": batch normalization with moments,
            and moving statistics, of each time step, and one gamma and beta
            for all (Cooijmans et al., 2016); or "layer" (Ba et al., 2016).
        layer: whose batch normalization: "keras_bn" or "keras".
        kernel, recurrent: initializers of W and U.
        **kwargs: those of `keras.layers.Layer`.
    """

    def __init__(
        self, units, normalization, layer, kernel, recurrent, **kwargs
    ):
        super().__init__(**kwargs)
        self._units = units
        self._layer = layer
        self._batch = normalization == "batch_recurrent"
        self._kernel, self._recurrent = kernel, recurrent

    def build(self, input_shape):
        _, self._steps, features = input_shape
        width = 4 * self._units
        self._w = self.add_weight(
            shape=(features, width), initializer=self._kernel, name="w"
        )
        self._u = self.add_weight(
            shape=(self._units, width), initializer=self._recurrent, name="u"
        )
        bias = np.zeros(width, "float32")
        bias[self._units : 2 * self._units] = 1.0  # of the forget gate
        self._bias = self.add_weight(
            shape=(width,), initializer=lambda *_, **__: bias, name="bias"
        )
        initial = INITIAL_GAMMA if self._batch else 1.0
        self._gammas = [
            self.add_weight(
                shape=(size,),
                initializer=keras.initializers.Constant(initial),
                name=f"gamma_{name}",
            )
            for name, size in (("x", width), ("h", width), ("c", self._units))
        ]
        self._beta = self.add_weight(
            shape=(self._units,), initializer="zeros", name="beta_c"
        )
        if self._batch:
            self._of_inputs, self._of_states, self._of_cells = (
                [
                    self._made(_batch_normalization(self._layer), size)
                    for _ in range(self._steps)
                ]
                for size in (width, width, self._units)
            )
        else:
            self._of_inputs, self._of_states, self._of_cells = (
                [self._made(_layer_normalization(), size)] * self._steps
                for size in (width, width, self._units)
            )

    def _made(self, layer, size):
        layer.build((None, size))
        return layer

    def call(self, inputs, training=False):
        of_x, of_h, of_c = self._gammas
        fed = ops.matmul(inputs, self._w)
        # At the first step there is no state yet.
        state = cell = None
        for step in range(self._steps):
            gates = self._of_inputs[step](fed[:, step], training=training)
            gates = of_x * gates + self._bias
            if step:
                turned = self._of_states[step](
                    ops.matmul(state, self._u), training=training
                )
                gates = gates + of_h * turned
            # In Keras's order.
            i, f, g, o = ops.split(gates, 4, axis=-1)
            new = ops.sigmoid(i) * ops.tanh(g)
            cell = new if cell is None else ops.sigmoid(f) * cell + new
            shown = self._of_cells[step](cell, training=training)
            state = ops.sigmoid(o) * ops.tanh(of_c * shown + self._beta)
        return state

    def compute_output_shape(self, input_shape):
        return input_shape[0], self._units


def _batch_normalization(layer):
    return _LAYERS[layer](
        momentum=MOMENTUM,
        epsilon=article.BATCH_NORM_EPSILON,
        center=False,
        scale=False,
    )


def _layer_normalization():
    return layers.LayerNormalization(
        epsilon=article.BATCH_NORM_EPSILON, center=False, scale=False
    )
