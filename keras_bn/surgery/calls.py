"""How a model calls its layers, as Keras wrote it down at every depth."""

import collections
import inspect

import keras
from keras import tree
from keras.src.backend import compute_output_spec
from keras.src.models.functional import Functional


def is_graph(layer):
    """Whether the layer is a model that runs the graph it shows.

    A subclass that overrides `call` may do anything, and a Sequential model
    that was called with several tensors has no graph.
    """
    if isinstance(layer, keras.Sequential):
        return (
            type(layer).call is keras.Sequential.call
            and layer._functional is not None
        )
    return isinstance(layer, Functional) and (
        type(layer).call is Functional.call
    )


def graph_of(model):
    """The `Functional` that a model runs, see `is_graph`."""
    return getattr(model, "_functional", model)


def graphs_of(model):
    """From paths to the graphs in a model, each once, the outermost first."""
    graphs = {}
    seen = set()

    def collect(one, path):
        if id(one) in seen:
            return
        seen.add(id(one))
        graphs[path] = graph_of(one)
        for layer in one.layers:
            if is_graph(layer):
                collect(layer, f"{path}{layer.name}/")

    collect(model, "")
    return graphs


def nodes_of(graph):
    """List of the calls in a graph, in the order in which Keras makes them."""
    return [
        node
        for depth in sorted(graph._nodes_by_depth, reverse=True)
        for node in graph._nodes_by_depth[depth]
    ]


def uses_of(graphs):
    """How often each operation is called, by its id.

    What is in a layer that is no graph counts once for that layer.
    """
    uses = collections.Counter()
    for graph in graphs:
        for node in nodes_of(graph):
            uses[id(node.operation)] += 1
        for layer in graph.layers:
            if not is_graph(layer):
                for part in layer._flatten_layers(include_self=False):
                    uses[id(part)] += 1
    return uses


class TrainingArguments:
    """Which calls run in training mode in `model(inputs)`.

    In a call of the model with `training` all of them follow that. Without,
    Keras 3.15 takes for a layer, in this order: what the graph around it was
    called with; what the layer itself was called with; what the layer called
    before it had, at whatever depth; the default in the signature of `call`.

    Args:
        model: A model that is a graph.

    Attributes:
        layers: Set of the ids of the operations that a call runs in training
            mode, or may.
        of_calls: From the ids of the nodes of layers that take it, or hold
            others, to the `training` of that call, where their graph is called
            without.
    """

    def __init__(self, model):
        self.layers = set()
        self.of_calls = {}
        self._left_by_graphs = {}
        self._is_given = any(
            _may_be_true(node.arguments.kwargs.get("training"))
            for graph in graphs_of(model).values()
            for node in nodes_of(graph)
        )
        self._run(graph_of(model))

    def _run(self, graph):
        """What a graph that is called without leaves to the next layer."""
        if id(graph) in self._left_by_graphs:
            return self._left_by_graphs[id(graph)]
        current = None
        for node in nodes_of(graph):
            layer = node.operation
            if node.is_input or not isinstance(layer, keras.layers.Layer):
                continue
            if "training" in node.arguments.kwargs:
                current = node.arguments.kwargs["training"]
            elif current is None:
                current = _default(layer)
            if layer._call_has_training_arg or layer._layers:
                self.of_calls[id(node)] = current
            if _may_be_true(current):
                self._note(layer)
            elif is_graph(layer):
                if current is None:
                    current = self._run(graph_of(layer))
            elif self._may_call_with_training(layer):
                current = _left_by(node, current)
        self._left_by_graphs[id(graph)] = current
        return current

    def _may_call_with_training(self, layer):
        """Whether layers inside of it may be called with another `training`.

        Keras's own layers hand on what they have, or False.
        """
        own, *parts = layer._flatten_layers()
        return parts and (
            self._is_given
            or any(
                not type(one).__module__.startswith("keras.src.")
                for one in (own, *parts)
            )
        )

    def _note(self, layer):
        if id(layer) not in self.layers:
            self.layers.add(id(layer))
            if is_graph(layer):
                for node in nodes_of(graph_of(layer)):
                    self._note(node.operation)


def _default(layer):
    parameter = inspect.signature(layer.call).parameters.get("training")
    if parameter is None or parameter.default is inspect.Parameter.empty:
        return None
    return parameter.default


def _may_be_true(training):
    if isinstance(training, keras.KerasTensor):
        return True
    try:
        return bool(training)
    except Exception:
        # A framework has kinds of its own for what has no truth value.
        return True


class _Next(keras.layers.Layer):
    """Notes the `training` that it is called with."""

    def call(self, inputs, training=None):
        self.training = training
        return inputs


class _Around(keras.layers.Layer):
    """Calls what it is given."""

    def __init__(self, calls):
        # TensorFlow allows no underscore at the front.
        super().__init__(name="around")
        self._calls = calls

    def call(self, inputs, training=None):
        return self._calls(inputs)


def _left_by(node, training):
    """What a layer with layers inside leaves to the one after it.

    Its own code may call them with anything, so it is run, on no data.
    """
    following = _Next(name="next")

    def calls(values):
        tensors = dict(zip(map(id, node.input_tensors), values))
        args, kwargs = node.arguments.fill_in(tensors)
        outputs = node.operation(*args, **kwargs)
        return following(tree.flatten(outputs)[0])

    around = _Around(calls)
    try:
        compute_output_spec(
            lambda *values: around(values, training=training),
            *node.input_tensors,
        )
    except Exception:
        # Whatever it raises when it is not called by a model.
        return training
    return following.training
