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
_NOT_THE_USERS = ("keras", "keras_bn", "tensorflow", "torch")

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

    def note(self, training, did):
        """To be called when the layer is, with `did`, what it then does."""
        if _unnoticed.get() or not _is_compiling():
            return
        self._traces = {t: d for t, d in self._traces.items() if t.is_in_use()}
        trace = _trace(bool(training))
        self._traces[trace] = did
        if trace.model is not None:
            _warn_if_optimizer_is_older(trace.model())

    def warn_if_outdated(self, setting, would_do):
        """Warns where `would_do(training)` is not what was traced.

        The layer is not named: Python says the same sentence once for a line
        of the user's, and `model.trainable = False` sets a hundred layers.

        Args:
            setting: What was just set on the layer, as the user would type it.
            would_do: Function of `training`, what the layer does from now on.
        """
        if self.is_outdated(would_do):
            warnings.warn(
                f"{setting} on a BatchNormalization does not reach the "
                "functions that were compiled with it before; call "
                "`model.compile(...)` again, or trace your own function again.",
                stacklevel=stacklevel_of_user(),
            )

    def is_outdated(self, would_do):
        """Whether `would_do(training)` is not what a trace in use did."""
        return any(
            trace.is_in_use() and did != would_do(trace.training)
            for trace, did in self._traces.items()
        )


class _Trace(typing.NamedTuple):
    training: bool
    # None, None and "" for a function of the user's own: nobody knows for how
    # long it is in use.
    model: weakref.ref | None = None
    function: weakref.ref | None = None
    kept_as: str = ""

    def is_in_use(self):
        if self.model is None:
            return True
        function = self.function()
        kept = getattr(self.model(), self.kept_as, None)
        return function is not None and kept is function


def _trace(training):
    """The trace that is being made, found by who asked for it."""
    frame = sys._getframe()
    while frame is not None:
        kept_as = _KEPT_BY_KERAS.get(frame.f_code.co_name)
        model = frame.f_locals.get("self") if kept_as else None
        if isinstance(model, keras.Model):
            function = getattr(model, kept_as)
            if function is not None:
                refs = weakref.ref(model), weakref.ref(function)
                return _Trace(training, *refs, kept_as)
        frame = frame.f_back
    return _Trace(training)


def _warn_if_optimizer_is_older(model):
    """Warns before JAX fails: an optimizer holds other weights than it trains.

    So it is after `trainable` was set on a model that was loaded, whose
    optimizer is there before any trace.
    """
    if keras.backend.backend() != "jax" or not model.compiled:
        return
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    known = getattr(optimizer, "_trainable_variables", None)
    if optimizer.built and len(known) != len(model.trainable_variables):
        warnings.warn(
            f"The optimizer holds {len(known)} weights and the model trains "
            f"{len(model.trainable_variables)}, since `trainable` or "
            "`train_gamma_and_beta` was set after they met; call "
            "`model.compile(...)` again.",
            stacklevel=stacklevel_of_user(),
        )


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
