"""Decides where each batch normalization of a graph is folded into."""

import collections

import keras
import numpy as np

from keras_bn.model_layers import BATCH_NORMALIZATIONS
from keras_bn.surgery.affine import Affine
from keras_bn.surgery.affine import NotExact
from keras_bn.surgery.affine import of_batch_normalization
from keras_bn.surgery.calls import graph_of
from keras_bn.surgery.calls import is_graph
from keras_bn.surgery.calls import nodes_of
from keras_bn.surgery.fold_report import AFTER
from keras_bn.surgery.fold_report import BEFORE
from keras_bn.surgery.fold_report import BOTH
from keras_bn.surgery.fold_report import KEPT
from keras_bn.surgery.fold_report import MULTIPLY_ADD
from keras_bn.surgery.fold_report import LayerFold
from keras_bn.surgery.linear_layers import LINEAR_LAYERS
from keras_bn.surgery.linear_layers import check_range
from keras_bn.surgery.linear_layers import in_float64
from keras_bn.surgery.linear_layers import linear_of
from keras_bn.surgery.linear_layers import padding_at_border
from keras_bn.surgery.linear_layers import preimage
from keras_bn.surgery.past_layers import ZERO_PADDINGS
from keras_bn.surgery.past_layers import channel_axis
from keras_bn.surgery.past_layers import check_positions
from keras_bn.surgery.past_layers import moved_after
from keras_bn.surgery.past_layers import moved_before

# Their outputs are floats, whatever they are given.
_OF_FLOATS = (
    *BATCH_NORMALIZATIONS,
    *LINEAR_LAYERS,
    keras.layers.Embedding,
    keras.layers.Normalization,
    keras.layers.Rescaling,
)


def floats_of(graph):
    """Set of the ids of the tensors in a graph that are floats for sure.

    Keras writes down that a layer gives floats where it gives integers, as
    ReLU does for integers.
    """
    floats = set()
    for node in nodes_of(graph):
        layer = node.operation
        if is_graph(layer):
            inner = graph_of(layer)
            sure = {id(x) for x in inner.outputs} <= floats_of(inner)
        else:
            sure = (
                node.is_input
                or not isinstance(layer, keras.layers.Layer)
                or isinstance(layer, _OF_FLOATS)
                or all(id(x) in floats for x in node.input_tensors)
            )
        if sure:
            floats.update(id(x) for x in node.outputs if "float" in x.dtype)
    return floats


class FoldPlan:
    """What becomes of each layer of one graph.

    Args:
        graph: `Functional`.
        path: Str before the names of its layers in the report.
        uses: `uses_of` all graphs of the model.
        trained: Set of the ids of the layers that some call runs in training
            mode.

    Attributes:
        report: List of `LayerFold`, in the order of the graph.
        removed: Set of the ids of the batch normalizations that are folded.
        multiply_adds: From ids of the others to their `Affine`.
        linears: From ids of layers to their new `Linear`.
        borders: From ids of zero padding to the value `(channels,)` of its new
            border.
    """

    def __init__(self, graph, path, uses, trained):
        self._path = path
        self._uses = uses
        self._trained = trained
        self._outputs = {id(x) for x in graph.outputs}
        self._consumers = collections.defaultdict(list)
        self._producer = {}
        nodes = nodes_of(graph)
        self._nodes = {id(node.operation): node for node in nodes}
        self._floats = floats_of(graph)
        for node in nodes:
            for tensor in node.input_tensors:
                self._consumers[id(tensor)].append(node)
            for tensor in node.outputs:
                self._producer[id(tensor)] = node
        self.removed = set()
        self.multiply_adds = {}
        self.linears = {}
        self.borders = {}
        self._done = {}
        self._plan(
            [n for n in nodes if isinstance(n.operation, BATCH_NORMALIZATIONS)]
        )
        self.report = list(self._done.values())

    def keeps_place(self, layer):
        """Whether a layer that is removed leaves an identity behind.

        For the name of an output of the graph, and for what is narrower than
        what the layer returned.
        """
        node = self._nodes[id(layer)]
        (outputs,) = node.outputs
        return (
            id(outputs) in self._outputs
            or node.input_tensors[0].dtype != outputs.dtype
        )

    def input_shape(self, layer):
        """Of a sample; the layer is called once."""
        return self._nodes[id(layer)].input_tensors[0].shape[1:]

    def _plan(self, nodes):
        """Into what comes before where that can be, else into what follows.

        What is nearer to a linear layer comes first, since it lets the next
        one through.
        """
        reasons = {}
        affines = {}
        for node in nodes:
            layer = node.operation
            if id(layer) in self._done:
                continue
            # The place in the report's order.
            self._note(layer, KEPT)
            try:
                affines[id(layer)] = affine_of(layer)
                self._check_inference(layer)
                self._check_once(layer)
                self._check_unmasked(node)
                changes = [self._before(node, affines[id(layer)])]
                self._apply(changes)
                self._fold(layer, BEFORE, changes)
            except NotExact as reason:
                reasons[id(layer)] = [str(reason)]
        for node in reversed(nodes):
            layer = node.operation
            if id(layer) in self.removed or len(reasons[id(layer)]) > 1:
                continue
            if id(layer) not in affines or id(layer) in self._trained:
                self._note(layer, KEPT, reason=reasons[id(layer)][0])
                continue
            try:
                self._check_once(layer)
                self._check_unmasked(node)
                self._check_floats(node)
                before, rest = self._scaled_before(node, affines[id(layer)])
                after = self._into_after(node.outputs[0], rest)
                self._apply([*before, *after])
                self._fold(layer, BOTH if before else AFTER, [*before, *after])
            except NotExact as reason:
                reasons[id(layer)].append(str(reason))
                self.multiply_adds[id(layer)] = affines[id(layer)]
                unique = dict.fromkeys(reasons[id(layer)])
                self._note(layer, MULTIPLY_ADD, reason="; ".join(unique))

    def _fold(self, layer, how, changes):
        self.removed.add(id(layer))
        in_order = list(self._nodes)
        layers = [changed for changed, _ in changes]
        layers.sort(key=lambda changed: in_order.index(id(changed)))
        self._note(layer, how, [changed.name for changed in layers])

    def _note(self, layer, how, into=(), reason=""):
        self._done[id(layer)] = LayerFold(
            layer=self._path + layer.name,
            how=how,
            into=tuple(self._path + name for name in into),
            reason=reason,
        )

    def _check_inference(self, layer, named="it"):
        if id(layer) in self._trained:
            raise NotExact(f"{named} is called with training=True")

    def _check_once(self, operation):
        if self._uses[id(operation)] > 1:
            raise NotExact(f"{operation.name!r} is used more than once")

    def _check_unmasked(self, node):
        if node.arguments.kwargs.get("mask") is not None:
            # Its outputs have the mask, and what follows may use it.
            raise NotExact("it is called with a mask")

    def _check_floats(self, node):
        if id(node.input_tensors[0]) not in self._floats:
            raise NotExact("its inputs may be integers")

    def _scaled_before(self, node, affine):
        """What can be done of `affine` before it all the same: scales above 0.

        They pass a ReLU. What is between the layers then keeps the range that
        normalization gave it, which `quantize` needs.

        Returns:
            List of `(layer, linear)` to set, and the `Affine` that is left.
        """
        scale = np.where(affine.scale == 0.0, 1.0, np.abs(affine.scale))
        try:
            found = self._before(node, Affine(scale, 0.0 * affine.shift))
        except NotExact:
            return [], affine
        return [found], Affine(affine.scale / scale, affine.shift)

    def _before(self, node, affine):
        """The linear layer before, and its `Linear` with `affine` in it."""
        while True:
            (tensor, *_) = node.input_tensors
            if id(tensor) in self._outputs:
                raise NotExact("its inputs are an output of the model")
            if len(self._consumers[id(tensor)]) > 1:
                raise NotExact("its inputs go elsewhere too")
            node = self._producer.get(id(tensor))
            if node is None or node.is_input:
                raise NotExact("an input of the model comes before it")
            layer = node.operation
            self._check_once(layer)
            if id(layer) in self.removed:
                continue
            self._check_plain(node, "before")
            (inputs,), (outputs,) = node.input_tensors, node.outputs
            if type(layer) in LINEAR_LAYERS:
                linear = self._linear(layer)
                shape = outputs.shape[1:]
                axis = channel_axis(layer, len(shape))
                new = linear.after_outputs(
                    *affine.vectors(axis, shape[axis])
                )
                new.check_range()
                return layer, new
            affine = moved_before(
                layer, affine, inputs.shape[1:], outputs.shape[1:]
            )

    def _into_after(self, tensor, affine):
        """List of `(layer, linear)` and `(padding layer, border)` to set."""
        if id(tensor) in self._outputs:
            raise NotExact("its outputs are an output of the model")
        changes = []
        for node in self._consumers[id(tensor)]:
            layer = node.operation
            self._check_once(layer)
            (outputs, *_) = node.outputs
            if id(layer) in self.removed:
                changes += self._into_after(outputs, affine)
                continue
            self._check_plain(node, "after")
            shape = tensor.shape[1:]
            if type(layer) in LINEAR_LAYERS:
                axis = channel_axis(layer, len(shape))
                new = self._linear(layer).before_inputs(
                    *affine.vectors(axis, shape[axis])
                )
                new.check_range()
                if new.border is not None:
                    # Raises where the padding is not known.
                    padding_at_border(layer, shape)
                changes.append((layer, new))
            elif type(layer) in ZERO_PADDINGS:
                changes += self._into_after(outputs, affine)
                border = self._border(layer, affine, shape)
                if border is not None:
                    changes.append((layer, border))
            else:
                moved = moved_after(layer, affine, shape, outputs.shape[1:])
                changes += self._into_after(outputs, moved)
        if not self._consumers[id(tensor)]:
            raise NotExact("nothing comes after it")
        return changes

    def _border(self, layer, affine, shape):
        check_positions(layer, affine)
        axis = channel_axis(layer, len(shape))
        vectors = affine.vectors(axis, shape[axis])
        before = self.borders.get(id(layer))
        if before is None and not np.any(vectors[1] != 0.0):
            return None
        before = np.zeros(shape[axis]) if before is None else before
        border = preimage(before, *vectors)
        check_range(layer, border)
        return border

    def _apply(self, changes):
        for layer, new in changes:
            if isinstance(new, np.ndarray):
                self.borders[id(layer)] = new
            else:
                self.linears[id(layer)] = new

    def _linear(self, layer):
        return self.linears.get(id(layer)) or linear_of(layer)

    def _check_plain(self, node, where):
        """Raises NotExact for a call with more than one tensor in and out.

        A mask counts, except for the layers that ignore it.
        """
        layer = node.operation
        name = f"{type(layer).__name__} {layer.name!r}"
        if not isinstance(layer, keras.layers.Layer) or (
            len(node.input_tensors) != 1 or len(node.outputs) != 1
        ):
            raise NotExact(f"{name} comes {where} it")
        self._check_inference(layer, name)


def affine_of(layer):
    """The `Affine` of a batch normalization in inference.

    Raises:
        NotExact: it has none.
    """
    if type(layer) not in BATCH_NORMALIZATIONS:
        raise NotExact(f"its class is {type(layer).__name__}")
    if getattr(layer, "use_moving_statistics", None) is False:
        raise NotExact("it normalizes with the batch's moments in inference")
    rank = layer.input_spec.ndim
    sizes = {axis % rank: n for axis, n in layer.input_spec.axes.items()}
    if 0 in sizes:
        raise NotExact("its channel axis is that of samples")
    gamma, beta = (
        in_float64(weight) if wanted else None
        for weight, wanted in (
            (getattr(layer, "gamma", None), layer.scale),
            (getattr(layer, "beta", None), layer.center),
        )
    )
    return of_batch_normalization(
        in_float64(layer.moving_mean),
        in_float64(layer.moving_variance),
        gamma,
        beta,
        layer.epsilon,
        {axis - 1: n for axis, n in sizes.items()},
        rank - 1,
    )
