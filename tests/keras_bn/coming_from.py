"""A peer's layer beside ours, at the settings of the README's table."""

import pathlib

import numpy as np

import keras_bn
from tests.keras_bn import frameworks

README = pathlib.Path(__file__).parents[2] / "README.md"
START, END = "<!-- coming from -->", "<!-- /coming from -->"
LEARNING_RATE = 0.1


def rows(peer):
    """The README's pairs of code, theirs and ours, whose first begins so."""
    table = README.read_text().split(START)[1].split(END)[0]
    found = set()
    for line in table.strip().splitlines()[2:]:
        there, here = (cell.split("`") for cell in line.split(" | ")[:2])
        if there[1].startswith(peer):
            found.add((there[1], here[1]))
    return found


def ours(code):
    """The layer that the code in the README's table makes."""
    return eval(code, {"BatchNormalization": keras_bn.BatchNormalization})


def values(shape, seed):
    generator = np.random.default_rng(seed)
    # Every channel, on whichever axis it is, has a mean of its own.
    drift = np.indices(shape).sum(0)
    return (generator.normal(1.0, 2.0, shape) + drift).astype("float32")


def close(found, expected, what, tolerance=1e-4):
    found, expected = (np.asarray(x, "float64") for x in (found, expected))
    size = np.abs(expected).max(initial=1.0)
    np.testing.assert_allclose(
        found, expected, tolerance, tolerance * size, err_msg=what
    )


def carry_weights(theirs, layer):
    """As the README says: in this order, in the shapes of our weights."""
    weights = zip(theirs.weights(), layer.weights, strict=True)
    layer.set_weights([np.reshape(w, v.shape) for w, v in weights])


def step_beside(
    theirs, layer, batch, output_gradient, mask=None, steps=None, **tolerance
):
    """One step of gradient descent in both; the same in everything.

    `steps` is `frameworks.steps(layer)`, where there are several.
    """
    given = {}
    if mask is not None:
        given["mask"] = frameworks.tensor(mask, "bool")
    step = (steps or frameworks.steps(layer))(
        frameworks.tensor(batch, layer.compute_dtype), output_gradient, **given
    )
    outputs, of_inputs, of_weights = theirs.step(batch, output_gradient, mask)
    close(step.outputs, outputs, "outputs", **tolerance)
    close(step.input_gradient, of_inputs, "gradient of inputs", **tolerance)
    for variable, expected in zip(
        layer.trainable_variables, of_weights, strict=True
    ):
        gradient = step.weight_gradients[variable.name]
        close(gradient.ravel(), np.ravel(expected), variable.name, **tolerance)
        variable.assign(variable - LEARNING_RATE * gradient)


def check(theirs, layer, shape, mask=None, **tolerance):
    """A step in the peer alone, its weights, two steps in both, inference.

    Args:
        theirs: Has `step(batch, output_gradient, mask)`, which takes one step
            of gradient descent and returns the outputs, the gradient for the
            batch and those for gamma and beta; `infer(batch)`; `weights()`, a
            list in the order of ours.
        layer: Ours.
        shape: Of the batch.
        mask: Boolean array, or None.
        **tolerance: `tolerance`, relative to the largest value.
    """
    layer.build(shape)
    for found, initial in zip(layer.weights, theirs.weights(), strict=True):
        close(frameworks.array(found).ravel(), np.ravel(initial), found.name)
    theirs.step(values(shape, 0), values(shape, 1), mask)
    carry_weights(theirs, layer)
    steps = frameworks.steps(layer)
    for seed in (2, 4):
        step_beside(
            theirs,
            layer,
            values(shape, seed),
            values(shape, seed + 1),
            mask,
            steps,
            **tolerance,
        )
    for found, expected in zip(layer.weights, theirs.weights(), strict=True):
        close(
            frameworks.array(found).ravel(),
            np.ravel(expected),
            found.name,
            1e-5 if layer.compute_dtype == "float32" else 1e-2,
        )
    check_inference(theirs, layer, values(shape, 6), **tolerance)


def check_inference(theirs, layer, batch, **tolerance):
    outputs = layer(frameworks.tensor(batch, layer.compute_dtype))
    close(
        frameworks.array(outputs), theirs.infer(batch), "inference", **tolerance
    )
