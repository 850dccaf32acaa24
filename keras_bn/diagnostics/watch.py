"""`watch_statistics`: moving statistics, watched in a hand-written loop."""

import warnings

from keras_bn.compiled_functions import stacklevel_of_user
from keras_bn.diagnostics.standstill import StandstillCheck
from keras_bn.diagnostics.standstill import checked_arguments
from keras_bn.diagnostics.standstill import differ
from keras_bn.diagnostics.standstill import iterations_of
from keras_bn.diagnostics.standstill import sums
from keras_bn.model_layers import built_batch_normalizations

_LISTS = ("trainable_variables", "non_trainable_variables")


def watch_statistics(model, on_stale="warn", every=50):
    """Finds moving statistics that stand still in a loop of your own.

    ```python
    with keras_bn.watch_statistics(model) as watch:
        for x, y in data:
            ...  # a training step
            watch.step()
    ```

    At the end of the block the statistics of each batch-normalization layer,
    of ours or built into Keras, are compared with those at its beginning, and
    said of as by `StatisticsMonitor` where they stood still while weights
    moved. `watch.step()` is not needed for that; with it they are compared
    every so many steps as well.

    A JAX loop keeps the weights itself. Assign them to the model's variables
    before the block ends; `watch.step(trainable_variables,
    non_trainable_variables)`, with those that go into the next step, compares
    them in the meantime. Where nothing in the model moved, a UserWarning says
    that nothing can be told. An error that leaves the block is not followed by
    a check.

    Args:
        model: `keras.Model` or layer, built.
        on_stale: `"warn"` for a UserWarning, `"raise"` for a RuntimeError.
        every: Int, calls of `step` from one check to the next.

    Returns:
        Context manager, which gives the object with `step`.

    Raises:
        ValueError: an argument is not one of the above, or the model has no
            batch normalization or is not built.
    """
    checked_arguments(every, on_stale)
    layers = built_batch_normalizations("watch_statistics", model)
    return _Watch(model, layers, on_stale, every)


class _Watch:
    def __init__(self, model, layers, on_stale, every):
        self._model = model
        self._layers = layers
        self._on_stale = on_stale
        self._every = every
        self._check = None

    def __enter__(self):
        self._values = None
        self._steps = self._checked_at = 0
        self._iterations = iterations_of(self._model)
        self._sums = sums(self._model)
        self._check = StandstillCheck(
            self._model, self._layers, self._on_stale
        )
        return self

    def step(self, trainable_variables=None, non_trainable_variables=None):
        """To be called after each training step.

        Args:
            trainable_variables, non_trainable_variables: Lists of tensors, in
                the order of those of the model, where a JAX loop keeps them.

        Raises:
            ValueError: a list is none, or has another length than that of the
                model, or variables of other shapes; or this is not in the
                block of `with`.
            RuntimeError: as `on_stale` says.
        """
        if self._check is None:
            raise ValueError(
                "`step` belongs into the block of `with "
                "keras_bn.watch_statistics(model) as watch:`. "
                "Received: a call outside of it."
            )
        given = trainable_variables, non_trainable_variables
        if any(x is not None for x in given):
            self._values = self._by_variable(*given)
        self._steps += 1
        if self._steps - self._checked_at >= self._every:
            self._compare()

    def __exit__(self, error_type, error, traceback):
        if error_type is not None:
            return
        if not differ(self._sums, sums(self._model, self._values)):
            warnings.warn(
                "Nothing can be told of the moving statistics: no weight of "
                "the model moved. A JAX loop has to assign its variables to "
                "the model's before the block of `watch_statistics` ends, or "
                "give them to `watch.step(trainable_variables, "
                "non_trainable_variables)`.",
                stacklevel=stacklevel_of_user(),
            )
            return
        self._compare()

    def _compare(self):
        steps = self._steps - self._checked_at
        if not self._steps:
            steps = iterations_of(self._model) - self._iterations
        self._checked_at = self._steps
        self._check.check(steps or None, self._values)

    def _by_variable(self, *lists):
        values = {}
        for name, given in zip(_LISTS, lists):
            variables = getattr(self._model, name)
            if not isinstance(given, (list, tuple)):
                received = f"of type {type(given).__name__}"
            elif len(given) != len(variables):
                received = f"of length {len(given)}"
            else:
                received = _other_shape(variables, given)
            if received:
                raise ValueError(
                    f"`step` takes a list of all {len(variables)} of the "
                    f"model's {name} or no variables. Received: {name} "
                    f"{received}."
                )
            values |= {id(v): value for v, value in zip(variables, given)}
        return values


def _other_shape(variables, given):
    """What is wrong with the first value of another shape; None: nothing."""
    for variable, value in zip(variables, given):
        shape = getattr(value, "shape", None)
        if shape is None or tuple(shape) != tuple(variable.shape):
            return f"with shape {shape} for {variable.path!r}"
    return None
