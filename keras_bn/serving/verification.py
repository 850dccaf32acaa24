"""Compares what an export answers with what the model does."""

import keras
import numpy as np
from keras import ops

from keras_bn.serving import served
from keras_bn.serving.errors import ExportError
from keras_bn.serving.interface import as_uint8_images
from keras_bn.serving.interface import call

# The largest difference, as a share of the outputs' deviation over the batch
# and of their largest value: by the narrowest dtype that the model computes
# in. Frameworks and folding round differently; a wrong graph is off by more.
_TOLERANCES = {
    "float64": (1e-9, 1e-12),
    "float32": (1e-3, 1e-4),
    "float16": (2e-2, 1e-2),
    "bfloat16": (1e-1, 5e-2),
}


def outputs_of(model, preprocessing, arrays):
    """What the model answers here, on its own backend.

    Args:
        model: Functional or sequential model.
        preprocessing: Model of one input, or None.
        arrays: List of a batch of each input.

    Returns:
        List of arrays.

    Raises:
        ExportError: The model cannot be run on them, or its outputs are not
            finite.
    """
    try:
        inputs = [ops.convert_to_tensor(array) for array in arrays]
        outputs = call(model, preprocessing, inputs)
        found = [
            ops.convert_to_numpy(ops.cast(x, "float32") if _is_short(x) else x)
            for x in outputs
        ]
    except Exception as error:
        # Each backend raises kinds of its own.
        raise ExportError(
            "The model cannot be run on the batch of `verify_on`: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:400]}. "
            "Nothing was published."
        ) from error
    for output in found:
        if output.dtype.kind == "f" and not np.all(np.isfinite(output)):
            raise ExportError(
                "The model's outputs are not finite on the batch of "
                "`verify_on`. Look at its weights, "
                "keras_bn.audit(model) for those of batch normalization. "
                "Nothing was published."
            )
    return found


def verify(folder, model, preprocessing, interface, arrays):
    """Runs all signatures of an export with TensorFlow alone, and compares.

    Args:
        folder: Path of the SavedModel.
        model: The model as it was given, before folding.
        preprocessing: Model of one input, or None.
        interface: Their `Interface`.
        arrays: List of a batch of each input.

    Returns:
        Dictionary from what was compared, `"serving_default: outputs"`, to the
        largest difference and to what was allowed.

    Raises:
        ExportError: The export cannot be loaded or run, or answers something
            else than the model.
    """
    names = [one.name for one in interface.inputs]
    expected = [outputs_of(model, preprocessing, arrays)]
    calls = [("serving_default", dict(zip(names, arrays, strict=True)))]
    if interface.takes_images:
        images = as_uint8_images(arrays)
        of_images = outputs_of(
            model, preprocessing, [images.astype(arrays[0].dtype)]
        )
        if interface.inputs[0].dtype != "uint8":
            expected.append(of_images)
            calls.append(("serving_uint8", {names[0]: images}))
    if interface.class_names is not None:
        calls.append(("classify_bytes", {"image_bytes": images}))
    answers = served.outputs(folder, calls)
    shares = _TOLERANCES[_narrowest_dtype(model)]
    differences = {}
    for (signature, _), answer, wanted in zip(calls, answers, expected):
        for name, one in zip(interface.outputs, wanted, strict=True):
            what = f"{signature}: {name}"
            differences[what] = _compare(what, answer[name], one, shares)
    if interface.class_names is not None:
        what = "classify_bytes: probabilities"
        differences[what] = _compare_classes(
            what, answers[-1], of_images[0], interface, shares
        )
    return differences


def _compare_classes(what, answer, outputs, interface, shares):
    """Compares sums over classes of the same name; the order must fall."""
    if interface.activation == "linear":
        outputs = np.exp(outputs - outputs.max(axis=-1, keepdims=True))
        outputs /= outputs.sum(axis=-1, keepdims=True)
    names = [name.encode() for name in interface.class_names]
    distinct = sorted(set(names))
    found = np.zeros((len(outputs), len(distinct)))
    wanted = np.zeros_like(found)
    for row in range(len(outputs)):
        for name, value in zip(
            answer["class_names"][row], answer["probabilities"][row]
        ):
            found[row, distinct.index(name)] += value
        for name, value in zip(names, outputs[row]):
            wanted[row, distinct.index(name)] += value
    difference = _compare(what, found, wanted, shares)
    if np.any(np.diff(answer["probabilities"], axis=-1) > 0.0):
        raise ExportError(
            "classify_bytes: the probabilities do not fall. "
            "Nothing was published."
        )
    return difference


def _compare(what, found, wanted, shares):
    if found.shape != wanted.shape or found.dtype.kind != wanted.dtype.kind:
        raise ExportError(
            f"The export does not answer as the model does. {what} has shape "
            f"{found.shape} and dtype {found.dtype}, the model's output "
            f"{wanted.shape} and {wanted.dtype}. Nothing was published."
        )
    difference, allowed = _difference(found, wanted, shares)
    if difference > allowed:
        raise ExportError(
            f"The export does not answer as the model does. {what} is off by "
            f"{difference:.3g}, with at most {allowed:.3g} from rounding. "
            "Nothing was published."
        )
    return difference, allowed


def largest_difference(model, found, wanted):
    """The largest difference of outputs, and what rounding may come to.

    Args:
        model: What gave `wanted`; its dtypes say how much is allowed.
        found, wanted: Lists of arrays of the same shapes.

    Returns:
        Tuple of two floats, for the output with the largest share of what is
        allowed.
    """
    shares = _TOLERANCES[_narrowest_dtype(model)]
    return max(
        (_difference(x, y, shares) for x, y in zip(found, wanted)),
        key=lambda pair: pair[0] / max(pair[1], np.finfo("float64").tiny),
    )


def _difference(found, wanted, shares):
    allowed = 0.0
    if found.dtype.kind == "f":
        deviation = np.std(np.float64(wanted), axis=0).max(initial=0.0)
        largest = np.abs(wanted).max(initial=0.0)
        allowed = shares[0] * deviation + shares[1] * largest
    difference = np.abs(np.float64(found) - np.float64(wanted))
    difference = np.nan_to_num(difference.max(initial=0.0), nan=np.inf)
    return float(difference), float(allowed)


def _narrowest_dtype(model):
    dtypes = {layer.compute_dtype for layer in model._flatten_layers()}
    for dtype in reversed(_TOLERANCES):
        if dtype in dtypes:
            return dtype
    return "float32"


def _is_short(tensor):
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    return dtype in ("float16", "bfloat16")
