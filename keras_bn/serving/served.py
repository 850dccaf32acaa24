"""What a SavedModel answers, and how fast, with TensorFlow alone."""

import os
import tempfile
import typing
from pathlib import Path

import numpy as np

from keras_bn.serving import child_process

# Samples in the batches that are timed.
SIZES = (1, 8, 64)
_PROGRAM = Path(__file__).with_name("tensorflow_alone.py")


class Latency(typing.NamedTuple):
    """Seconds that one batch takes, at the median and the 99th percentile."""

    p50: float
    p99: float

    @classmethod
    def of(cls, times):
        """Of an array of seconds; NaN stands for a call that was not made."""
        return cls(*map(float, np.nanpercentile(times, [50, 99])))


def outputs(path, calls):
    """Runs signatures of a SavedModel in a process of its own.

    Args:
        path: Path of the SavedModel.
        calls: List of (signature, dictionary of arrays by the names of its
            inputs). For an input of encoded images, images of uint8.

    Returns:
        List of dictionaries of arrays, one for each call.

    Raises:
        ExportError: It cannot be loaded or run.
    """
    arrays, named = {}, []
    for number, (signature, inputs) in enumerate(calls):
        keys = {key: f"{number}/{key}" for key in inputs}
        named.append((signature, keys))
        arrays |= {keys[key]: array for key, array in inputs.items()}
    found = _ask("outputs", [path], arrays, named)
    answers = [{} for _ in calls]
    for key, array in found.items():
        number, _, name = key.partition("/")
        answers[int(number)][name] = array
    return answers


def latencies(paths, inputs, sizes=SIZES, repeats=200, seconds=10.0):
    """Measures `serving_default` of SavedModels, in turn in one process.

    Each call is timed until its outputs are NumPy arrays.

    Args:
        paths: List of paths: of a model before and after folding, say.
        inputs: Dictionary of a batch of each input by its name; repeated or
            cut to the batch sizes.
        sizes: Batch sizes.
        repeats: Calls of each model at each size, after three to warm up.
        seconds: After so many, 20 calls are enough.

    Returns:
        List of a dictionary from batch size to `Latency`, for each path.

    Raises:
        ExportError: One cannot be loaded or run.
    """
    calls = {"sizes": list(sizes), "repeats": repeats, "seconds": seconds}
    times = _ask("latencies", paths, inputs, calls)["seconds"]
    return [
        {size: Latency.of(row) for size, row in zip(sizes, of_model)}
        for of_model in times
    ]


def answers_to_threads(path, inputs, threads=2, batches=1000):
    """Asks `serving_default` for one batch again and again from threads.

    Args:
        path: Path of the SavedModel.
        inputs: Dictionary of a batch of each input by its name.
        threads: Number of threads that ask at once.
        batches: Number of batches, of all threads together.

    Returns:
        Tuple of the number of different answers, to the bit, and one of them:
        a dictionary of arrays.

    Raises:
        ExportError: It cannot be loaded or run.
    """
    calls = {"threads": threads, "batches": batches}
    found = _ask("answers", [path], inputs, calls)
    different = int(found.pop("different"))
    return different, {k.partition("/")[2]: v for k, v in found.items()}


def _ask(run, paths, arrays, calls):
    with tempfile.TemporaryDirectory() as files:
        request = {
            "run": run,
            "paths": [os.path.abspath(path) for path in paths],
            "arrays": os.path.join(files, "arrays.npz"),
            "found": os.path.join(files, "found.npz"),
            "calls": calls,
        }
        np.savez(request["arrays"], **arrays)
        child_process.run(
            "Running the export with TensorFlow alone",
            _PROGRAM,
            request,
            {},
            ["numpy"],
        )
        with np.load(request["found"]) as found:
            return dict(found)
