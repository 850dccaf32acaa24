"""Whether moving statistics stand still while weights move."""

import numbers
import warnings

import keras
import numpy as np
from keras import ops

from keras_bn.argument_checks import shown
from keras_bn.compiled_functions import stacklevel_of_user
from keras_bn.diagnostics.recalibrate import is_frozen

# What a training step updates, in layers of ours or built into Keras.
STATISTICS = (
    "moving_mean",
    "moving_variance",
    "moving_stddev",
    "renorm_mean",
    "renorm_stddev",
    "num_batches_tracked",
    "renorm_step",
)
# Below this share of its value a float32 is not moved any more by a batch that
# weighs 1, with room for its neighbours.
_RESOLUTION = 4 * float(np.finfo("float32").eps)
# Of more layers the names are left out.
_NAMES = 5


def statistics_of(layer, values=None):
    """Dictionary from the names of a layer's statistics to arrays."""
    return {
        name: copied(getattr(layer, name), values)
        for name in STATISTICS
        if getattr(layer, name, None) is not None
    }


class Snapshot:
    """Weights at one time, as arrays.

    Args:
        model: `keras.Model` or layer.
        layers: List of the batch normalization in it, built.
        values: Dictionary from the ids of variables to what they are, for
            those that a loop keeps outside of the model.

    Attributes:
        updates: Set of the layers whose statistics training should move.
        statistics: Dictionary from layers to `statistics_of` them.
        weights: Dictionary from layers to arrays that move if the layer is
            being trained: gamma and beta where they train, else a number for
            each weight of the model.
    """

    def __init__(self, model, layers, values=None):
        self.updates = {
            layer
            for layer in layers
            if not is_frozen(layer)
            and getattr(layer, "use_moving_statistics", None) is not False
        }
        self.statistics = {x: statistics_of(x, values) for x in layers}
        self.weights = {
            layer: [copied(v, values) for v in layer.trainable_variables]
            for layer in layers
        }
        bare = [x for x in self.updates if not self.weights[x]]
        self.weights.update(dict.fromkeys(bare, bare and sums(model, values)))


def sums(model, values=None):
    """A number of each trainable weight, which moves when the weight does.

    Taken where the weights are, as they may be large.
    """
    return [
        copied(ops.sum(ops.square(ops.cast(_now(v, values), "float32"))))
        for v in model.trainable_variables
    ]


def copied(variable, values=None):
    """An array of its own: PyTorch's and JAX's are views of the variable."""
    value = _now(variable, values)
    if "float16" in keras.backend.standardize_dtype(value.dtype):
        value = ops.cast(value, "float32")
    return np.array(ops.convert_to_numpy(value))


def _now(variable, values=None):
    # Of a Keras variable NumPy would ask with a warning.
    value = (values or {}).get(id(variable), variable)
    return getattr(value, "value", value)


class StandstillCheck:
    """Compares a model with what it was at the check before.

    Statistics may stand still for a good reason: each batch brings what they
    are already, as when all data is one batch and the layer comes first. This
    is taken for the reason where they moved before and came to so little that
    float32 would hold no less of it now.

    Args:
        model: `keras.Model` or layer, built.
        layers: List of the batch normalization in it.
        on_stale: `"warn"` or `"raise"`.

    Attributes:
        before: The last `Snapshot`.
    """

    def __init__(self, model, layers, on_stale):
        self._model = model
        self._layers = layers
        self._on_stale = on_stale
        self._last_move = {}
        self._accused = set()
        self.before = Snapshot(model, layers)

    def restart(self):
        """Compares with what the model is now from here on."""
        self.before = Snapshot(self._model, self._layers)

    def check(self, steps, values=None):
        """Warns, or raises, where statistics stood still.

        A layer is named once, and again only after its statistics moved.

        Args:
            steps: Int, training steps since the last check; None: unknown.
            values: As for `Snapshot`.
        """
        before, now = self.before, Snapshot(self._model, self._layers, values)
        self.before = now
        stale = []
        for layer in self._layers:
            move = _largest_move(
                before.statistics[layer], now.statistics[layer]
            )
            if move:
                self._last_move[layer] = move
                self._accused.discard(layer)
            elif (
                layer in before.updates & now.updates
                and layer not in self._accused
                and differ(before.weights[layer], now.weights[layer])
                and not self._has_arrived(layer, steps)
            ):
                stale.append(layer)
        if stale:
            self._accused.update(stale)
            self._say(stale, steps)

    def _has_arrived(self, layer, steps):
        last_move, momentum = self._last_move.get(layer), layer.momentum
        if last_move is None or momentum in (None, 1.0):
            return False
        left = last_move * momentum ** (steps or 1)
        return left <= _RESOLUTION / (1.0 - momentum)

    def _say(self, layers, steps):
        names = ", ".join(repr(layer.name) for layer in layers[:_NAMES])
        if len(layers) > _NAMES:
            names += f" and {len(layers) - _NAMES} more"
        over = f"{steps} steps" if steps else "the steps"
        cause, remedy = _cause_and_remedy(layers)
        message = (
            f"The moving statistics of batch normalization {names} stood "
            f"still over {over} in which weights moved, so inference will not "
            f"be what was trained. Likely cause: {cause}. Do: {remedy}. Then "
            "`keras_bn.recalibrate(model, data, labels=labels)` mends weights "
            "that were trained with the statistics of batches, and refuses "
            "others. Where it is meant: `keras_bn.freeze(layer)`."
        )
        if self._on_stale == "raise":
            raise RuntimeError(message)
        warnings.warn(message, stacklevel=stacklevel_of_user())


def iterations_of(model):
    """How many steps the optimizer of a model made; 0 where it has none."""
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        return 0
    return int(copied(ops.convert_to_tensor(optimizer.iterations)))


def checked_arguments(every, on_stale):
    """Raises ValueError for what `StandstillCheck` cannot be told."""
    number = isinstance(every, numbers.Real) and not isinstance(every, bool)
    if not number or every % 1 != 0 or every < 1:
        raise ValueError(
            "`every` must be an integer of at least 1. "
            f"Received: every={shown(every)}."
        )
    if not isinstance(on_stale, str) or on_stale not in ("warn", "raise"):
        raise ValueError(
            '`on_stale` must be "warn" or "raise". '
            f"Received: on_stale={shown(on_stale)}."
        )


def differ(before, now):
    """Whether one of two lists of arrays has other values; NaN is NaN."""
    return any(
        not np.array_equal(old, new, equal_nan=True)
        for old, new in zip(before, now)
    )


def _largest_move(before, now):
    """The largest change, as a share of the largest value it is among."""
    largest = 0.0
    for name, new in now.items():
        if differ([before[name]], [new]):
            with np.errstate(all="ignore"):
                move = np.max(np.abs(new - before[name])) / np.max(np.abs(new))
            # Where this is no number they moved nevertheless.
            largest = max(largest, float(np.nan_to_num(move, nan=np.inf)))
    return largest


def _cause_and_remedy(layers):
    if all(layer.momentum == 1.0 for layer in layers):
        return (
            "momentum=1.0, by which no batch counts",
            "make the layer with a smaller one, as 0.99",
        )
    if keras.backend.backend() == "jax":
        return (
            "the loop drops the non-trainable variables that "
            "`stateless_call` returns, or calls it without training=True",
            "`outputs, non_trainable_variables = model.stateless_call("
            "trainable_variables, non_trainable_variables, x, training=True)`",
        )
    return (
        "the layer is called without training=True",
        "`model(x, training=True)`",
    )
