"""What data tells of a model's batch normalization, by one reading of it."""

import dataclasses

import keras
import numpy as np

from keras_bn.diagnostics import thresholds
from keras_bn.diagnostics.audit_report import Finding
from keras_bn.diagnostics.audit_report import LayerDistance
from keras_bn.diagnostics.audit_report import Scores
from keras_bn.diagnostics.distances import log_ratio
from keras_bn.diagnostics.distances import mean_distance
from keras_bn.diagnostics.forward_passes import ForwardPass
from keras_bn.diagnostics.forward_passes import called_for_training
from keras_bn.diagnostics.moments_of_data import MergedMoments
from keras_bn.diagnostics.output_gaps import OutputGap
from keras_bn.diagnostics.recalibrate import is_frozen
from keras_bn.diagnostics.recalibrate import recalibrated_by
from keras_bn.diagnostics.recalibrate import was_refused
from keras_bn.diagnostics.scores import Comparison
from keras_bn.diagnostics.weight_checks import ASK
from keras_bn.diagnostics.weight_checks import RECALIBRATE
from keras_bn.diagnostics.weight_checks import uses_statistics
from keras_bn.moving_statistics import as_vector

WITH_BATCH, IN_INFERENCE, UNKNOWN = "with batch", "in inference", "unknown"
REFUSED = "refused"


@dataclasses.dataclass(frozen=True)
class OnData:
    """What the model does on data.

    Attributes:
        layers: List of `LayerDistance`, of the inputs that batch statistics
            make.
        output_gap: Float.
        scores: `Scores` or None.
        samples: Int.
        better: Which statistics serve the weights better, where the moving
            ones are not those of the data: `WITH_BATCH`, `IN_INFERENCE`, or
            `UNKNOWN`. None: the difference is below the thresholds, or due to
            something else.
        frozen: Whether all layers whose statistics are not those of the data
            are frozen, or were recalibrated already.
        tried: What a recalibration of these layers would repeat: `"batch"` or
            `"layerwise"`, the method by which they have their statistics, or
            `REFUSED`, where the labels spoke for them; else None.
        unscored: Whether there are labels that could not be scored.
    """

    layers: list
    output_gap: float
    scores: Scores | None
    samples: int
    better: str | None
    frozen: bool
    tried: str | None
    unscored: bool


def look_at(model, layers, batches, labels_are_given):
    """`OnData`, from two forward passes over each batch.

    Args:
        model: `keras.Model` or layer, built.
        layers: List of its batch normalization.
        batches: `Batches`.
        labels_are_given: Whether it is an error if they cannot be scored.
    """
    # Layers that are frozen beside others run in training as in inference.
    with_batch = [x for x in layers if not is_frozen(x)] or layers
    passes = [
        ForwardPass(model, layers),
        ForwardPass(model, layers, with_batch),
    ]
    # Of the inputs that inference and that the batch's statistics make.
    moments = [_none_yet(layers) for _ in passes]
    comparison, gap, samples = Comparison(model), OutputGap(), 0
    for batch in batches:
        outputs = []
        for one, merged in zip(passes, moments):
            of_pass, masks, of_calls = one(batch.inputs)
            outputs.append(of_pass)
            for layer, *of_call in of_calls:
                merged[layer].add(*of_call)
        gap.add(*outputs)
        if batch.labels is not None and comparison is not None:
            try:
                comparison.add(*outputs, batch, masks)
            except ValueError:
                if labels_are_given:
                    raise
                comparison = None
        samples += batch.samples
    in_inference, in_training = (
        [_distance(layer, of_layers[layer]) for layer in layers]
        for of_layers in moments
    )
    off = [
        layer
        for layer, distance in zip(layers, in_inference)
        if uses_statistics(layer) and _is_off(distance)
    ]
    # In inference a deep layer is given the sum of what all before it are off
    # by. Outputs that differ by that alone tell nothing; a score lost does.
    one_is_off_itself = any(
        _is_off(distance)
        for layer, distance in zip(layers, in_training)
        if layer in off
    )
    scores = _scores(comparison)
    return OnData(
        [
            distance
            for layer, distance in zip(layers, in_training)
            if distance.positions and uses_statistics(layer)
        ],
        gap.value,
        scores,
        samples,
        _better(
            model,
            layers,
            off,
            gap.value if one_is_off_itself else 0.0,
            scores,
            batch.inputs,
        ),
        all(is_frozen(x) for x in _untried(off) or off),
        _tried(model, layers, off, dict(zip(layers, in_training))),
        comparison is None,
    )


def findings_of(on_data):
    """Findings of the whole model, and of the layers that are off."""
    if on_data.better is None:
        return []
    effects = _effects(on_data.output_gap, on_data.scores)
    measures = [(None, *effect) for effect in effects]
    for one in on_data.layers:
        measures += [
            (
                one.layer,
                "standard deviations that means are off by",
                one.mean_distance,
                thresholds.MEAN_DISTANCE,
            ),
            (
                one.layer,
                "log variance that is off by",
                one.variance_log_ratio,
                thresholds.VARIANCE_LOG_RATIO,
            ),
        ]
    cause, remedy = cause_and_remedy(on_data)
    return [
        Finding(*one, cause, remedy)
        for one in measures
        # What is not a number is above any threshold.
        if not one[2] <= one[3]
    ]


def _effects(gap, scores):
    """What is measured, the measure and the threshold of each effect."""
    yield (
        "standard deviations between the modes' outputs",
        gap,
        thresholds.OUTPUT_GAP,
    )
    if scores is None:
        return
    lost = f"{scores.name} lost"
    if scores.name == "loss":
        lost = "logarithm of the loss gained"
    in_inference = scores.lost_with_batch < 0
    yield (
        f"{lost} with the {'moving' if in_inference else 'batch'} statistics",
        abs(scores.lost_with_batch),
        scores.threshold,
    )


def cause_and_remedy(on_data):
    """Sentences, by which statistics serve the weights better."""
    if on_data.better == WITH_BATCH:
        return _stale(on_data)
    if on_data.better == IN_INFERENCE:
        return _TRAINED_FOR_THEM, TRAIN_AGAIN
    if on_data.better is None and on_data.scores is not None:
        if on_data.tried == REFUSED:
            return _TRAINED_FOR_THEM, TRAIN_AGAIN
        return (
            "Training never updated them, and on this data that costs next "
            "to nothing.",
            "keras_bn.recalibrate(model, data, labels=labels)",
        )
    cause = (
        "Either the moving statistics are stale, or the weights were trained "
        "in inference mode, without training=True. "
    )
    if on_data.scores is not None:
        return (
            cause + "More labels than these tell which.",
            "keras_bn.audit(model, more_data, more_labels)",
        )
    if on_data.unscored:
        return (
            cause + "The labels tell which, once the model has its loss.",
            f"model.compile(loss=...)  # then {ASK}",
        )
    return cause + "Labels tell which.", ASK


_TRAINED_FOR_THEM = (
    "The weights were trained in inference mode, for the moving statistics as "
    "they are; other statistics would destroy the model."
)
TRAIN_AGAIN = (
    "model(inputs, training=True)  # in the training loop, and train again"
)


def _stale(on_data):
    """The remedy is none that was tried."""
    also = ", frozen=True" if on_data.frozen else ""
    if on_data.tried is None:
        return (
            "The moving statistics are stale: their updates were dropped, too "
            "few for the momentum, or learned on other data.",
            RECALIBRATE.replace(")", f"{also})"),
        )
    if on_data.tried == REFUSED:
        return (
            "The moving statistics are stale; `recalibrate` refused on "
            "batches that were small or sorted, or on other labels.",
            'keras_bn.recalibrate(model, data, method="layerwise", '
            f"force=True{also})",
        )
    if on_data.tried == "batch":
        return (
            "The moving statistics are those of batches that were small or "
            "sorted, or of other data.",
            f'keras_bn.recalibrate(model, data, method="layerwise"{also})',
        )
    return (
        "The moving statistics were recalibrated on data unlike this.",
        f"keras_bn.recalibrate(model, data_like_this{also})",
    )


def _untried(layers):
    return [x for x in layers if recalibrated_by(x) is None]


def _tried(model, layers, off, in_training):
    """See `OnData.tried`.

    Args:
        off: Those of the layers whose statistics are not those of the data.
        in_training: From each layer to its `LayerDistance` from the inputs
            that batch statistics make.
    """
    if was_refused(model, layers):
        return REFUSED
    if not off:
        return None
    untried = _untried(off)
    if not untried:
        methods = {recalibrated_by(x) for x in off}
        return "batch" if "batch" in methods else "layerwise"
    most = thresholds.AS_RECALIBRATED
    # Of files too, whose past nobody knows.
    as_by_batches = all(
        in_training[x].mean_distance <= most
        and in_training[x].variance_log_ratio <= most
        for x in untried
    )
    return "batch" if as_by_batches else None


def _better(model, layers, off, gap, scores, inputs):
    effects = _effects(gap, scores)
    if not off or all(found <= most for _, found, most in effects):
        return None
    lost = 0.0
    if scores is not None:
        lost = scores.lost_with_batch
        if abs(lost) <= thresholds.STANDARD_ERRORS * scores.standard_error:
            lost = 0.0
    if lost < 0:
        return WITH_BATCH
    # Weights that were trained above frozen layers are made for them.
    called = called_for_training(model, layers, inputs)
    if all(is_frozen(x) or x not in called for x in off):
        return None
    return IN_INFERENCE if lost > 0 else UNKNOWN


def _is_off(distance):
    # What is not a number is off.
    return not (
        distance.mean_distance <= thresholds.MEAN_DISTANCE
        and distance.variance_log_ratio <= thresholds.VARIANCE_LOG_RATIO
    )


def _none_yet(layers):
    return {
        layer: MergedMoments(int(np.prod(layer.moving_mean.shape)))
        for layer in layers
    }


def _distance(layer, moments):
    seen = moments.count > 0
    mean, variance = moments.mean[seen], moments.variance[seen]
    moving_mean, moving_variance = (
        keras.ops.convert_to_numpy(as_vector(v, "float32"))[seen]
        for v in (layer.moving_mean, layer.moving_variance)
    )
    return LayerDistance(
        layer.name,
        float(moments.count.max()),
        mean_distance(moving_mean, mean, variance, layer.epsilon),
        log_ratio(moving_variance, variance, layer.epsilon),
    )


def _scores(comparison):
    if comparison is None or not comparison.counted:
        return None
    return Scores(
        comparison.name,
        comparison.in_inference,
        comparison.with_batch,
        comparison.lost_with_batch(),
        comparison.standard_error(),
        comparison.least(),
    )

