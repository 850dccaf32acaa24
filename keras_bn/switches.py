"""What the layer does in a call: three switches, kept apart.

Keras ties to `training` and `trainable` which statistics normalize, whether
the moving ones are updated, and whether gamma and beta train.
"""

import typing

import keras

from keras_bn.compiled_functions import CompiledFunctions
from keras_bn.compiled_functions import warn_of_own_functions
from keras_bn.compiled_functions import warn_when_run


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


class Settings(typing.NamedTuple):
    """What is set on a layer that makes a difference to a call."""

    use_moving_statistics: bool | None
    update_moving_statistics: bool
    train_gamma_and_beta: bool
    trainable: bool

    def mode(self, training):
        """The `Mode` of a call with `training`."""
        training = bool(training and self.trainable)
        with_batch = training
        if self.use_moving_statistics is not None:
            with_batch = not self.use_moving_statistics
        return Mode(
            training,
            with_batch,
            training and self.update_moving_statistics,
            training and self.train_gamma_and_beta,
        )

    def that_differ(self, others, training):
        """The names of those that by themselves make another `Mode`."""
        mode = self.mode(training)
        return [
            name
            for name, value in others._asdict().items()
            if self._replace(**{name: value}).mode(training) != mode
        ]


class SwitchedLayer(keras.layers.Layer):
    """A layer with `gamma` and `beta`, either may be None, and the switches.

    Where one of them, or `trainable`, is set too late for a function that was
    compiled, a UserWarning says so: when a model runs it, or, for a function of
    the user's own, when the switch is set.
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
        own = False
        for trace, names in self.outdated_functions():
            if trace.model is not None:
                warn_when_run(trace, self)
            else:
                own = own or name in names
        # Of a function of the user's own nobody knows whether it will be run,
        # nor whom `trainable` is meant for.
        if own and name != "trainable":
            warn_of_own_functions(f"{name}={getattr(self, name)}")

    def settings(self):
        """The `Settings` as they are now."""
        return Settings(
            self.use_moving_statistics,
            self.update_moving_statistics,
            self.train_gamma_and_beta,
            self.trainable,
        )

    def outdated_functions(self, model=None):
        """`CompiledFunctions.outdated` of this layer."""
        return self._compiled_functions.outdated(self, model)

    def mark_gamma_and_beta(self):
        """Makes the weights trainable or not, without changing their order."""
        for weight in (self.gamma, self.beta):
            if weight is not None:
                weight.trainable = self.trainable and self.train_gamma_and_beta
