"""Runs SavedModels with TensorFlow alone, in a process of its own.

It is started by its path, so that neither `keras` nor `keras_bn` is imported;
both are made impossible to import. `served.py` asks it.
"""

import json
import sys
import threading
import time

sys.modules["keras"] = sys.modules["keras_bn"] = None

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402


def outputs(paths, arrays, calls):
    """Runs signatures; returns a dictionary of arrays.

    Args:
        paths: List of one path of a SavedModel.
        arrays: Dictionary of arrays.
        calls: List of (signature, dictionary from the signature's inputs to
            names of `arrays`). Text is made of images: PNG files.
    """
    (path,) = paths
    model = tf.saved_model.load(path)
    found = {}
    for number, (signature, inputs) in enumerate(calls):
        function = model.signatures[signature]
        _, specs = function.structured_input_signature
        tensors = {
            key: _tensor(specs[key], arrays[name])
            for key, name in inputs.items()
        }
        for key, tensor in function(**tensors).items():
            array = tensor.numpy()
            if array.dtype == object:
                array = array.astype("S")
            found[f"{number}/{key}"] = array
    return found


def latencies(paths, arrays, calls):
    """Times of the signature `serving_default`, model after model.

    Args:
        paths: List of paths of SavedModels.
        arrays: Dictionary of a batch of each input by its name.
        calls: Dictionary of `sizes`, a list of batch sizes, `repeats`, and
            `seconds`: after so many 20 repeats of a size are enough.

    Returns:
        Dictionary with `seconds`, (models, sizes, repeats), NaN for those that
        were left out.
    """
    sizes, repeats = calls["sizes"], calls["repeats"]
    functions = [
        tf.saved_model.load(path).signatures["serving_default"]
        for path in paths
    ]
    seconds = np.full((len(paths), len(sizes), repeats), np.nan)
    for column, size in enumerate(sizes):
        tensors = [_of_size(function, arrays, size) for function in functions]
        until = time.perf_counter() + calls["seconds"]
        for repeat in range(-3, repeats):
            if repeat >= 20 and time.perf_counter() > until:
                break
            for row, function in enumerate(functions):
                begin = time.perf_counter()
                for value in function(**tensors[row]).values():
                    value.numpy()
                if repeat >= 0:
                    seconds[row, column, repeat] = time.perf_counter() - begin
    return {"seconds": seconds}


def answers(paths, arrays, calls):
    """Different answers to one batch, asked for again and again by threads.

    Args:
        paths: List of one path.
        arrays: Dictionary of a batch of each input by its name.
        calls: Dictionary of `threads` and `batches`, asked for by all together.

    Returns:
        Dictionary with the first answer's outputs, by `answer/` and name, and
        `different`, the number of different answers, to the bit.
    """
    (path,) = paths
    function = tf.saved_model.load(path).signatures["serving_default"]
    tensors = _of_size(function, arrays, None)
    seen, failures = {}, []
    lock = threading.Lock()
    left = iter(range(calls["batches"]))

    def ask():
        try:
            while True:
                with lock:
                    if next(left, None) is None:
                        return
                answer = {k: v.numpy() for k, v in function(**tensors).items()}
                key = b"".join(answer[k].tobytes() for k in sorted(answer))
                with lock:
                    seen.setdefault(key, answer)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(calls["threads"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    first = next(iter(seen.values()))
    found = {f"answer/{key}": array for key, array in first.items()}
    return found | {"different": np.int64(len(seen))}


def _of_size(function, arrays, size):
    _, specs = function.structured_input_signature
    return {
        key: _tensor(
            spec,
            arrays[key]
            if size is None
            else np.resize(arrays[key], (size, *arrays[key].shape[1:])),
        )
        for key, spec in specs.items()
    }


def _tensor(spec, array):
    if spec.dtype == tf.string:
        return tf.stack([tf.io.encode_png(image) for image in array])
    return tf.cast(array, spec.dtype)


def _main():
    request = json.load(sys.stdin)
    with np.load(request["arrays"]) as file:
        arrays = dict(file)
    run = {f.__name__: f for f in (outputs, latencies, answers)}
    found = run[request["run"]](request["paths"], arrays, request["calls"])
    np.savez(request["found"], **found)


if __name__ == "__main__":
    try:
        _main()
    except Exception as error:
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(1)
