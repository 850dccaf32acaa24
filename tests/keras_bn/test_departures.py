"""Where Keras's layer is wrong: both layers run, and the README's table.

Each case runs a layer and says in a few words what it did. What ours does is
also held against the float64 reference. The table in README.md has a column
for each backend; the one of the backend at hand is made again here.
"""

import pathlib
import re

import keras
import numpy as np
import pytest
from keras import ops

import keras_bn
from keras_bn.kernels import reference
from tests.keras_bn import frameworks
from tests.keras_bn.kernels.test_kernels import finite_differences

KERAS = keras.layers.BatchNormalization
OURS = keras_bn.BatchNormalization
BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
README = pathlib.Path(__file__).parents[2] / "README.md"
START, END = "<!-- departures -->", "<!-- /departures -->"


def _right(layer, inputs, mask=None, axis=-1, tolerance=1e-3):
    """Whether the moving statistics are the batch's (momentum 0)."""
    mean, variance, _ = reference.batch_moments(
        inputs, axis=axis % inputs.ndim, mask=mask
    )
    got = frameworks.array(layer.moving_mean)
    mean_right = np.allclose(got, mean, tolerance, tolerance)
    got = frameworks.array(layer.moving_variance)
    variance_right = np.allclose(got, variance, tolerance, tolerance)
    return mean_right and variance_right


def _run(layer, inputs, mask=None, dtype="float32"):
    if mask is not None:
        mask = ops.convert_to_tensor(mask)
    return frameworks.array(
        layer(frameworks.tensor(inputs, dtype), training=True, mask=mask)
    )


def _error(error):
    """The kind of error, and what of its text is worth a table."""
    return type(error).__name__


def far_from_zero(layer_class):
    inputs = np.random.default_rng(0).normal(1e4, 0.1, (4096, 64))
    inputs = inputs.astype("float32")
    layer = layer_class(momentum=0.0)
    _run(layer, inputs)
    variance = frameworks.array(layer.moving_variance)
    outputs = frameworks.array(layer(frameworks.tensor(inputs)))
    if (variance < 0).any():
        return "variance below 0" + (", NaN" if np.isnan(outputs).any() else "")
    worst = np.abs(variance / inputs.astype("float64").var(0) - 1).max()
    return "right" if worst < 1e-2 else "variance off"


def mask_with_channels_first(layer_class):
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(4, 3, 6)) + [[[1.0], [2.0], [3.0]]]
    positions = generator.random((4, 6)) < 0.6
    layer = layer_class(axis=1, momentum=0.0)
    try:
        _run(layer, inputs, positions)
    except Exception as error:
        return _error(error)
    right = _right(layer, inputs, positions[:, None], 1)
    return "right" if right else "wrong statistics"


def mask_with_channels_first_square(layer_class):
    """Sizes that fit whether the mask lacks the channels or the last axis."""
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(4, 3, 3)) + [[[1.0], [2.0], [3.0]]]
    positions = generator.random((4, 3)) < 0.6
    layer = layer_class(axis=1, momentum=0.0)
    try:
        _run(layer, inputs, positions)
    except ValueError:
        return "refused: ambiguous"
    right = _right(layer, inputs, positions[:, None], 1)
    return "right" if right else "wrong statistics"


def mask_over_one_channel(layer_class):
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(4, 6, 1))
    mask = generator.random((4, 6)) < 0.6
    layer = layer_class(momentum=0.0)
    try:
        _run(layer, inputs, mask)
    except Exception as error:
        return _error(error)
    return "right" if _right(layer, inputs, mask[..., None]) else "wrong"


def mask_over_all(layer_class):
    layer = layer_class(momentum=0.5)
    layer.build((4, 3))
    layer.moving_mean.assign([8.0, 8.0, 8.0])
    _run(layer, np.ones((4, 3)), np.zeros(4, bool))
    mean = frameworks.array(layer.moving_mean)[0]
    variance = frameworks.array(layer.moving_variance)[0]
    if mean == 8 and variance == 1:
        return "statistics kept"
    if mean == 4 and variance == 0.5:
        return "statistics pulled to 0"
    return f"mean {mean:.3g}, variance {variance:.3g}"


def mean_under_a_mask(layer_class):
    """One position is kept of inputs that are 1e6: the mean is that."""
    inputs = np.full((4, 2), 1e6)
    layer = layer_class(momentum=0.0)
    _run(layer, inputs, np.array([True, False, False, False]))
    mean = float(frameworks.array(layer.moving_mean)[0])
    return "right" if mean == 1e6 else f"{mean:.7g} instead of 1e6"


def empty_batch(layer_class):
    layer = layer_class(momentum=0.5)
    layer.build((None, 3))
    layer.moving_mean.assign([8.0, 8.0, 8.0])
    try:
        _run(layer, np.ones((0, 3)))
    except Exception as error:
        return _error(error)
    statistics = [
        float(frameworks.array(v)[0])
        for v in (layer.moving_mean, layer.moving_variance)
    ]
    if not np.isnan(statistics).any():
        kept = statistics == [8.0, 1.0]
        return "statistics kept" if kept else "statistics changed"
    _run(layer, np.random.default_rng(0).normal(size=(8, 3)))
    mean = frameworks.array(layer.moving_mean)
    return "NaN for ever" if np.isnan(mean).any() else "NaN once"


def float16_statistics(layer_class):
    inputs = np.random.default_rng(0).normal(0, 1000.0, (256, 3))
    inputs = frameworks.array(frameworks.tensor(inputs, "float16"))
    layer = layer_class(momentum=0.0, dtype="float16")
    _run(layer, inputs, dtype="float16")
    if not np.isfinite(frameworks.array(layer.moving_variance)).all():
        return "variance infinite"
    return "right" if _right(layer, inputs) else "wrong"


def bfloat16_statistics(layer_class):
    """A step below 1 in 512 of the value is rounded away."""
    inputs = np.random.default_rng(0).normal(1.0, 1.5, (256, 3))
    inputs = frameworks.array(frameworks.tensor(inputs, "bfloat16"))
    expected = inputs.astype("float64").var(0)
    layer = layer_class(momentum=0.999, dtype="bfloat16")
    layer.build(inputs.shape)
    layer.moving_variance.assign(expected * 0.8)
    before = frameworks.array(layer.moving_variance)
    for _ in range(3):
        _run(layer, inputs, dtype="bfloat16")
    after = frameworks.array(layer.moving_variance)
    if (before == after).all():
        return "variance stays off"
    wanted = expected + (before - expected) * 0.999**3
    return "right" if np.allclose(after, wanted, 1e-4) else "wrong"


def float64_outputs(layer_class):
    inputs = np.random.default_rng(0).normal(size=(64, 3))
    with frameworks.precision("float64"):
        outputs = _run(layer_class(dtype="float64"), inputs, dtype="float64")
    expected, *_ = reference.normalize_batch(
        inputs, None, None, axis=1, epsilon=1e-3
    )
    right = np.allclose(outputs, expected, 1e-12, 1e-12)
    return "right" if right else "computed in float32"


def second_derivatives(layer_class):
    """The gradient of a gradient, as gradient penalties take it.

    Against differences of the first gradient in float64.
    """
    generator = np.random.default_rng(0)
    inputs, output_gradient, direction = generator.normal(size=(3, 6, 3))

    def projected(inputs):
        of_inputs, *_ = reference.normalize_batch_gradient(
            output_gradient, inputs, None, axis=1, epsilon=1e-3
        )
        return (of_inputs * direction).sum()

    expected = finite_differences(projected, [inputs], 0)
    with frameworks.precision("float64"):
        layer = layer_class(dtype="float64")
        layer.build(inputs.shape)
        state = [
            [v.value for v in variables]
            for variables in (
                layer.trainable_variables,
                layer.non_trainable_variables,
            )
        ]
        tensors = [
            frameworks.tensor(x, "float64")
            for x in (inputs, output_gradient, direction)
        ]
        found, _ = frameworks.second_gradients(
            lambda x: layer.stateless_call(*state, x, training=True)[:1],
            tensors[:1],
            tensors[1],
            tensors[2:],
        )
    error = np.abs(found - expected).max() / np.abs(expected).max()
    return "right" if error < 1e-4 else f"off by {error:.0%}"


def fractional_axis(layer_class):
    return _made(layer_class, "axis", axis=1.7)


def momentum_out_of_range(layer_class):
    return _made(layer_class, "momentum", momentum=1.5)


def epsilon_out_of_range(layer_class):
    return _made(layer_class, "epsilon", epsilon=-1.0)


def _made(layer_class, name, **kwargs):
    try:
        layer = layer_class(**kwargs)
    except ValueError as error:
        received = f"Received: {name}={kwargs[name]}"
        return "refused" if received in str(error) else str(error)
    value = getattr(layer, name)
    return "accepted" if value == kwargs[name] else f"taken as {value}"


def error_text(layer_class):
    clipping = {"rmax": 1.0, "rmin": 2.0}
    with pytest.raises(ValueError) as error:
        layer_class(renorm=True, renorm_clipping=clipping)
    received = str(error.value).split("Received: ")[1].rstrip(".")
    return f"says `{received}`"


# The case, what it is called in the table, what ours does.
CASES = [
    (far_from_zero, "inputs far from zero (mean 1e4, deviation 0.1)", "right"),
    (mask_with_channels_first, "mask of positions, channels first", "right"),
    (
        mask_with_channels_first_square,
        "the same, as many positions as channels",
        "refused: ambiguous",
    ),
    (mask_over_one_channel, "mask, one channel", "right"),
    (mask_over_all, "a batch that is masked everywhere", "statistics kept"),
    (mean_under_a_mask, "mean of one kept position that is 1e6", "right"),
    (empty_batch, "an empty batch, then an ordinary one", "statistics kept"),
    (float16_statistics, '`dtype="float16"`, deviation 1000', "right"),
    (
        bfloat16_statistics,
        '`dtype="bfloat16"`, moving variance 20% off, `momentum=0.999`',
        "right",
    ),
    (float64_outputs, '`dtype="float64"`', "right"),
    (second_derivatives, "second derivatives", "right"),
    (fractional_axis, "`axis=1.7`", "refused"),
    (momentum_out_of_range, "`momentum=1.5`", "refused"),
    (epsilon_out_of_range, "`epsilon=-1.0`", "refused"),
    (
        error_text,
        "error text for `rmax=1.0, rmin=2.0`",
        "says `rmax=1.0, rmin=2.0`",
    ),
]


@pytest.mark.parametrize(
    "case, ours", [(case, ours) for case, _, ours in CASES]
)
def test_ours_is_right_or_refuses(case, ours):
    assert case(OURS) == ours


def departures_table(columns):
    """The table, from what Keras's layer does on each backend.

    `columns` maps names of backends to lists, one entry for each case.
    """
    heads = [f"Keras on {name}" for name in BACKENDS.values()]
    rows = [["", *heads, "keras_bn"], ["---"] * (2 + len(heads))]
    for i, (_, called, ours) in enumerate(CASES):
        rows.append([called, *(columns[b][i] for b in BACKENDS), ours])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _recorded_columns():
    """What README.md says of each backend; "?" where it says nothing."""
    columns = {backend: ["?"] * len(CASES) for backend in BACKENDS}
    text = README.read_text() if README.exists() else ""
    found = re.search(f"{START}\n(.*?)\n{END}", text, re.DOTALL)
    rows = found[1].split("\n")[2:] if found else []
    for i, row in enumerate(rows[: len(CASES)]):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        for backend, cell in zip(BACKENDS, cells[1:-1]):
            columns[backend][i] = cell
    return columns, found[1] if found else None


def test_the_table_in_the_readme():
    columns, recorded = _recorded_columns()
    columns[frameworks.BACKEND] = [case(KERAS) for case, *_ in CASES]
    table = departures_table(columns)
    assert recorded == table, f"README.md should have\n{START}\n{table}\n{END}"
