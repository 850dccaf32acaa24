"""Moving statistics computed anew, for the weights as they are."""

import dataclasses
import weakref

import numpy as np
from keras import ops

from keras_bn.argument_checks import flag
from keras_bn.argument_checks import shown
from keras_bn.diagnostics.batches import BATCH_SIZE
from keras_bn.diagnostics.batches import Batches
from keras_bn.diagnostics.distances import log_ratio
from keras_bn.diagnostics.distances import mean_distance
from keras_bn.diagnostics.forward_passes import ForwardPasses
from keras_bn.diagnostics.moments_of_data import MergedMoments
from keras_bn.diagnostics.scores import Comparison
from keras_bn.diagnostics.text_table import text_table
from keras_bn.diagnostics.thresholds import SCORE_LOST
from keras_bn.model_layers import built_batch_normalizations

# From a layer to the variance that it was given here, and by which method.
_given = weakref.WeakKeyDictionary()
# From a model to the variances for which the labels spoke.
_refused = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True)
class RecalibratedLayer:
    """What `recalibrate` did to one layer.

    Attributes:
        layer: Name of the layer.
        positions: Float, how many positions of a channel the statistics are
            of: the largest count of all channels.
        mean_distance: Float, how far the moving means were off: the root mean
            square over channels of the difference, in standard deviations
            `sqrt(variance + epsilon)` of the data.
        variance_log_ratio: Float, the same of `log((old variance + epsilon) /
            (new variance + epsilon))`.
    """

    layer: str
    positions: float
    mean_distance: float
    variance_log_ratio: float


class Recalibration(list):
    """A `RecalibratedLayer` for each layer, in order; printed as a table."""

    def __str__(self):
        return text_table(
            ["layer", "positions", "means off by", "log variance off by"],
            [
                [
                    one.layer,
                    f"{one.positions:,.0f}",
                    f"{one.mean_distance:.3g}",
                    f"{one.variance_log_ratio:.3g}",
                ]
                for one in self
            ],
        )


def recalibrate(
    model,
    data,
    steps=None,
    method="batch",
    labels=None,
    force=False,
    frozen=False,
    batch_size=BATCH_SIZE,
    verbose=1,
):
    """Sets the moving statistics to the moments of `data`, without training.

    Wu & Johnson, 2021, arXiv 2105.07576, section 3, compare them with moving
    averages and call the first method "precise" statistics. On data of another
    domain this is AdaBN (Li et al., 2016, arXiv 1603.04779). All else runs as
    in inference: dropout is off, and no other weight changes.

    The moments of all batches merge in float64 by counts, means and squared
    deviations (Chan, Golub & LeVeque, 1979), so that batches may differ in
    size. A layer that is called several times gets those of all its inputs.
    Channels of which the data shows nothing, as under a mask, keep what they
    have. Counters of batches are set to the batches read.

    Args:
        model: `keras.Model` or layer, built; its batch normalization, of ours
            or built into Keras, is found at any depth.
        data: Training data without augmentation: array, list, tuple,
            dictionary or nested structure of arrays, `tf.data.Dataset`,
            `keras.utils.PyDataset`, `torch.utils.data.DataLoader` or
            generator. A few thousand samples will do.
        steps: Int, how many batches to read; None: all.
        method: `"batch"`: one pass, in which each batch is normalized with its
            own moments, as in training; for batches of the size of training,
            or larger. `"layerwise"`: one pass for each layer, in which the
            layers before it normalize with their new statistics, as inference
            will; for batches that are so small that the moments of one (the
            variance is 7% off at 8 samples) would be carried into the layers
            above.
        labels: Array of labels, one for each sample of arrays, or a structure
            of them for several outputs; other data brings its own. With labels
            the batch's statistics are compared with the moving ones first, by
            the score that `audit` describes.
        force: Whether to go on where the labels say that the weights were
            trained for the moving statistics.
        frozen: Whether layers that do not update in training either
            (`trainable=False`, or our switches) are recalibrated too.
        batch_size: Int, samples in a batch of arrays.
        verbose: 1 for a progress bar, where the number of batches is known;
            0 for none.

    Returns:
        `Recalibration`: a `RecalibratedLayer` for each layer.

    Raises:
        ValueError: an argument is not one of the above; the model has no batch
            normalization, is not built, or all of it is frozen; the data is
            empty, ends before `steps`, is not finite, not what the model
            takes, or makes inputs of a layer that are not finite; a layer is
            called in a loop that the framework compiles; the labels cannot be
            scored, or say that inference is better than the batch's
            statistics. In every case, interrupted too, the statistics stay
            what they were.
    """
    return recalibrate_by(
        ForwardPasses(model),
        data,
        steps,
        method,
        labels,
        force,
        frozen,
        batch_size,
        verbose,
    )


def recalibrate_by(
    forward_passes,
    data,
    steps,
    method,
    labels,
    force,
    frozen,
    batch_size,
    verbose,
):
    """`recalibrate` by `ForwardPasses` of the model, which can be kept."""
    model = forward_passes.model
    checked_method(method)
    force, frozen = flag("force", force), flag("frozen", frozen)
    every_layer = built_batch_normalizations("recalibrate", model)
    layers = [x for x in every_layer if frozen or not is_frozen(x)]
    if not layers:
        raise ValueError(
            "All batch normalization in the model is frozen. Received: "
            f"frozen=False, layers {[x.name for x in every_layer]}. Give "
            "`frozen=True` to recalibrate it nevertheless."
        )
    batches = Batches(data, labels, steps, batch_size, verbose=verbose)
    passes = _Passes(forward_passes, every_layer, layers, batches)
    before = [
        (variable, ops.convert_to_numpy(variable))
        for layer in layers
        for variable in layer.non_trainable_variables
    ]
    try:
        if method == "batch":
            moments = passes.with_batch(compares=not force)
            for layer in layers:
                set_statistics(layer, moments[layer], method)
        else:
            moments = passes.layer_by_layer(compares=not force)
    except BaseException:
        for variable, value in before:
            variable.assign(value)
        raise
    values = {id(variable): value for variable, value in before}
    return Recalibration(
        _what_changed(layer, moments[layer], values) for layer in layers
    )


def checked_method(method):
    """Raises ValueError for what is no method of `recalibrate`."""
    if not isinstance(method, str) or method not in ("batch", "layerwise"):
        raise ValueError(
            '`method` must be "batch" or "layerwise". '
            f"Received: method={shown(method)}."
        )


def is_frozen(layer):
    """Whether training leaves the moving statistics of a layer alone."""
    return not (
        layer.trainable and getattr(layer, "update_moving_statistics", True)
    )


def set_statistics(layer, moments, method):
    """Assigns `MergedMoments` where they hold positions.

    As many batches count as there were parts, the statistics that
    renormalization corrects by are set too, and an `unbiased_variance` is
    divided by N - 1.
    """
    variance = moments.variance
    if getattr(layer, "unbiased_variance", False):
        variance = variance * moments.count / np.maximum(moments.count - 1, 1)
    stddev = np.sqrt(variance + layer.epsilon)
    for name, value in (
        ("moving_mean", moments.mean),
        ("moving_variance", variance),
        ("moving_stddev", stddev),
        ("renorm_mean", moments.mean),
        ("renorm_stddev", stddev),
        ("num_batches_tracked", moments.parts),
    ):
        variable = getattr(layer, name, None)
        if variable is not None:
            old = ops.convert_to_numpy(variable)
            new = np.where(moments.count > 0, value, old.reshape(-1))
            variable.assign(new.reshape(old.shape).astype(old.dtype))
    _given[layer] = _variance(layer), method


def recalibrated_by(layer):
    """The method, if the layer has what it was given in this process."""
    given, method = _given.get(layer, (None, None))
    return method if np.array_equal(given, _variance(layer)) else None


def was_refused(model, layers):
    """Whether the labels spoke for the statistics that the layers have."""
    return _refused.get(model) == _all_variances(layers)


def _variance(layer):
    return np.array(ops.convert_to_numpy(layer.moving_variance))


def _all_variances(layers):
    return b"".join(_variance(x).tobytes() for x in layers)


class _Passes:
    def __init__(self, forward_passes, every_layer, layers, batches):
        self._model = forward_passes.model
        self._every_layer = every_layer
        self._layers = layers
        self._batches = batches
        self._in_inference = forward_passes.get(every_layer)
        self._with_batch = forward_passes.get(every_layer, layers)

    def with_batch(self, compares):
        """`MergedMoments` of each layer, by one pass."""
        comparison = Comparison(self._model)
        moments = _none_yet(self._layers)
        for batch in self._batches:
            outputs, _, of_calls = self._with_batch(batch.inputs)
            _add(of_calls, moments)
            if compares and batch.labels is not None:
                before, masks, _ = self._in_inference(batch.inputs)
                comparison.add(before, outputs, batch, masks)
        self._refuse_where_inference_is_better(comparison)
        _check_finite(moments)
        return moments

    def layer_by_layer(self, compares):
        """The same; each layer has its new statistics when the next is read."""
        if compares:
            self.with_batch(compares)
        done, to_do = {}, None
        while to_do is None or to_do:
            moments, order = _none_yet(self._layers), {}
            for batch in self._batches:
                *_, of_calls = self._in_inference(batch.inputs)
                _add(of_calls, moments)
                order.update((layer, None) for layer, *_ in of_calls)
            if to_do is None:
                to_do = [x for x in order if x in moments]
            if not to_do:
                break
            layer = to_do.pop(0)
            _check_finite({layer: moments[layer]})
            done[layer] = moments[layer]
            set_statistics(layer, moments[layer], "layerwise")
        for layer in moments.keys() - done.keys():
            # The data does not reach it.
            set_statistics(layer, moments[layer], "layerwise")
        return {**moments, **done}

    def _refuse_where_inference_is_better(self, comparison):
        if comparison.better(by=SCORE_LOST) != "in_inference":
            return
        _refused[self._model] = _all_variances(self._every_layer)
        digits = ".3f" if comparison.name == "accuracy" else ".3g"
        raise ValueError(
            "The weights were trained for the moving statistics that they "
            f"have: {comparison.name} is {comparison.in_inference:{digits}} "
            f"in inference and {comparison.with_batch:{digits}} with the "
            "statistics of the batch. Received: force=False. Train with "
            "training=True, or recalibrate nevertheless with force=True."
        )


def _none_yet(layers):
    return {
        layer: MergedMoments(int(np.prod(layer.moving_mean.shape)))
        for layer in layers
    }


def _add(of_calls, moments):
    for layer, *of_call in of_calls:
        if layer in moments:
            moments[layer].add(*of_call)


def _check_finite(moments):
    for layer, merged in moments.items():
        if not np.isfinite([merged.mean, merged.variance]).all():
            raise ValueError(
                "The model makes values of the data that are not finite. "
                f"Received: NaN or infinity in the inputs of {layer.name!r}. "
                "Look for weights that diverged, or scale the data."
            )


def _what_changed(layer, moments, before):
    counted = moments.count > 0
    mean, variance = (
        before[id(v)].reshape(-1)[counted]
        for v in (layer.moving_mean, layer.moving_variance)
    )
    new_mean, new_variance = moments.mean[counted], moments.variance[counted]
    return RecalibratedLayer(
        layer.name,
        float(moments.count.max()),
        mean_distance(mean, new_mean, new_variance, layer.epsilon),
        log_ratio(variance, new_variance, layer.epsilon),
    )

