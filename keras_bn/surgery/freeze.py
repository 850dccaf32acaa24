"""Freezes, thaws and resets the moving statistics of a whole model."""

import warnings

import keras

from keras_bn.layer import BatchNormalization
from keras_bn.model_layers import batch_normalizations
from keras_bn.renormalization import copy_of
from keras_bn.renormalization import initializer_of_stddev


def freeze(model):
    """Lets batch normalization run on its moving statistics from now on.

    They normalize in training too and are no longer updated, while gamma and
    beta go on training: `use_moving_statistics=True` and
    `update_moving_statistics=False`. A `keras.layers.BatchNormalization` has
    no such switches. It gets `trainable=False`, which stops gamma and beta as
    well.

    `fit`, `evaluate` and `predict` of `model`, and of the models in it, are
    traced again and follow. Where the built-in layers' `trainable` changed
    under an optimizer that has begun to train them, the model must be compiled
    again, and a UserWarning says so.

    Args:
        model: `keras.Model` or layer; its batch normalization is found at any
            depth, in nested models, custom layers and wrappers.

    Returns:
        List of the batch-normalization layers, now frozen.

    Raises:
        ValueError: `model` is no model or layer, or holds no batch
            normalization.
    """
    return _set(model, frozen=True)


def thaw(model):
    """Undoes `freeze`.

    Batch normalization uses and updates the batch's statistics in training, as
    by default, and a `keras.layers.BatchNormalization` gets `trainable=True`,
    whatever they were before `freeze`.

    Args:
        model: As for `freeze`, like what is traced again and what is warned of.

    Returns:
        List of the batch-normalization layers, now thawed.

    Raises:
        ValueError: As `freeze`.
    """
    return _set(model, frozen=False)


def reset_statistics(model):
    """Sets the moving statistics back to what they are in a new layer.

    That is what their initializers give, drawn anew where those are random;
    the statistics and the counters of renormalization, and of averages that
    count batches, included. gamma and beta stay. On JAX a callback cannot do
    this while `fit` runs, which holds the weights itself.

    Args:
        model: As for `freeze`; built-in layers are reset too.

    Returns:
        List of the batch-normalization layers.

    Raises:
        ValueError: As `freeze`.
    """
    layers = batch_normalizations("reset_statistics", model)
    for layer in layers:
        mean = layer.moving_mean_initializer
        variance = layer.moving_variance_initializer
        stddev = initializer_of_stddev(variance)
        zeros = keras.initializers.Zeros()
        for name, initializer in (
            ("moving_mean", mean),
            ("moving_variance", variance),
            ("moving_stddev", stddev),
            ("renorm_mean", mean),
            ("renorm_stddev", stddev),
            ("num_batches_tracked", zeros),
            ("renorm_step", zeros),
        ):
            weight = getattr(layer, name, None)
            if weight is not None:
                initial = copy_of(initializer)(weight.shape, dtype=weight.dtype)
                weight.assign(initial)
    return layers


def _set(model, frozen):
    what = "freeze" if frozen else "thaw"
    layers = batch_normalizations(what, model)
    models = [x for x in model._flatten_layers() if isinstance(x, keras.Model)]
    for one in models:
        # A callback may have called, in the middle of `fit`.
        for kind in ("train", "test", "predict"):
            if getattr(one, f"{kind}_function") is not None:
                getattr(one, f"make_{kind}_function")(force=True)
    changed = []
    for layer in layers:
        if isinstance(layer, BatchNormalization):
            layer.use_moving_statistics = True if frozen else None
            layer.update_moving_statistics = not frozen
        elif layer.trainable == frozen:
            layer.trainable = not frozen
            changed.append(layer.name)
    begun = [
        x.name
        for x in models
        if x.compiled and getattr(x.optimizer, "built", False)
    ]
    if changed and begun:
        warnings.warn(
            f"`{what}` set trainable={not frozen} on layers {changed}, built "
            f"into Keras, and the optimizer of {begun} goes on with the "
            "weights that it had before; call `model.compile(...)` again.",
            stacklevel=3,
        )
    return layers
