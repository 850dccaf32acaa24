"""Every option with every other: refused by name, or right.

To cross a further option, add it to `OPTIONS`, what it excludes to `REFUSED`,
and its meaning to `layer_in_numpy.py`.
"""

import itertools

import numpy as np
import pytest

import keras_bn
from tests.keras_bn import frameworks
from tests.keras_bn.layer_in_numpy import LayerInNumPy
from tests.keras_bn.pairwise import covering

# Ghost batches of 2, 2 and 1 samples.
SHAPE = (5, 2, 4, 3)
BOUNDS = {"rmax": 1.2, "rmin": 0.8, "dmax": 0.3}

# Arguments of the layer, and `mask`: along which axes it differs.
OPTIONS = {
    "axis": [-1, 1, (1, 2), (1, 3)],
    "momentum": [0.9, None],
    "epsilon": [1e-3, 0.1],
    "center": [True, False],
    "scale": [True, False],
    "renorm": [False, True],
    "renorm_clipping": [None, BOUNDS],
    "renorm_momentum": [0.99, 0.5],
    "virtual_batch_size": [None, 2],
    "unbiased_variance": [False, True],
    "debias": [False, True],
    "use_moving_statistics": [None, True, False],
    "update_moving_statistics": [True, False],
    "train_gamma_and_beta": [True, False],
    # There are no replicas here: it changes nothing.
    "synchronized": [False, True],
    "dtype": ["float32", "mixed_bfloat16", "float64"],
    "mask": [None, "samples", "positions", "full"],
}
REFUSED = [
    {"momentum": None, "debias": True},
    {"virtual_batch_size": 2, "renorm": True},
]
# JAX compiles each case anew.
STRENGTH = 2 if frameworks.IS_JAX else 3


def _allowed(combination):
    return not any(
        all(combination.get(n, ()) == v for n, v in refused.items())
        for refused in REFUSED
    )


CASES = covering(OPTIONS, STRENGTH, _allowed)


def _name(case):
    """What of a case is not the first choice."""
    return "-".join(
        f"{name}={value}".replace("'", "")
        for name, value in case.items()
        if value != OPTIONS[name][0]
    )


class Data:
    """Batches, and their masks at full rank and as the layer is given them."""

    def __init__(self, case):
        axis, self.mask, self.dtype = (
            case[name] for name in ("axis", "mask", "dtype")
        )
        axes = axis if isinstance(axis, tuple) else (axis,)
        self.axes = tuple(i % len(SHAPE) for i in axes)
        self.generator = np.random.default_rng(0)

    def batch(self):
        inputs = self.generator.normal(1.0, 2.0, SHAPE)
        return self._rounded(inputs + np.indices(SHAPE).sum(0))

    def output_gradient(self):
        return self._rounded(self.generator.normal(size=SHAPE))

    def masks(self):
        """`(full, given)`, or `(None, None)`."""
        if self.mask is None:
            return None, None
        full = self.generator.random(SHAPE) < 0.6
        # Without a first sample, and where it can be without a channel.
        full[0] = False
        if self.mask == "full":
            channel = [0 if i in self.axes else slice(None) for i in range(4)]
            full[tuple(channel)] = False
            return full, full
        same = self.axes if self.mask == "positions" else (1, 2, 3)
        kept = tuple(slice(1) if i in same else slice(None) for i in range(4))
        full = full[kept]
        full[1] = True
        given = full.squeeze(self.axes) if self.mask == "positions" else full
        return full, given

    def _rounded(self, values):
        """Values of the dtype that the layer computes in."""
        dtype = self.dtype.removeprefix("mixed_")
        with frameworks.precision(dtype):
            return frameworks.array(frameworks.tensor(values, dtype))


# The error allowed in what is bfloat16.
SHORT = 2e-2


def _precision(case):
    """The error allowed in what is float32 or float64."""
    return 1e-11 if case["dtype"] == "float64" else 2e-5


def _close(found, expected, tolerance, what):
    expected = np.reshape(expected, found.shape)
    size = np.abs(expected).max(initial=1.0)
    np.testing.assert_allclose(
        found, expected, tolerance, tolerance * size, err_msg=what
    )


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_a_combination(case):
    """Two steps and inference, beside the same in NumPy."""
    with frameworks.precision(case["dtype"]):
        _check(case)


def _check(case):
    data = Data(case)
    arguments = {n: v for n, v in case.items() if n != "mask"}
    layer = keras_bn.BatchNormalization(**arguments)
    layer.build(SHAPE)
    channels = int(np.prod([SHAPE[i] for i in data.axes]))
    weights = {}
    for variable in (layer.gamma, layer.beta):
        if variable is not None:
            values = data.generator.uniform(0.5, 1.5, channels)
            values = values.astype("float32")
            variable.assign(values.reshape(variable.shape))
            weights[variable.name] = values
    trained = set(weights) if arguments.pop("train_gamma_and_beta") else set()
    for name in ("center", "scale", "synchronized", "dtype"):
        arguments.pop(name)
    model = LayerInNumPy(channels, **weights, **arguments)
    precise = _precision(case)
    short = SHORT if case["dtype"] == "mixed_bfloat16" else precise

    steps = {
        training: frameworks.steps(layer, training=training)
        for training in (True, False)
    }
    for training in (True, True, False):
        inputs, output_gradient = data.batch(), data.output_gradient()
        mask, given = data.masks()
        masked = {}
        if given is not None:
            masked["mask"] = frameworks.tensor(given, "bool")
        step = steps[training](
            frameworks.tensor(inputs, layer.compute_dtype),
            output_gradient,
            **masked,
        )
        outputs, of_inputs, of_gamma, of_beta = model.call(
            inputs, output_gradient, mask, training
        )
        _close(step.outputs, outputs, short, "outputs")
        _close(step.input_gradient, of_inputs, short, "gradient of inputs")
        assert set(step.weight_gradients) == trained
        expected = {"gamma": of_gamma, "beta": of_beta}
        for name, gradient in step.weight_gradients.items():
            _close(gradient, expected[name], precise, name)
        for name, value in model.statistics().items():
            _close(step.statistics[name], value, precise, name)


@pytest.mark.parametrize("refused", REFUSED, ids=str)
def test_what_is_refused(refused):
    """At construction, by the names of both, whatever else is asked for."""
    others = {n: v for n, v in OPTIONS.items() if n not in (*refused, "mask")}
    first = {n: v[0] for n, v in others.items()}
    for name, values in others.items():
        for value in values:
            with pytest.raises(ValueError) as error:
                keras_bn.BatchNormalization(**{**first, name: value, **refused})
            for named, given in refused.items():
                assert f"{named}={given}" in str(error.value)


def test_the_cases_hold_every_allowed_pair():
    for one, other in itertools.combinations(OPTIONS, 2):
        for pair in itertools.product(OPTIONS[one], OPTIONS[other]):
            pair = dict(zip((one, other), pair))
            found = any(
                all(case[n] == v for n, v in pair.items()) for case in CASES
            )
            assert found == _allowed(pair), pair
