"""Compares a model with what `convert` or `fold` made of it."""

import time

import keras
import numpy as np

from keras_bn.serving import summary
from keras_bn.serving.interface import interface_of
from keras_bn.serving.interface import random_batch
from keras_bn.serving.served import SIZES
from keras_bn.serving.served import Latency
from keras_bn.serving.verification import largest_difference

# A model that takes long is timed less often.
_REPEATS, _LEAST_REPEATS, _SECONDS = 100, 10, 3.0


def check(before, after):
    """The line that says how much the outputs differ.

    Raises:
        ValueError: more than by rounding.
    """
    batch = random_batch(interface_of(before))
    wanted, found = (
        keras.tree.flatten(_predict(model, batch)) for model in (before, after)
    )
    if not all(np.all(np.isfinite(np.float64(x))) for x in wanted):
        raise ValueError(
            "the model's outputs are not finite on random inputs. Look at its "
            "weights, `keras-bn audit` for those of batch normalization. "
            "Nothing was written"
        )
    difference, allowed = largest_difference(before, found, wanted)
    if difference > allowed:
        raise ValueError(
            "the new model does not answer as the one before on random inputs "
            f"(off by {difference:.2g}, from rounding at most {allowed:.2g}). "
            "Nothing was written"
        )
    return (
        f"checked on {len(batch[0])} random samples: off by {difference:.2g} "
        f"(rounding: at most {allowed:.2g})"
    )


def latencies(before, after):
    """A table of wall times of `predict_on_batch`, measured in turn."""
    batch = random_batch(interface_of(before))
    found = [{}, {}]
    for size in SIZES:
        arrays = [np.resize(x, (size, *x.shape[1:])) for x in batch]
        times = [[], []]
        until = time.perf_counter() + _SECONDS
        for repeat in range(-3, _REPEATS):
            if repeat >= _LEAST_REPEATS and time.perf_counter() > until:
                break
            for model, seconds in zip((before, after), times):
                begin = time.perf_counter()
                _predict(model, arrays)
                if repeat >= 0:
                    seconds.append(time.perf_counter() - begin)
        for one, seconds in zip(found, times):
            one[size] = Latency.of(seconds)
    return summary.latencies(found)


def _predict(model, arrays):
    if len(arrays) == 1:
        return model.predict_on_batch(arrays[0])
    return model.predict_on_batch(
        keras.tree.pack_sequence_as(model.input, arrays)
    )
