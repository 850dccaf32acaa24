"""What a layer began with, and whether it was trained since."""

import keras
import numpy as np
from keras import ops

_Random = keras.src.initializers.random_initializers.RandomInitializer


def initial_value(initializer, variable):
    """Array of the shape of `variable`, or None where nobody knows.

    Nobody does where the initializer draws without a seed of its own, or is
    a function of the user's, which might: asking would use up random numbers.
    """
    if not isinstance(initializer, keras.initializers.Initializer):
        return None
    if not type(initializer).__module__.startswith("keras."):
        return None
    if isinstance(initializer, _Random) and not isinstance(
        initializer._init_seed, int
    ):
        return None
    value = initializer(tuple(variable.shape), dtype=variable.dtype)
    return ops.convert_to_numpy(value)


def has_moved(layer, name):
    """Whether a weight differs from its initial value; None if unknown.

    Args:
        layer: Batch-normalization layer, built.
        name: "gamma", "beta", "moving_mean" or "moving_variance".
    """
    variable = getattr(layer, name)
    if variable is None:
        return None
    initializer = getattr(layer, f"{name}_initializer")
    initial = initial_value(initializer, variable)
    if initial is None:
        return None
    return not np.array_equal(ops.convert_to_numpy(variable), initial)


def statistics_have_moved(layer):
    """The same of the mean and the variance together."""
    moved = {has_moved(layer, x) for x in ("moving_mean", "moving_variance")}
    if True in moved:
        return True
    return None if None in moved else False


def gamma_and_beta_have_moved(layer):
    """The same of gamma and beta; None where the layer has neither."""
    moved = {has_moved(layer, x) for x in ("gamma", "beta")}
    if True in moved:
        return True
    return False if False in moved else None


def steps_of_optimizer(model):
    """How often the optimizer of a model was called; 0 where it has none."""
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        return 0
    # `iterations` leaves out those that only accumulate gradients.
    return int(ops.convert_to_numpy(optimizer._iterations))


def was_trained(model, layers):
    """Whether gamma or beta moved, or the optimizer counted a step.

    Where no layer has a gamma or beta that tells, moving statistics do.
    """
    if steps_of_optimizer(model):
        return True
    moved = [gamma_and_beta_have_moved(x) for x in layers]
    if all(x is None for x in moved):
        moved = [statistics_have_moved(x) for x in layers]
    return any(moved)
