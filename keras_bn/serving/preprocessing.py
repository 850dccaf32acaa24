"""What a model's inputs go through before they reach it, in the graph too."""

import keras
import numpy as np
from keras import ops


@keras.saving.register_keras_serializable(package="keras_bn")
class Standardization(keras.layers.Layer):
    """`(inputs - mean) * (1 / deviation)` in float32.

    The constants are rounded to float32 once, and the difference is taken
    before the product: NumPy's float32 gives the same bits.

    Args:
        mean: Number, or a list of one for each channel (the last axis).
        deviation: The same, not zero.
    """

    def __init__(self, mean, deviation, **kwargs):
        super().__init__(**{"dtype": "float32", **kwargs})
        self.mean = mean
        self.deviation = deviation

    def call(self, inputs):
        shift = np.float32(self.mean)
        factor = np.float32(1.0 / np.float64(self.deviation))
        return (inputs - ops.convert_to_tensor(shift)) * factor

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return super().get_config() | {
            "mean": self.mean,
            "deviation": self.deviation,
        }


def preprocessing_model(preprocessing, model):
    """The model that `preprocessing` stands for, or None.

    Args:
        preprocessing: As for `export_saved_model`.
        model: The functional or sequential model that its outputs go to.

    Returns:
        `keras.Model` with `inputs` and `outputs`, one of each, or None.

    Raises:
        ValueError: It is none of the forms; or does not fit the model.
    """
    if preprocessing is None:
        return None
    if len(model.inputs) != 1:
        raise ValueError(
            "`preprocessing` is for a model with one input. Received: a model "
            f"with inputs {[x.name for x in model.inputs]}. Make a functional "
            "model that preprocesses each of them, and export that."
        )
    (takes,) = model.inputs
    if isinstance(preprocessing, keras.Model) and preprocessing.built:
        made = preprocessing
    else:
        if not isinstance(preprocessing, keras.layers.Layer):
            preprocessing = _standardization(preprocessing, takes.shape)
        inputs = keras.Input(takes.shape[1:], dtype="float32")
        made = keras.Model(inputs, preprocessing(inputs))
    if not (len(getattr(made, "inputs", ())) == 1 and len(made.outputs) == 1):
        raise ValueError(
            "`preprocessing` must be a functional or sequential model with "
            f"one input and one output. Received: preprocessing={made!r}."
        )
    gives = made.outputs[0].shape
    if len(gives) != len(takes.shape) or any(
        a is not None and b is not None and a != b
        for a, b in zip(gives[1:], takes.shape[1:])
    ):
        raise ValueError(
            "`preprocessing` must give what the model takes. Received: "
            f"preprocessing to shape {gives}, and a model of inputs "
            f"{takes.shape}."
        )
    return made


def _standardization(pair, shape):
    try:
        mean, deviation = (np.asarray(x, "float64") for x in pair)
    except (TypeError, ValueError):
        raise ValueError(
            "`preprocessing` must be a pair (mean, deviation), a Keras layer "
            f"or a Keras model. Received: preprocessing={pair!r}."
        ) from None
    for name, value in (("mean", mean), ("deviation", deviation)):
        if value.shape not in ((), (1,), shape[-1:]):
            raise ValueError(
                f"`preprocessing`: the {name} must be a number, or one for "
                f"each of {shape[-1]} channels. "
                f"Received: {name}={value.tolist()}."
            )
        if not np.all(np.isfinite(value)) or (
            name == "deviation" and np.any(value <= 0.0)
        ):
            raise ValueError(
                f"`preprocessing`: the {name} must be finite, and the "
                "deviation above zero. "
                f"Received: {name}={value.tolist()}."
            )
    return Standardization(mean.tolist(), deviation.tolist())
