"""Folds batch normalization into its neighbours, for inference."""

import keras

from keras_bn.model_layers import BATCH_NORMALIZATIONS
from keras_bn.model_layers import built_batch_normalizations
from keras_bn.surgery.calls import TrainingArguments
from keras_bn.surgery.calls import graphs_of
from keras_bn.surgery.calls import is_graph
from keras_bn.surgery.calls import uses_of
from keras_bn.surgery.cloning import ModelCloner
from keras_bn.surgery.cloning import check_is_graph
from keras_bn.surgery.cloning import copy_own_state
from keras_bn.surgery.convert import refuse_infinite_weights
from keras_bn.surgery.fold_plan import FoldPlan
from keras_bn.surgery.fold_report import KEPT
from keras_bn.surgery.fold_report import FoldReport
from keras_bn.surgery.fold_report import LayerFold
from keras_bn.surgery.inference_layers import BorderPadding
from keras_bn.surgery.inference_layers import ScaleAndShift
from keras_bn.surgery.linear_layers import padding_at_border
from keras_bn.surgery.past_layers import channel_axis
from keras_bn.surgery.past_layers import paddings_of


def fold(model):
    """Makes a model for inference without batch normalization.

    With moving statistics it is `x * scale + shift` for each channel. That
    goes into the weights of the Dense, convolution, depthwise, separable or
    transposed convolution before it, if its activation is linear, and else
    into the Dense or convolution after it. Dropout, pooling, flatten, reshape,
    permute, cropping and zero padding in between are crossed where the result
    stays the same: max-pooling unless a gamma is negative, zero padding, a
    convolution's own too, by padding with `-shift / scale` of each channel.
    What cannot be folded becomes one multiplication and addition. The weights
    are computed in float64 and rounded once. What `model(inputs)` runs in
    training mode, because a call in it was made with `training=True`, is kept.

    Args:
        model: Functional or Sequential `keras.Model` that is built, with
            batch normalization of ours or built into Keras; nested models are
            folded one by one. It is left as it is.

    Returns:
        `keras.Model` with weights of its own, that gives the same outputs in
        inference, up to rounding, is not compiled and not meant for training.
        Its attribute `fold_report`, which is not saved with it, is a sequence
        of what became of each batch normalization, and why; `print` shows a
        table.

    Raises:
        ValueError: the model is not built, has no batch normalization or is
            subclassed; a layer cannot be cloned; weights of batch
            normalization are not finite.
    """
    for layer in built_batch_normalizations("fold", model):
        refuse_infinite_weights("fold", layer)
    folder = _Folder(model)
    new = folder.cloner.clone(model)
    folder.set_weights()
    new.fold_report = folder.report
    return new


class _Folder:
    """Makes the layers of the folded model."""

    def __init__(self, model):
        check_is_graph("fold", model)
        graphs = graphs_of(model)
        training = TrainingArguments(model)
        self.cloner = ModelCloner(
            "fold",
            self._instead_of,
            keep_class=False,
            # A layer that is gone no longer decides for those after it.
            training=training.of_calls if training.layers else None,
        )
        uses = uses_of(graphs.values())
        self._plans = {}
        self._weights = []
        report = []
        for path, graph in graphs.items():
            plan = FoldPlan(graph, path, uses, training.layers)
            report += plan.report
            report += _kept_inside(graph, path)
            for operation in graph.operations:
                self._plans[id(operation)] = plan
        self.report = FoldReport(report)
        self._names = {layer.name for layer in model._flatten_layers()}

    def _instead_of(self, layer):
        plan = self._plans.get(id(layer))
        if plan is None:
            return None
        if id(layer) in plan.removed:
            if plan.keeps_place(layer):
                return [
                    keras.layers.Identity(
                        name=layer.name, dtype=layer.compute_dtype
                    )
                ]
            return []
        if id(layer) in plan.multiply_adds:
            return [self._multiply_add(layer, plan.multiply_adds[id(layer)])]
        if id(layer) in plan.borders:
            border = plan.borders[id(layer)]
            rank = layer.input_spec.ndim - 1
            return [
                self._padding(
                    layer, paddings_of(layer, rank), border, layer.name
                )
            ]
        if id(layer) in plan.linears:
            return self._linear(layer, plan.linears[id(layer)], plan)
        return None

    def _multiply_add(self, layer, affine):
        new = ScaleAndShift(
            affine.scale.shape, name=layer.name, dtype=layer.dtype_policy
        )
        self._weights += [
            (new, "scale", affine.scale),
            (new, "shift", affine.shift),
        ]
        return new

    def _padding(self, layer, paddings, border, name):
        axis = channel_axis(layer, len(paddings))
        new = BorderPadding(
            paddings, axis, name=name, dtype=layer.dtype_policy
        )
        shape = [1] * len(paddings)
        shape[axis] = -1
        self._weights.append((new, "value", border.reshape(shape)))
        return new

    def _linear(self, layer, linear, plan):
        config = {
            name: value
            for name, value in layer.get_config().items()
            # They act in training, and the activation may be no name.
            if not name.endswith(
                ("_initializer", "_regularizer", "_constraint", "activation")
            )
        }
        config["use_bias"] = True
        made = []
        if linear.border is not None:
            made.append(
                self._padding(
                    layer,
                    padding_at_border(layer, plan.input_shape(layer)),
                    linear.border,
                    self._new_name(f"{layer.name}_border"),
                )
            )
            config["padding"] = "valid"
        new = type(layer).from_config(config)
        new.activation = layer.activation
        for name, kernel in linear.kernels.items():
            self._weights.append((new, name, kernel))
        self._weights.append((new, "bias", linear.bias))
        return [*made, new]

    def _new_name(self, name):
        while name in self._names:
            name += "_"
        self._names.add(name)
        return name

    def set_weights(self):
        for old, new in self.cloner.clones:
            _copy_with_parts(old, new)
        for layer, name, values in self._weights:
            getattr(layer, name).assign(values)


def _copy_with_parts(old, new):
    if new.trainable != old.trainable:
        # What is frozen normalizes as in inference in training calls too.
        new.trainable = old.trainable
    copy_own_state(old, new)
    for part, clone in zip(old._layers, new._layers, strict=True):
        _copy_with_parts(part, clone)


def _kept_inside(graph, path):
    """For batch normalization in layers that are no graph."""
    return [
        LayerFold(
            layer=f"{path}{layer.name}/{part.name}",
            how=KEPT,
            into=(),
            reason=f"it is inside a layer of type {type(layer).__name__}",
        )
        for layer in graph.layers
        if not isinstance(layer, BATCH_NORMALIZATIONS) and not is_graph(layer)
        for part in layer._flatten_layers()
        if isinstance(part, BATCH_NORMALIZATIONS)
    ]
