"""What the weights of a model alone tell of its batch normalization."""

import numpy as np
from keras import ops

from keras_bn.compiled_functions import is_of_several_models
from keras_bn.diagnostics import thresholds
from keras_bn.diagnostics.audit_report import Finding
from keras_bn.diagnostics.initial_values import gamma_and_beta_have_moved
from keras_bn.diagnostics.initial_values import initial_value
from keras_bn.diagnostics.initial_values import statistics_have_moved
from keras_bn.diagnostics.initial_values import steps_of_optimizer
from keras_bn.diagnostics.recalibrate import is_frozen
from keras_bn.diagnostics.recalibrate import recalibrated_by
from keras_bn.diagnostics.replicas import disagreement
from keras_bn.switches import SwitchedLayer

# The remedy of what only labelled data can tell apart.
ASK = "keras_bn.audit(model, data, labels)"
_AT_INITIAL_VALUES = "statistics at their initial values"
RECALIBRATE = "keras_bn.recalibrate(model, data)"
_COMPILE = "model.compile(...)"


def certain(model, layers):
    """Findings that hold whatever the model does on data."""
    findings = []
    for layer in layers:
        findings += [
            *_at_initial_values(layer),
            *_not_numbers(layer),
            *_replicas(layer),
        ]
    return findings + _set_after_compile(model, layers)


def likely(model, layers):
    """Findings that data may refute."""
    steps = steps_of_optimizer(model)
    findings = []
    for layer in layers:
        findings += [
            *_too_few_steps(layer, steps),
            *_below_epsilon(layer),
            *_dead_channels(layer),
            *_orders_of_magnitude(layer),
        ]
    return findings + _frozen_beside_trainable(model, layers)


def uses_statistics(layer):
    """Whether inference normalizes with the moving statistics."""
    return getattr(layer, "use_moving_statistics", None) is not False


def _array(variable):
    return ops.convert_to_numpy(variable).astype("float64")


def _at_initial_values(layer):
    if not uses_statistics(layer) or statistics_have_moved(layer) is not False:
        return
    if is_frozen(layer):
        cause = (
            "The layer was frozen before its statistics had learned anything, "
            "so it never normalized."
        )
        remedy = "keras_bn.thaw(model)  # and train again"
    elif gamma_and_beta_have_moved(layer) is False:
        cause = (
            "The layer took no part in the training: nothing called it, or it "
            "was frozen, or it was added later."
        )
        remedy = ASK
    else:
        cause = (
            "Training never updated them: the weights were trained either "
            "with the statistics of the batch, whose updates were dropped, or "
            "in inference mode, without training=True. Labelled data tells."
        )
        remedy = ASK
    yield Finding(layer.name, _AT_INITIAL_VALUES, 1.0, 0.0, cause, remedy)


def _not_numbers(layer):
    for variable in layer.weights:
        share = 1.0 - np.mean(np.isfinite(_array(variable)))
        if share > 0:
            yield Finding(
                layer.name,
                f"share of {variable.name} that is not finite",
                float(share),
                0.0,
                "Training diverged, or met data that is not finite.",
                "model.fit(data, callbacks=[keras.callbacks.TerminateOnNaN()])",
            )
    share = np.mean(_array(layer.moving_variance) < 0)
    if share > 0:
        yield Finding(
            layer.name,
            "share of moving_variance that is negative",
            float(share),
            0.0,
            "No average of variances is negative: the weights were damaged or "
            "assigned by other means, such as an extrapolated average.",
            RECALIBRATE,
        )


def _replicas(layer):
    for variable in layer.weights:
        gap = disagreement(variable)
        if gap > thresholds.REPLICAS_DISAGREE:
            yield Finding(
                layer.name,
                f"{variable.name} differs between replicas",
                gap,
                thresholds.REPLICAS_DISAGREE,
                "Replicas assigned values of their own.",
                "keras_bn.BatchNormalization(synchronized=True)",
            )


def _too_few_steps(layer, steps):
    """The share that the initial values still have.

    Averages that count their batches leave no share to them, and nobody knows
    how many ghost batches a step had.
    """
    if (
        not steps
        or not uses_statistics(layer)
        or is_frozen(layer)
        or layer.momentum is None
        or getattr(layer, "debias", False)
        or getattr(layer, "virtual_batch_size", None) is not None
        or statistics_have_moved(layer) is False
        or recalibrated_by(layer)
    ):
        return
    share = float(layer.momentum) ** steps
    if share <= thresholds.INITIAL_SHARE:
        return
    initial = initial_value(
        layer.moving_variance_initializer, layer.moving_variance
    )
    if initial is not None:
        # A variance is at least what is left of its initial value. One that
        # is less is older than the optimizer, as after pretraining.
        left = 0.99 * share * initial
        if np.any(_array(layer.moving_variance) < left):
            return
    yield Finding(
        layer.name,
        "share of the initial values in the statistics",
        share,
        thresholds.INITIAL_SHARE,
        f"{steps} steps are too few for momentum {layer.momentum:g}, unless "
        "the optimizer is younger than the statistics.",
        RECALIBRATE,
    )


def _below_epsilon(layer):
    least = thresholds.NO_VARIANCE * layer.epsilon
    share = float(np.mean(_array(layer.moving_variance) <= least))
    if uses_statistics(layer) and share > thresholds.SHARE_WITHOUT_VARIANCE:
        yield Finding(
            layer.name,
            "share of channels with a variance far below epsilon",
            share,
            thresholds.SHARE_WITHOUT_VARIANCE,
            "What the layer is given hardly varies: units before it are dead, "
            "or its scale is far below epsilon.",
            "keras_bn.BatchNormalization(epsilon=1e-5)  # and train again",
        )


def _dead_channels(layer):
    if layer.gamma is None:
        return
    share = float(np.mean(np.abs(_array(layer.gamma)) < thresholds.DEAD_GAMMA))
    if share > thresholds.SHARE_DEAD:
        yield Finding(
            layer.name,
            "share of channels with gamma near 0",
            share,
            thresholds.SHARE_DEAD,
            "The layer puts out beta alone there: regularization or a high "
            "learning rate drove gamma to 0.",
            "keras_bn.BatchNormalization(gamma_regularizer=None)"
            "  # and train again",
        )


def _orders_of_magnitude(layer):
    variance = _array(layer.moving_variance) + layer.epsilon
    gamma = np.ones(0)
    if layer.gamma is not None:
        gamma = np.abs(_array(layer.gamma))
    for name, values, threshold in (
        (
            "gamma",
            gamma[gamma >= thresholds.DEAD_GAMMA],
            thresholds.GAMMA_ORDERS,
        ),
        (
            "moving_variance",
            variance[variance > 0],
            thresholds.VARIANCE_ORDERS,
        ),
    ):
        values = values[np.isfinite(values)]
        if not len(values):
            continue
        orders = float(np.log10(values.max() / values.min()))
        if orders > threshold:
            yield Finding(
                layer.name,
                f"orders of magnitude that {name} spans",
                orders,
                threshold,
                "Channels of very different scale: inputs that were not "
                "scaled, or training that nearly diverged.",
                "keras.layers.Rescaling(1 / 255)"
                "  # before the first layer, and train again",
            )


def _frozen_beside_trainable(model, layers):
    """Frozen layers above weights that train, while others are not frozen.

    Frozen as a whole the batch normalization of a model is a choice, and so it
    is below everything that trains: nothing that it is given changes.
    """
    if len({is_frozen(x) for x in layers}) < 2:
        return []
    findings, trains = [], False
    for layer in model._flatten_layers(include_self=False):
        if any(layer is x for x in layers) and is_frozen(layer):
            if trains and uses_statistics(layer):
                findings.append(
                    Finding(
                        layer.name,
                        "frozen, while others before it train",
                        1.0,
                        0.0,
                        "What the layer is given changes as the weights before "
                        "it train, and its statistics stay.",
                        "keras_bn.thaw(model)  # or keras_bn.freeze(model)",
                    )
                )
        elif not list(layer._flatten_layers(include_self=False)):
            trains = trains or bool(layer.trainable_variables)
    return findings


def _set_after_compile(model, layers):
    findings = []
    known = _variables_of_optimizer(model)
    for layer in layers:
        change = _changed_after_compile(model, layer, known)
        if change is not None:
            findings.append(
                Finding(
                    layer.name,
                    f"{change} after compile",
                    1.0,
                    0.0,
                    "The optimizer, or a function that was compiled before, "
                    "goes on as the layer was then.",
                    _COMPILE,
                )
            )
    return findings


def _variables_of_optimizer(model):
    """Ids of the variables that an optimizer in use trains, or None."""
    optimizer = getattr(model, "optimizer", None)
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if optimizer is None or not optimizer.built:
        return None
    return {id(v) for v in optimizer._trainable_variables}


def _changed_after_compile(model, layer, known):
    weights = [v for v in (layer.gamma, layer.beta) if v is not None]
    if known is not None and weights:
        trained = id(weights[0]) in known
        # What an optimizer knows of is trained where the layer allows it.
        trainable = layer.trainable and weights[0].trainable
        if trained != trainable and not is_of_several_models(layer, model):
            return "thawed" if trainable else "frozen"
    if isinstance(layer, SwitchedLayer) and layer.outdated_functions(model):
        return "frozen" if is_frozen(layer) else "switched"
    return None
