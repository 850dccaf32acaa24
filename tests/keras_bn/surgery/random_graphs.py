"""Random models with batch normalization, drawn by Hypothesis.

Beside each tensor goes a bound of its values and of their rounding errors. A
layer multiplies the first by the sum of the absolute weights that meet in one
output, and adds to the second a rounding for each of them: first-order error
analysis (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1),
with the largest entries alone.
"""

import dataclasses
import math

import keras
import numpy as np
from hypothesis import strategies as st
from keras import layers

import keras_bn
from tests.keras_bn import frameworks

SAMPLES = 2
KERAS = layers.BatchNormalization
OURS = keras_bn.BatchNormalization
# TensorFlow's CPU kernels have channels last only.
FORMATS = ["channels_last", "channels_first"]
if frameworks.IS_TENSORFLOW:
    FORMATS = FORMATS[:1]


@dataclasses.dataclass
class Value:
    """A tensor of the graph.

    Attributes:
        tensor: `KerasTensor`.
        shape: What it has with the sizes of the test's inputs.
        bound: From a bound of the graph's inputs, and the rounding errors that
            they have had, to those of this tensor. Errors are below their
            number times the bound times the unit roundoff.
    """

    tensor: keras.KerasTensor
    shape: tuple
    bound: object


@dataclasses.dataclass
class RandomModel:
    """A model with inputs for it.

    Attributes:
        model: `keras.Model`.
        inputs: Array.
        bounds: Of each output, as that of a `Value`.
        trained: Whether a call in it has an argument `training`.
        unit: Unit roundoff of what Keras computes in.
    """

    model: keras.Model
    inputs: np.ndarray
    bounds: list
    trained: bool
    unit: float


def random_model(draw, dtype):
    """A `RandomModel` whose layers compute in `dtype`, see `st.data`."""
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
    builder = _Builder(draw)
    rank = draw(st.sampled_from([1, 2, 2, 3, 3, 3, 4]))
    sizes = [draw(st.integers(4, 5 if rank == 4 else 7)) for _ in range(rank)]
    first = builder.format == "channels_first"
    sizes[0 if first else -1] = draw(st.integers(1, 4))
    known = [
        size if i == (0 if first else rank - 1) or draw(st.booleans()) else None
        for i, size in enumerate(sizes)
    ]
    integers = draw(st.integers(0, 9)) == 0
    # Keras's layer computes in float32 what it is given as integers.
    builder.narrows = integers
    inputs = keras.Input(known, dtype="int32" if integers else None)
    start = Value(inputs, (SAMPLES, *sizes), lambda *given: given)
    outputs = builder.grow(start, draw(st.integers(1, 7)))
    model = keras.Model(inputs, [one.tensor for one in outputs])
    values = builder.generator.normal(0.0, 1.0, (SAMPLES, *sizes))
    values = np.round(4 * values) if integers else values
    values = values.astype("int32" if integers else dtype)
    largest = float(np.abs(values).max())
    return RandomModel(
        model,
        values,
        [one.bound(largest, 0) for one in outputs],
        builder.trains,
        np.finfo("float32" if builder.narrows else dtype).eps / 2,
    )


class _Builder:
    """Calls layers on tensors, as a strategy draws them."""

    def __init__(self, draw):
        self._draw = draw
        self.generator = np.random.default_rng(draw(st.integers(0, 999)))
        self.format = draw(st.sampled_from(FORMATS))
        self.gamma = draw(st.sampled_from(["positive", "both", "some zero"]))
        self.trains = draw(st.integers(0, 3)) == 0
        # `(layer, what its inputs have to be, how it bounds its outputs)`.
        self._used = []

    def grow(self, start, steps, depth=0):
        """A list of one or two values, the ends of a graph."""
        values = [start]
        for _ in range(steps):
            one = self._step(values, depth)
            if one is not None:
                values.append(one)
        if len(values) == 1:
            values.append(self._activation(start))
        ends = [values[-1]]
        if self._draw(st.integers(0, 4)) == 0:
            other = self._draw(st.sampled_from(values[1:]))
            if other is not ends[0]:
                ends.append(other)
        return ends

    def _step(self, values, depth):
        draw = self._draw
        last = values[-1]
        # Mostly a chain.
        value = draw(st.sampled_from([last, last, last, *values[-3:]]))
        kinds = [
            self._normalization,
            self._normalization,
            self._normalization,
            self._linear,
            self._linear,
            self._activation,
            self._identity,
            self._position,
            self._position,
            self._shape,
            self._again,
        ]
        if depth < 2:
            kinds.append(lambda value: self._nested(value, depth))
        kinds.append(lambda value: self._merged(value, values))
        return draw(st.sampled_from(kinds))(value)

    # Each of these returns a new `Value`, or None where it does not fit.

    def _call(self, layer, value, bound, reusable=True):
        """Calls a layer whose outputs are bounded by `bound(size, errors)`."""
        try:
            shape = layer.compute_output_shape(value.shape)
        except (TypeError, ValueError):
            # Keras has no shape for it.
            return None
        if any(n is not None and n < 1 for n in shape):
            return None
        arguments = {}
        if self.trains and self._draw(st.integers(0, 3)) == 0:
            arguments["training"] = self._draw(
                st.sampled_from([True, False, None, 1, np.True_])
            )
        try:
            tensor = layer(value.tensor, **arguments)
        except (TypeError, ValueError):
            # Weights whose size is not known.
            return None
        self._randomize(layer)
        if reusable:
            self._used.append((layer, value.tensor.shape, bound))
        return Value(
            tensor, shape, lambda *given: bound(*value.bound(*given))
        )

    def _randomize(self, layer):
        for part in layer._flatten_layers():
            if isinstance(part, (KERAS, OURS)) and not hasattr(part, "_drawn"):
                part._drawn = True
                shape = part.moving_mean.shape
                part.moving_mean.assign(self.generator.normal(size=shape))
                part.moving_variance.assign(
                    self.generator.uniform(0.5, 1.5, shape)
                )
                if part.scale:
                    gamma = self.generator.uniform(0.5, 1.5, shape)
                    if self.gamma != "positive":
                        gamma *= self.generator.choice([-1.0, 1.0], shape)
                    if self.gamma == "some zero":
                        gamma.flat[0] = 0.0
                    part.gamma.assign(gamma)
                if part.center:
                    part.beta.assign(self.generator.normal(size=shape))
            elif isinstance(part, _WITH_WEIGHTS) and not hasattr(
                part, "_drawn"
            ):
                part._drawn = True
                for weight in part.weights:
                    fan_in = max(1, math.prod(weight.shape[:-1]))
                    weight.assign(
                        self.generator.normal(size=weight.shape)
                        / np.sqrt(fan_in)
                    )

    def _normalization(self, value):
        draw = self._draw
        rank = len(value.shape)
        options = {
            "scale": draw(st.integers(0, 3)) > 0,
            "center": draw(st.integers(0, 3)) > 0,
            "axis": 1 if self.format == "channels_first" else -1,
        }
        if draw(st.integers(0, 7)) == 0:
            options["axis"] = draw(st.integers(1, rank - 1))
        kind = draw(st.sampled_from([KERAS, OURS]))
        if kind is OURS and rank > 2 and draw(st.integers(0, 7)) == 0:
            options["axis"] = [1, rank - 1]
        axes = np.ravel(options["axis"])
        if any(value.tensor.shape[i] is None for i in axes):
            return None
        layer = kind(**options)
        count = math.prod(value.shape) // math.prod(
            value.shape[i] for i in axes
        )

        def bound(size, errors):
            mean, variance, gamma, beta = (
                0.0 if x is None else frameworks.array(x)
                for x in (
                    layer.moving_mean,
                    layer.moving_variance,
                    layer.gamma,
                    layer.beta,
                )
            )
            gamma = np.abs(gamma) if layer.scale else 1.0
            scale = gamma / np.sqrt(variance + layer.epsilon)
            if self.trains:
                # With the batch's moments an error d of the inputs is one of
                # 2 d in the deviation, and of at most 2 d sqrt(count) by the
                # standard deviation, both over at least sqrt(epsilon).
                scale = scale + gamma * (2 + 2 * np.sqrt(count)) / np.sqrt(
                    layer.epsilon
                )
                errors += count
            outputs = scale * (size + np.abs(mean)) + np.abs(beta)
            return float(np.max(outputs)), errors + 8

        return self._call(layer, value, bound)

    def _linear(self, value):
        draw = self._draw
        rank = len(value.shape) - 2
        activation = draw(st.sampled_from([None, None, None, "relu", "tanh"]))
        use_bias = draw(st.booleans())
        options = {"activation": activation, "use_bias": use_bias}
        if rank == 0 or draw(st.integers(0, 4)) == 0:
            layer = layers.Dense(draw(st.integers(1, 4)), **options)
            return self._linear_call(layer, value)
        options["data_format"] = self.format
        channels = value.shape[1 if self.format == "channels_first" else -1]
        kinds = [getattr(layers, f"Conv{rank}D")] * 3
        kinds.append(getattr(layers, f"Conv{rank}DTranspose"))
        if rank < 3:
            kinds.append(getattr(layers, f"DepthwiseConv{rank}D"))
            kinds.append(getattr(layers, f"SeparableConv{rank}D"))
        kind = draw(st.sampled_from(kinds))
        window = [draw(st.sampled_from([1, 2, 3])) for _ in range(rank)]
        options["padding"] = draw(st.sampled_from(["valid", "same", "same"]))
        form = draw(st.sampled_from(["plain", "plain", "strides", "dilation"]))
        if form == "strides":
            step = draw(st.integers(2, 3))
            options["strides"] = (step,) * rank
        elif form == "dilation" and "Transpose" not in kind.__name__:
            options["dilation_rate"] = (2,) * rank
        if kind is layers.Conv1D and form != "strides" and draw(st.booleans()):
            options["padding"] = "causal"
        if "Depthwise" in kind.__name__:
            options["depth_multiplier"] = draw(st.integers(1, 2))
            layer = kind(window, **options)
        elif "Separable" in kind.__name__:
            layer = kind(
                draw(st.integers(1, 4)),
                window,
                depth_multiplier=draw(st.integers(1, 2)),
                **options,
            )
        elif "Transpose" in kind.__name__:
            layer = kind(draw(st.integers(1, 4)), window, **options)
        else:
            groups = draw(st.sampled_from([1, 1, channels]))
            layer = kind(
                groups * draw(st.integers(1, 2)),
                window,
                groups=groups,
                **options,
            )
        return self._linear_call(layer, value)

    def _linear_call(self, layer, value):
        def bound(size, errors):
            for weight in layer.weights:
                weight = np.abs(frameworks.array(weight))
                if weight.ndim == 1:
                    size, errors = size + weight.max(), errors + 1
                else:
                    # Of all that meet in an output, whichever axis that is.
                    size = size * weight.sum() / min(weight.shape[-2:])
                    errors += weight.size + 1
            return float(size), errors + 4

        return self._call(layer, value, bound)

    def _activation(self, value):
        layer = self._draw(
            st.sampled_from(
                [
                    lambda: layers.ReLU(),
                    lambda: layers.ReLU(max_value=1.0),
                    lambda: layers.LeakyReLU(),
                    lambda: layers.Activation("relu"),
                    lambda: layers.Activation("tanh"),
                    lambda: layers.ELU(),
                ]
            )
        )()
        # Their slopes are at most 1, and they are 0 at 0.
        return self._call(layer, value, lambda size, errors: (size, errors + 8))

    def _identity(self, value):
        seed = self._draw(st.integers(0, 99))
        layer = self._draw(
            st.sampled_from(
                [
                    lambda: layers.Dropout(0.5, seed=seed),
                    lambda: layers.GaussianNoise(0.5, seed=seed),
                    lambda: layers.Identity(),
                    lambda: layers.Activation("linear"),
                ]
            )
        )()
        # Dropout doubles, and the noise is below 4 here.
        return self._call(
            layer, value, lambda size, errors: (2 * size + 4, errors + 4)
        )

    def _position(self, value):
        draw = self._draw
        rank = len(value.shape) - 2
        if rank == 0:
            return None
        options = {"data_format": self.format}
        name = draw(
            st.sampled_from(
                [
                    "ZeroPadding",
                    "ZeroPadding",
                    "MaxPooling",
                    "AveragePooling",
                    "UpSampling",
                    "Cropping",
                    "GlobalAveragePooling",
                    "GlobalMaxPooling",
                ]
            )
        )
        kind = getattr(layers, f"{name}{rank}D")
        if name in ("ZeroPadding", "Cropping"):
            pairs = [
                (draw(st.integers(0, 2)), draw(st.integers(0, 1)))
                for _ in range(rank)
            ]
            pairs = pairs[0] if rank == 1 else pairs
            layer = kind(pairs, **_without(options, rank))
        elif name == "UpSampling":
            if rank == 2:
                options["interpolation"] = draw(
                    st.sampled_from(["nearest", "bilinear"])
                )
                # TensorFlow computes it in float32, whatever it is given.
                self.narrows |= options["interpolation"] == "bilinear"
            layer = kind(2, **_without(options, rank))
        elif "Global" in name:
            layer = kind(keepdims=draw(st.booleans()), **options)
        else:
            layer = kind(
                2,
                strides=draw(st.integers(1, 2)),
                padding=draw(st.sampled_from(["valid", "same"])),
                **options,
            )
        terms = math.prod(value.shape)
        return self._call(
            layer, value, lambda size, errors: (size, errors + terms)
        )

    def _shape(self, value):
        draw = self._draw
        rank = len(value.shape) - 1
        choice = draw(st.sampled_from(["flatten", "reshape", "permute"]))
        if choice == "flatten":
            layer = layers.Flatten(data_format=self.format)
        elif choice == "permute":
            layer = layers.Permute(draw(st.permutations(range(1, rank + 1))))
        else:
            if None in value.tensor.shape[1:]:
                return None
            size = math.prod(value.shape[1:])
            divisor = draw(
                st.sampled_from([n for n in (1, 2, 3) if size % n == 0])
            )
            layer = layers.Reshape(
                draw(
                    st.sampled_from([(divisor, size // divisor), (-1, divisor)])
                )
            )
        return self._call(layer, value, lambda size, errors: (size, errors))

    def _again(self, value):
        """A layer, or model, that the graph has already."""
        fitting = [
            one
            for one in self._used
            if len(one[1]) == len(value.shape)
            and all(a in (None, b) for a, b in zip(one[1], value.tensor.shape))
        ]
        if not fitting:
            return None
        layer, _, bound = self._draw(st.sampled_from(fitting))
        return self._call(layer, value, bound, reusable=False)

    def _nested(self, value, depth):
        inputs = keras.Input(
            value.tensor.shape[1:], dtype=value.tensor.dtype
        )
        start = Value(inputs, value.shape, lambda *given: given)
        outer, self._used = self._used, [
            one for one in self._used if self._draw(st.booleans())
        ]
        (end, *_) = self.grow(start, self._draw(st.integers(1, 4)), depth + 1)
        self._used = outer
        model = keras.Model(inputs, end.tensor)
        return self._call(model, value, end.bound)

    def _merged(self, value, values):
        fitting = [
            one
            for one in values
            if one.tensor.shape == value.tensor.shape
            and one.shape == value.shape
            and "float" in one.tensor.dtype
            and "float" in value.tensor.dtype
        ]
        if not fitting:
            return None
        other = self._draw(st.sampled_from(fitting))
        layer = self._draw(
            st.sampled_from(
                [layers.Add, layers.Concatenate, layers.Multiply]
            )
        )()
        tensor = layer([value.tensor, other.tensor])
        shape = layer.compute_output_shape([value.shape, other.shape])

        def bound(*given):
            (a, errors), (b, others) = (
                one.bound(*given) for one in (value, other)
            )
            if isinstance(layer, layers.Multiply):
                return a * b, errors + others + 1
            return a + b, max(errors, others) + 1

        return Value(tensor, shape, bound)


_WITH_WEIGHTS = (
    layers.Dense,
    layers.Conv1D,
    layers.Conv2D,
    layers.Conv3D,
    layers.Conv1DTranspose,
    layers.Conv2DTranspose,
    layers.Conv3DTranspose,
    layers.DepthwiseConv1D,
    layers.DepthwiseConv2D,
    layers.SeparableConv1D,
    layers.SeparableConv2D,
)


def _without(options, rank):
    """Those that the layers of series, which are always channels last, take."""
    return options if rank > 1 else {}
