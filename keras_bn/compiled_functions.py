"""Which compiled functions hold a layer as it was when they were traced.

TensorFlow and JAX trace a layer once and repeat what it did then. What is set
on the layer afterwards reaches no function that was traced before. PyTorch
runs the layer itself, and `torch.compile` watches its attributes.
"""

import contextlib
import contextvars
import sys
import typing
import warnings
import weakref

import keras
from keras import ops

# What `fit`, `evaluate` and `predict` trace, and where they keep the result.
_KEPT_BY_KERAS = {
    "train_step": "train_function",
    "test_step": "test_function",
    "predict_step": "predict_function",
}
_RUNS = {
    "train_function": "Training",
    "test_function": "Evaluation",
    "predict_function": "Prediction",
}
_NOT_THE_USERS = ("jax", "keras", "keras_bn", "tensorflow", "torch")

_unnoticed = contextvars.ContextVar("unnoticed", default=False)


@contextlib.contextmanager
def unnoticed():
    """A context in which functions are traced that will not be run again.

    What is set on a layer later need not reach them: they were exported.
    """
    token = _unnoticed.set(True)
    try:
        yield
    finally:
        _unnoticed.reset(token)


class CompiledFunctions:
    """The compiled functions that one layer was traced into."""

    def __init__(self):
        self._traces = {}

    def note(self, training, settings):
        """To be called when the layer is, with its settings.

        Args:
            training: As the layer was called.
            settings: Function that returns the `Settings`, asked for where the
                call is compiled.
        """
        if _unnoticed.get() or not _is_compiling():
            return
        self._traces = {t: then for t, then in self._in_use()}
        trace = _trace(bool(training))
        self._traces[trace] = settings()
        if trace.model is not None:
            _warn_if_optimizer_is_older(trace.model())

    def outdated(self, layer, model=None):
        """Which functions do otherwise than the layer is set to now.

        Args:
            layer: The layer.
            model: None for all functions in use. Else those of this model and
                of the user's own, and what may have been set for another model
                is left out.

        Returns:
            List of `(trace, names)`: a function, and the settings that make a
            difference to it.
        """
        found = []
        for trace, then in self._in_use():
            names = then.that_differ(layer.settings(), trace.training)
            if model is not None:
                if trace.model is not None and trace.model() is not model:
                    continue
                if "trainable" in names and is_of_several_models(layer, model):
                    names.remove("trainable")
            if names:
                found.append((trace, names))
        return found

    def models(self):
        """Those with a function in use, and None for one of the user's own."""
        return [t.model and t.model() for t, _ in self._in_use()]

    def _in_use(self):
        return [x for x in self._traces.items() if x[0].is_in_use()]


def is_of_several_models(layer, model):
    """Whether `trainable` may have been set on a layer for another model.

    A discriminator trains by itself and is frozen in the model that trains the
    generator. Each goes on with what `trainable` was when it was compiled.

    Args:
        layer: Layer of `model`.
        model: `keras.Model`, or layer.
    """
    parts = [
        part
        for part in model._flatten_layers(include_self=False)
        if isinstance(part, keras.Model)
    ]
    functions = getattr(layer, "_compiled_functions", CompiledFunctions())
    return (
        any(other is not model for other in functions.models())
        or bool(model._inbound_nodes)
        or any(p.compiled and layer in p._flatten_layers() for p in parts)
    )


def warn_when_run(trace, layer):
    """Warns when a model's function is run that is outdated by then.

    That is not known when `layer` is set: the model may be compiled again, or
    not be used any more.
    """
    model = trace.model()
    kept = getattr(model, trace.kept_as)
    if not isinstance(kept, _Watched):
        kept = _Watched(model, trace.kept_as)
        setattr(model, trace.kept_as, kept)
    kept.watch(layer)


def warn_of_own_functions(setting):
    """Warns that a setting does not reach a function of the user's own.

    The layer is not named: Python says the same sentence once for a line of
    the user's, which may set a hundred layers.
    """
    warnings.warn(
        f"{setting} on a BatchNormalization does not reach a function of your "
        "own that was traced with it before (by tf.function or jax.jit); "
        "trace it again if you go on using it.",
        stacklevel=stacklevel_of_user(),
    )


class _Watched:
    """Stands for a compiled function of a model until it is run.

    Args:
        model: `keras.Model`.
        kept_as: The attribute that is the function, and will be this object.
    """

    def __init__(self, model, kept_as):
        self.function = getattr(model, kept_as)
        self._model = weakref.ref(model)
        self._kept_as = kept_as
        self._layers = weakref.WeakSet()

    def watch(self, layer):
        self._layers.add(layer)

    def __call__(self, *args):
        model = self._model()
        if getattr(model, self._kept_as) is self:
            # Once is enough, and this costs nothing from now on.
            setattr(model, self._kept_as, self.function)
            self._warn_if_outdated(model)
        return self.function(*args)

    def _warn_if_outdated(self, model):
        if self._kept_as == "train_function" and _optimizer_is_older(model):
            # JAX traces again, which comes to `note`.
            return
        outdated = {
            layer: names
            for layer in self._layers
            for trace, names in layer.outdated_functions(model)
            if trace.function() is self.function
        }
        if not outdated:
            return
        first = min(outdated, key=lambda layer: layer.name)
        settings = [f"{n}={getattr(first, n)}" for n in outdated[first]]
        others = f" and {len(outdated) - 1} more" if len(outdated) > 1 else ""
        warnings.warn(
            f"{_RUNS[self._kept_as]} of model {model.name!r} goes on as it was "
            f"compiled, before {', '.join(settings)} was set on its "
            f"BatchNormalization {first.name!r}{others}; call `compile` of "
            "that model again.",
            stacklevel=stacklevel_of_user(),
        )


class _Trace(typing.NamedTuple):
    training: bool
    # None and "" for a function of the user's own.
    model: weakref.ref | None = None
    kept_as: str = ""
    # None where nobody knows for how long it is in use, as on JAX.
    function: weakref.ref | None = None

    def is_in_use(self):
        if self.function is None:
            return True
        function = self.function()
        if self.model is None or function is None:
            return function is not None
        model = self.model()
        return model is not None and _function(model, self.kept_as) is function


def _function(model, kept_as):
    kept = getattr(model, kept_as)
    return kept.function if isinstance(kept, _Watched) else kept


def _trace(training):
    """The trace that is being made, found by who asked for it."""
    own = None
    frame = sys._getframe()
    while frame is not None:
        name = frame.f_code.co_name
        caller = None
        if name in _KEPT_BY_KERAS or name == "__call__":
            caller = frame.f_locals.get("self")
        if isinstance(caller, keras.Model) and name in _KEPT_BY_KERAS:
            function = _function(caller, _KEPT_BY_KERAS[name])
            if function is not None:
                refs = weakref.ref(caller), weakref.ref(function)
                return _Trace(training, refs[0], _KEPT_BY_KERAS[name], refs[1])
        if _is_tf_function(caller):
            own = weakref.ref(caller)
        frame = frame.f_back
    return _Trace(training, function=own)


def _is_tf_function(value):
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return isinstance(value, tf.types.experimental.PolymorphicFunction)


def _warn_if_optimizer_is_older(model):
    """Warns before JAX fails: an optimizer holds other weights than it trains.

    So it is after `trainable` was set on a model that was loaded, whose
    optimizer is there before any trace, or is not set back before a model
    trains that was compiled with the other value.
    """
    if _optimizer_is_older(model):
        trained = model.trainable_variables
        warnings.warn(
            f"The optimizer of model {model.name!r} holds "
            f"{len(_known_to_optimizer(model))} weights and the model trains "
            f"{len(trained)}, since `trainable` or `train_gamma_and_beta` was "
            "set after they met; set it back before this model trains, or "
            "call `compile` of that model again.",
            stacklevel=stacklevel_of_user(),
        )


def _optimizer_is_older(model):
    if keras.backend.backend() != "jax" or not model.compiled:
        return False
    known = _known_to_optimizer(model)
    return known is not None and len(known) != len(model.trainable_variables)


def _known_to_optimizer(model):
    """The weights that an optimizer was built for, or None."""
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    if optimizer is None or not optimizer.built:
        return None
    return optimizer._trainable_variables


def _is_compiling():
    """Whether what runs now is traced in order to be run again."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return not tf.executing_eagerly() and not _is_symbolic()
    if backend == "jax":
        import jax

        # Under `grad` and `vmap` alone this is an array.
        tracing = isinstance(ops.ones(()), jax.core.Tracer)
        return tracing and not _is_symbolic()
    return False


def _is_symbolic():
    """Whether Keras only asks for shapes, as when a model is built."""
    with keras.SymbolicScope() as scope:
        return scope.original_scope is not None


def stacklevel_of_user():
    """The `stacklevel` at which a warning names the line of the user."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in _NOT_THE_USERS:
            break
        frame, level = frame.f_back, level + 1
    return level
