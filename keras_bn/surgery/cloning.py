"""Makes a model anew, layer by layer, with other layers in some places.

Functional and Sequential models, at any depth of nesting, are walked as
graphs. Every other layer is made anew from its config, and what it holds comes
along there.
"""

import contextlib
import inspect
import re
import tempfile

import keras
import numpy as np
from keras import tree
from keras.src.models.functional import Functional
from keras.src.models.functional import functional_like_constructor
from keras.src.saving.serialization_lib import SafeModeScope

from keras_bn.surgery.calls import is_graph
from keras_bn.surgery.calls import nodes_of


def check_is_graph(caller, model):
    """Raises ValueError for a model that is no graph.

    Args:
        caller: Name of the function that says no.
    """
    if is_graph(model):
        return
    if type(model).call is keras.Sequential.call:
        raise ValueError(
            f"`{caller}` takes a Sequential model with one input. Received: "
            f"model {model.name!r}, which was called with several. Make it of "
            "`keras.Input`s by `keras.Model`."
        )
    raise ValueError(
        f"`{caller}` takes a functional or Sequential model, whose layers are "
        f"known. Received: model {model.name!r} of type "
        f"{type(model).__name__}, whose `call` is its own. Use the layers in "
        "that class itself."
    )


class ModelCloner:
    """Clones a model; shared layers are shared in the clone as well.

    Args:
        caller: Name of the function that says no.
        instead_of: Function from a layer of a graph to the sequence of new
            layers that take its place, one after the other, or None for a
            clone.
        keep_class: Whether a model whose class cannot be called with inputs
            and outputs is refused. If not, a plain model takes its place.
        rewrite: Function from the config of a layer that is no graph, and its
            parts', to the config to make it from.
        training: From the ids of nodes to what they are called with as
            `training`, instead of what Keras wrote down.

    Attributes:
        clones: List of pairs of a layer that was cloned and its clone, without
            those that `instead_of` gave; models are not among them.
        models: The same for the models, the inner ones first.
    """

    def __init__(
        self, caller, instead_of, keep_class, rewrite=None, training=None
    ):
        self._caller = caller
        self._instead_of = instead_of
        self._keep_class = keep_class
        self._rewrite = rewrite or (lambda config: config)
        self._training = training or {}
        # From the id of an original to what stands for it.
        self._made = {}
        self._replaced = set()
        # From the id of a part of a layer that is no graph to that layer.
        self._owners = {}
        self.clones = []
        self.models = []

    def clone(self, model):
        """The new model, whose weights are still initial ones.

        Raises:
            ValueError: a layer cannot be cloned, or the model's class not be
                kept.
        """
        check_is_graph(self._caller, model)
        if isinstance(model, keras.Sequential):
            new = self._sequential(model)
        else:
            new = self._functional(model)
        self.models.append((model, new))
        return new

    def _sequential(self, model):
        if type(model).__init__ is not keras.Sequential.__init__:
            self._refuse_class(model)
            kind = keras.Sequential
        else:
            kind = type(model)
        layers = [
            new
            for layer in model._layers
            for new in self._operations_for(layer)
        ]
        with self._refusal_of("call the layers of", model):
            new = kind(layers, name=model.name)
            if not is_graph(new):
                raise ValueError("the shape of a layer's outputs is unknown")
            return new

    def _functional(self, model):
        kind = type(model)
        if not functional_like_constructor(kind):
            self._refuse_class(model)
            kind = Functional
        inputs = tree.map_structure(
            lambda x: self._operations_for(x._keras_history.operation)[
                0
            ].output,
            model._inputs_struct,
        )
        # From the ids of the model's tensors to the new ones.
        tensors = dict(zip(map(id, model.inputs), tree.flatten(inputs)))
        for node in nodes_of(model):
            if not node.is_input and all(
                id(x) in tensors for x in node.input_tensors
            ):
                outputs = self._call(node, tensors)
                tensors.update(
                    zip(map(id, node.outputs), tree.flatten(outputs))
                )
        outputs = tree.map_structure(
            lambda x: tensors[id(x)], model._outputs_struct
        )
        with self._refusal_of("make", model):
            return kind(inputs, outputs, name=model.name)

    def _call(self, node, tensors):
        """Calls what takes the place of a node's operation."""
        args, kwargs = node.arguments.fill_in(tensors)
        operations = self._operations_for(node.operation)
        if id(node) in self._training and len(args) < 2:
            training = self._training[id(node)]
            if isinstance(training, keras.KerasTensor):
                training = tensors.get(id(training))
            kwargs["training"] = training
        if id(node.operation) in self._replaced:
            args, kwargs = _for_another(
                node.operation, operations, args, kwargs
            )
        if not operations:
            return args[0]
        *first, last = operations
        with self._refusal_of("call", node.operation):
            for operation in first:
                args = (operation(*args),)
            return last(*args, **kwargs)

    @contextlib.contextmanager
    def _refusal_of(self, what, operation):
        """Turns what Keras, or code of the user's, raises into a sentence."""
        try:
            yield
        except Exception as error:
            raise ValueError(
                f"`{self._caller}` cannot {what} {operation.name!r} of type "
                f"{type(operation).__name__} in the new model. Received: "
                f"{_one_line(error)}."
            ) from error

    def _refuse_class(self, model):
        if self._keep_class:
            raise ValueError(
                f"`{self._caller}` keeps a model's class, and can make one "
                "that is called with inputs and outputs, or with a list of "
                f"layers. Received: model {model.name!r} of type "
                f"{type(model).__name__}. Wrap its graph first: "
                "`keras.Model(model.inputs, model.outputs)`."
            )

    def _operations_for(self, operation):
        """Tuple of what is called in turn instead of `operation`."""
        made = self._made.get(id(operation))
        if made is None:
            made = self._instead_of(operation)
            if made is not None:
                made = tuple(made)
                self._replaced.add(id(operation))
            elif is_graph(operation):
                made = (self.clone(operation),)
            else:
                made = (self._clone_of(operation),)
                if isinstance(operation, keras.layers.Layer):
                    self.clones.append((operation, made[0]))
            self._made[id(operation)] = made
        return made

    def _clone_of(self, operation):
        if isinstance(operation, keras.layers.Layer):
            self._note_parts(operation)
        try:
            with SafeModeScope(False), custom_objects_of(operation):
                clone = type(operation).from_config(
                    self._rewrite(_config_of(operation))
                )
        except Exception as error:
            # A class of the user's raises whatever it likes.
            raise ValueError(
                f"`{self._caller}` cannot clone a layer. Received: layer "
                f"{operation.name!r} of type {type(operation).__name__}: "
                f"{_one_line(error)}. Give the class a `get_config` with the "
                "arguments of its `__init__`."
            ) from error
        if isinstance(operation, keras.layers.Lambda):
            # The config has its code alone, without its globals.
            clone.function = operation.function
        return clone

    def _note_parts(self, layer):
        for part in layer._flatten_layers():
            owner = self._owners.setdefault(id(part), layer)
            if owner is not layer:
                raise ValueError(
                    f"`{self._caller}` cannot keep a layer shared inside "
                    f"others. Received: layer {part.name!r}, which is in "
                    f"{owner.name!r} and {layer.name!r}."
                )


def _config_of(operation):
    """The config, with functions as they are: few can be read from one."""
    config = operation.get_config()
    if not isinstance(operation, keras.layers.Lambda):
        for name, value in config.items():
            function = getattr(operation, name, None)
            if inspect.isfunction(function) and isinstance(value, dict):
                config[name] = function
    return config


def _for_another(layer, operations, args, kwargs):
    """The arguments of a call of `layer` for what takes its place.

    Keras gives `training` to layers that take none, too.
    """
    names = list(inspect.signature(layer.call).parameters)
    inputs, *others = args or (kwargs.pop(names[0]),)
    if operations:
        taken = list(inspect.signature(operations[-1].call).parameters)
        if "mask" not in taken:
            kwargs.pop("mask", None)
        if taken[: len(args)] != names[: len(args)]:
            others = []
    return (inputs, *others), kwargs


def custom_objects_of(operation):
    """A scope in which what the layer is made of can be made from configs."""
    objects = {}
    layers = [operation]
    if isinstance(operation, keras.layers.Layer):
        layers = operation._flatten_layers()
    for layer in layers:
        objects[type(layer).__name__] = type(layer)
        for value in vars(layer).values():
            if inspect.isfunction(value):
                objects[value.__name__] = value
            elif isinstance(
                value,
                (
                    keras.constraints.Constraint,
                    keras.initializers.Initializer,
                    keras.regularizers.Regularizer,
                ),
            ):
                objects[type(value).__name__] = type(value)
    return keras.saving.custom_object_scope(
        {
            name: one
            for name, one in objects.items()
            if not one.__module__.startswith("keras.src.")
        }
    )


def copied(value):
    """The values as an array that nothing else holds.

    JAX variables would share theirs, and `fit` of one model deletes it.
    """
    return np.array(keras.ops.convert_to_numpy(value))


def copy_own_state(layer, clone):
    """Copies weights, states of random numbers and assets, not of its parts.

    As `model.save` and `load_model` would.

    Raises:
        ValueError: they do not have the same weights.
    """
    store = {}
    layer.save_own_variables(store)
    clone.load_own_variables({k: copied(v) for k, v in store.items()})
    for old, new in zip(layer._seed_generators, clone._seed_generators):
        new.state.assign(copied(old.state))
    if hasattr(layer, "save_assets"):
        with tempfile.TemporaryDirectory() as folder:
            layer.save_assets(folder)
            clone.load_assets(folder)


def copy_trainable(model, clone, pairs):
    """Copies what is trainable; a model's own flag hides those in it."""
    clones = {id(old): new for old, new in [(model, clone), *pairs]}
    for layer in model._flatten_layers():
        new = clones.get(id(layer))
        if new is not None and new.trainable != layer.trainable:
            new.trainable = layer.trainable


def copy_compiled(model, clone):
    """Compiles `clone` as `model` is, the optimizer's state included.

    Losses are shared; the optimizer and metrics, which have a state, are not.
    """
    if not model.compiled:
        return
    arguments = dict(model._compile_config.config)
    arguments["optimizer"] = model.optimizer
    clone.compile(
        **{
            name: tree.map_structure(_without_state, value)
            for name, value in arguments.items()
        }
    )
    old = model.optimizer
    if old is None or not old.built:
        return
    clone.optimizer.build(clone.trainable_variables)
    pairs = list(zip(old.variables, clone.optimizer.variables))
    if len(old.variables) == len(clone.optimizer.variables) and all(
        tuple(a.shape) == tuple(b.shape) for a, b in pairs
    ):
        for before, variable in pairs:
            variable.assign(copied(before))


def _without_state(value):
    if isinstance(value, (keras.Metric, keras.optimizers.Optimizer)):
        return type(value).from_config(value.get_config())
    return value


def _one_line(error):
    # Keras repeats the config first, or has what is wrong in bold.
    text = str(error).split("Exception encountered:")[-1]
    bold = re.search("\x1b\\[1m(.*?)\x1b\\[0m", text, re.DOTALL)
    text = bold[1] if bold else text
    return " ".join(text.split())[:300].rstrip(".")
