"""In which dtype the layer reads its inputs and keeps its moments."""

import keras
from keras import ops

_BITS = {"float16": 16, "bfloat16": 16, "float32": 32, "float64": 64}


def moments_dtype(dtype):
    """float64 for float64, else float32."""
    # `keras.backend.result_type` narrows float64 on JAX and PyTorch.
    double = keras.backend.standardize_dtype(dtype) == "float64"
    return "float64" if double else "float32"


def as_floats(inputs, compute_dtype):
    """`inputs` in `compute_dtype` or a wider float dtype."""
    bits = _BITS.get(keras.backend.standardize_dtype(inputs.dtype), 0)
    if bits == 0:
        # Integers above 2**8 would be rounded by a short compute dtype.
        return ops.cast(inputs, moments_dtype(compute_dtype))
    if bits < _BITS[compute_dtype]:
        # As autocast does, which `stateless_call` goes around.
        return ops.cast(inputs, compute_dtype)
    return inputs


def at_least(tensor, bound):
    """The larger of the two; `ops.maximum` narrows float64 on PyTorch."""
    # A number by itself would be rounded to float32 there.
    bound = ops.zeros_like(tensor) + bound
    return ops.where(tensor < bound, bound, tensor)


def at_most(tensor, bound):
    """The smaller of the two; see `at_least`."""
    bound = ops.zeros_like(tensor) + bound
    return ops.where(tensor > bound, bound, tensor)
