"""Generated cases of batch normalization, and the error that is allowed."""

import dataclasses

import numpy as np
from hypothesis import strategies as st

from keras_bn.kernels import reference
from tests.keras_bn import frameworks

DTYPES = ("float16", "bfloat16", "float32", "float64")
MASKS = (None, "positions", "rows", "full", "channels", "all", "nothing")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of a kernel, small enough to print and to repeat."""

    shape: tuple
    axis: int
    dtype: str = "float32"
    mask: str | None = None
    gamma: bool = True
    beta: bool = True
    epsilon: float = 1e-3
    far: float = 0.0  # the mean, in standard deviations
    seed: int = 0

    @property
    def channels(self):
        return self.shape[self.axis]

    def data(self):
        """`inputs`, `output_gradient`, `gamma`, `beta`, `mask` as arrays.

        The first two hold values of `dtype`.
        """
        generator = np.random.default_rng(self.seed)
        spread = generator.uniform(0.1, 4.0, self.channels)
        center = self.far * spread * generator.choice([-1, 1], self.channels)
        inputs = generator.normal(size=self.shape)
        inputs = inputs * self.along(spread) + self.along(center)
        inputs = rounded(inputs, self.dtype)
        gradient = rounded(generator.normal(size=self.shape), self.dtype)
        gamma = generator.normal(1.0, 0.5, self.channels).astype("float32")
        beta = generator.normal(size=self.channels).astype("float32")
        mask = self._mask(generator)
        return (
            inputs,
            gradient,
            gamma if self.gamma else None,
            beta if self.beta else None,
            mask,
        )

    def _mask(self, generator):
        shape = list(self.shape)
        if self.mask is None:
            return None
        if self.mask == "positions":
            shape[self.axis] = 1
        elif self.mask == "rows":
            shape = [shape[0]] + [1] * (len(shape) - 1)
        elif self.mask == "channels":
            shape = [n if i == self.axis else 1 for i, n in enumerate(shape)]
        elif self.mask == "all":
            return np.ones(shape, bool)
        elif self.mask == "nothing":
            return np.zeros(shape, bool)
        return generator.random(shape) < 0.6

    def along(self, vector):
        shape = [1] * len(self.shape)
        shape[self.axis] = -1
        return np.reshape(vector, shape)


@st.composite
def cases(draw, dtypes=DTYPES, masks=MASKS, min_batch=0, max_far=10.0):
    rank = draw(st.integers(2, 5), "rank")
    batch = draw(
        st.sampled_from([3, 1, 2, 0, 7]).filter(lambda n: n >= min_batch)
    )
    rest = draw(
        st.lists(st.integers(1, 5), min_size=rank - 1, max_size=rank - 1)
    )
    axis = draw(
        st.integers(0, rank - 1).filter(lambda i: (batch, *rest)[i] > 0), "axis"
    )
    return Case(
        shape=(batch, *rest),
        axis=axis,
        dtype=draw(st.sampled_from(dtypes)),
        mask=draw(st.sampled_from(masks)),
        gamma=draw(st.booleans()),
        beta=draw(st.booleans()),
        epsilon=draw(st.sampled_from([1e-3, 1e-5, 0.1])),
        far=draw(st.sampled_from([0.0, 1.0, max_far])),
        seed=draw(st.integers(0, 99)),
    )


def rounded(values, dtype):
    """`values` as float64 or float32, of which each is a value of `dtype`."""
    with frameworks.precision(dtype):
        return frameworks.array(frameworks.tensor(values, dtype))


def spacing(dtype):
    """The relative and the absolute rounding error of `dtype`."""
    return {
        "float16": (2.0**-11, 2.0**-24),
        "bfloat16": (2.0**-8, 2.0**-133),
        "float32": (2.0**-24, 2.0**-126),
        "float64": (2.0**-53, 2.0**-1022),
    }[dtype]


class Allowed:
    """Error bounds for one case, from first principles.

    Moments and sums may be off by `slack` roundings, in float32 or float64;
    the rest is how such errors enter outputs and gradients, and the rounding
    of those to the dtype of the inputs.
    """

    slack = 32.0

    def __init__(self, case, data, with_moments=None):
        inputs, gradient, gamma, beta, mask = data
        unit, _ = spacing("float64" if case.dtype == "float64" else "float32")
        # On few or equal values, epsilon is all there is to the variance.
        along, count = case.along, max(inputs.size // max(case.channels, 1), 1)
        reduced = tuple(i for i in range(inputs.ndim) if i != case.axis)
        size = unit * self.slack
        mean, variance, _ = with_moments or reference.batch_moments(
            inputs, axis=case.axis, mask=mask
        )
        largest = np.abs(inputs).max(reduced, initial=0.0)
        largest = np.maximum(largest, np.abs(mean))
        self.mean = size * largest
        self.variance = size * variance + (size * largest) ** 2

        factor = 1.0 / np.sqrt(variance + case.epsilon)
        deviation = np.abs(inputs - along(mean))
        # Relative error of the factor: half that of the variance.
        normalized = along(factor) * (size * deviation + along(self.mean))
        gamma = np.ones(case.channels) if gamma is None else np.abs(gamma)
        beta = np.zeros(case.channels) if beta is None else np.abs(beta)
        dy = np.abs(gradient)
        self.outputs = along(gamma) * normalized + size * along(beta)
        self.beta = size * dy.sum(reduced)
        xhat = deviation * along(factor)
        self.gamma = (dy * (normalized + size * xhat)).sum(reduced)
        total, product = dy.sum(reduced), (dy * xhat).sum(reduced)
        self.input_gradient = along(gamma * factor) * (
            size * dy
            + along((self.beta + size * total) / count)
            + (normalized + size * xhat) * along(product / count)
            + xhat * along(self.gamma / count)
        )
        self.rounding = spacing(case.dtype)

    def rounded(self, bound, values):
        relative, absolute = self.rounding
        return bound + relative * np.abs(values) + absolute


def assert_within(actual, expected, allowed, what):
    """`|actual - expected| <= allowed` everywhere, or says where not."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    error = np.abs(actual.astype(float) - expected)
    bad = ~(error <= allowed)
    if bad.any():
        allowed = np.broadcast_to(allowed, error.shape)
        with np.errstate(divide="ignore", invalid="ignore"):
            place = np.unravel_index(
                np.nanargmax(np.where(bad, error / allowed, 0)), error.shape
            )
        raise AssertionError(
            f"{what}: {bad.sum()} of {bad.size} off, worst at {place}: "
            f"{actual[place]} instead of {expected[place]}, "
            f"{error[place] / allowed[place]:.3g} times the error allowed"
        )
