"""`fold` on random graphs: the model's own outputs, and no error of ours."""

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import reject
from hypothesis import settings
from hypothesis import strategies as st

import keras_bn
from keras_bn.model_layers import BATCH_NORMALIZATIONS
from tests.keras_bn import frameworks
from tests.keras_bn.surgery.random_graphs import random_model

# Elsewhere Keras narrows float64 in some layers.
DTYPE = "float64" if frameworks.IS_TENSORFLOW else "float32"
# JAX compiles each operation of each shape.
GRAPHS = 60 if frameworks.IS_JAX else 200


@pytest.fixture(autouse=True)
def _precision():
    yield
    keras.config.set_floatx("float32")


def _outputs(model, inputs, **arguments):
    return keras.tree.flatten(model(inputs, **arguments))


def _check(drawn):
    try:
        _outputs(drawn.model, drawn.inputs)
    except Exception:
        # What the backend's CPU kernels do not know.
        reject()
    layers = drawn.model._flatten_layers()
    if not any(isinstance(x, BATCH_NORMALIZATIONS) for x in layers):
        with pytest.raises(ValueError, match="found no batch normalization"):
            keras_bn.fold(drawn.model)
        return
    folded = keras_bn.fold(drawn.model)
    str(folded.fold_report)
    calls = [{"training": False}]
    if drawn.trained:
        calls.append({})
    for arguments in calls:
        expected, found = (
            _outputs(model, drawn.inputs, **arguments)
            for model in (drawn.model, folded)
        )
        for one, other, (size, errors) in zip(
            expected, found, drawn.bounds, strict=True
        ):
            assert frameworks.dtype_of(other) == frameworks.dtype_of(one)
            # Either has these errors, and weights that are rounded once more.
            np.testing.assert_allclose(
                frameworks.array(other),
                frameworks.array(one),
                rtol=0,
                atol=4 * (errors + 8) * drawn.unit * size,
            )


@settings(max_examples=GRAPHS)
@given(st.data())
def test_random_graphs(data):
    _check(random_model(data.draw, DTYPE))


@pytest.mark.slow
@settings(max_examples=5000)
@given(st.data())
def test_many_random_graphs(data):
    _check(random_model(data.draw, DTYPE))
