"""What the layer does in a call: three switches, kept apart.

Keras ties to `training` and `trainable` which statistics normalize, whether
the moving ones are updated, and whether gamma and beta train.
"""

import typing

import keras

from keras_bn.compiled_functions import CompiledFunctions


class Switch:
    """An attribute of the layer that has one of a few values.

    Args:
        *values: The values, the default first.
    """

    def __init__(self, *values):
        self._values = values

    def __set_name__(self, owner, name):
        self._name = name
        self._kept_as = f"_{name}"

    def __get__(self, layer, owner=None):
        return getattr(layer, self._kept_as, self._values[0])

    def __set__(self, layer, value):
        if not any(value is one for one in self._values):
            *others, last = map(str, self._values)
            raise ValueError(
                f"`{self._name}` must be {', '.join(others)} or {last}. "
                f"Received: {self._name}={value!r}."
            )
        if value is not self.__get__(layer):
            setattr(layer, self._kept_as, value)
            layer.switched(self._name)


class Mode(typing.NamedTuple):
    """What a call of the layer does.

    Attributes:
        training: Whether it is a training call of a layer that may train.
        normalizes_with_batch: With the batch's moments, else the moving ones.
        updates: Whether the moving statistics take the batch in.
        trains: Whether gamma and beta train.
    """

    training: bool
    normalizes_with_batch: bool
    updates: bool
    trains: bool


def mode_of(layer, training):
    """The `Mode` of a call with `training`, as the layer is set now."""
    training = bool(training and layer.trainable)
    with_batch = training
    if layer.use_moving_statistics is not None:
        with_batch = not layer.use_moving_statistics
    return Mode(
        training,
        with_batch,
        training and layer.update_moving_statistics,
        training and layer.train_gamma_and_beta,
    )


class SwitchedLayer(keras.layers.Layer):
    """A layer with `gamma` and `beta`, either may be None, and the switches.

    Setting one of them, or `trainable`, warns where it comes too late.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.gamma = None
        self.beta = None
        self._compiled_functions = CompiledFunctions()

    use_moving_statistics = Switch(None, True, False)
    update_moving_statistics = Switch(True, False)
    train_gamma_and_beta = Switch(True, False)

    @keras.layers.Layer.trainable.setter
    def trainable(self, value):
        before = self.trainable
        keras.layers.Layer.trainable.fset(self, value)
        self.mark_gamma_and_beta()
        if self.trainable != before:
            self.switched("trainable")

    def switched(self, name):
        """Puts into effect what was set, and says where it is too late."""
        if name == "train_gamma_and_beta":
            self.mark_gamma_and_beta()
        self._compiled_functions.warn_if_outdated(
            f"{name}={getattr(self, name)}",
            lambda training: mode_of(self, training),
        )

    def is_outdated_in_functions(self):
        """Whether a function in use does what the layer was set to before."""
        return self._compiled_functions.is_outdated(
            lambda training: mode_of(self, training)
        )

    def mark_gamma_and_beta(self):
        """Makes the weights trainable or not, without changing their order."""
        for weight in (self.gamma, self.beta):
            if weight is not None:
                weight.trainable = self.trainable and self.train_gamma_and_beta
