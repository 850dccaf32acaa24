"""Whatever an argument of a diagnostics function is: one clear sentence."""

import keras
import numpy as np
import pytest

import keras_bn

RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 3)).astype("float32")
Y = RNG.normal(size=(8, 2)).astype("float32")


class _Object:
    """Nothing that any function takes, as what users hand over by mistake."""

    def __repr__(self):
        return "an object"


def _model(**kwargs):
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras_bn.BatchNormalization(),
            keras.layers.Dense(2),
        ]
    )
    model.compile("sgd", "mse")
    return model


class Subclass(keras.Model):
    """Not built before it is called."""

    def __init__(self):
        super().__init__()
        self.normalize = keras_bn.BatchNormalization()

    def call(self, x):
        return self.normalize(x)


def _yielding(*batches):
    return lambda: (x for x in batches)


def _raising():
    yield (X,)
    raise KeyError("a user's")


class _Dataset(keras.utils.PyDataset):
    def __init__(self, batch, length=2):
        super().__init__()
        self._batch, self._length = batch, length

    def __len__(self):
        return self._length

    def __getitem__(self, i):
        return self._batch


# Functions are called: generators are read once.
MODELS = {
    "None": lambda: None,
    "str": lambda: "model.keras",
    "object": _Object,
    "class": lambda: keras.Sequential,
    "list": lambda: [_model()],
    "function": lambda: lambda: lambda x: x,
    "array": lambda: X,
    "no batch normalization": lambda: keras.layers.Dense(1),
    "unbuilt": lambda: keras.Sequential([keras_bn.BatchNormalization()]),
    "unbuilt subclass": Subclass,
    "layer without weights": keras_bn.BatchNormalization,
}
DATA = {
    "str": lambda: "data.npz",
    "int": lambda: 3,
    "float": lambda: 3.0,
    "bytes": lambda: b"data",
    "object": _Object,
    "function": lambda: lambda: lambda: X,
    "set": lambda: {1, 2},
    "empty list": list,
    "empty dictionary": dict,
    "None in a list": lambda: [None],
    "numbers": lambda: [[1.0, 2.0, 3.0]] * 4,
    "scalar": lambda: np.float32(1.0),
    "no samples": lambda: X[:0],
    "objects": lambda: np.array([_Object()] * 8),
    "strings": lambda: np.array([["a"] * 3] * 8),
    "dates": lambda: np.zeros((8, 3), "datetime64[s]"),
    "another shape": lambda: X[:, :2],
    "another rank": lambda: np.zeros((8, 2, 3, 4), "float32"),
    "NaN": lambda: X * np.nan,
    "infinity": lambda: X.astype("float64") * np.inf,
    "one infinity": lambda: np.where(X == X[5, 1], -np.inf, X),
    "another number of inputs": lambda: [X, X],
    "samples of other numbers": lambda: [X, X[:5]],
    "symbolic": lambda: keras.Input((3,)),
    "empty generator": _yielding(),
    "generator of None": _yielding(None),
    "generator of numbers": _yielding(1, 2),
    "generator of strings": _yielding("a"),
    "generator of tuples": _yielding((X, Y, Y, Y)),
    "generator of objects": _yielding((_Object(),)),
    "generator of scalars": _yielding((np.float32(1),)),
    "generator of empty batches": _yielding((X[:0],)),
    "later another shape": _yielding((X,), (X[:, :2],)),
    "later NaN": _yielding((X,), (X * np.nan,)),
    "generator of generators": _yielding((x for x in X)),
    "empty PyDataset": lambda: _Dataset((X,), 0),
    "PyDataset of None": lambda: _Dataset(None),
    "PyDataset of strings": lambda: _Dataset(("a", "b")),
    "endless PyDataset": lambda: _Dataset((X,), None),
}
LABELS = {
    "str": "labels",
    "int": 3,
    "list": [0, 1] * 4,
    "object": _Object(),
    "fewer": Y[:5],
    "more": np.concatenate([Y, Y]),
    "scalar": np.float32(1),
    "another shape": RNG.normal(size=(8, 5)),
    "strings": np.array(["a"] * 8),
    "objects": np.array([None] * 8, object),
    "NaN": Y * np.nan,
    "two": [Y, Y],
    "dictionary": {"nowhere": Y},
}
COUNTS = [0, -1, 1.5, "3", True, (1,), X, _Object()]
FLAGS = ["yes", 2, None, (), X, _Object()]


def _cases():
    """`(function, wrong)` of each wrong argument."""
    both = keras_bn.audit, keras_bn.recalibrate
    for function in both:
        for name, make in MODELS.items():
            yield function, "model", name, make
        for name, make in DATA.items():
            yield function, "data", name, make
        for name, labels in LABELS.items():
            yield function, "labels", name, lambda labels=labels: labels
    for one in COUNTS:
        for function in (*both, keras_bn.RecalibrateStatistics):
            for name in ("steps", "batch_size"):
                yield function, name, repr(one)[:9], lambda one=one: one
        for function in (keras_bn.watch_statistics, keras_bn.StatisticsMonitor):
            yield function, "every", repr(one)[:9], lambda one=one: one
    yield keras_bn.recalibrate, "data", "None", lambda: None
    for one in FLAGS:
        for function, name in (
            *((function, "verbose") for function in both),
            *((keras_bn.recalibrate, x) for x in ("force", "frozen")),
        ):
            yield function, name, repr(one)[:9], lambda one=one: one
    for one in (None, 3, "both", ["batch"], X, _Object()):
        for function, name in (
            (keras_bn.recalibrate, "method"),
            (keras_bn.RecalibrateStatistics, "method"),
            (keras_bn.watch_statistics, "on_stale"),
            (keras_bn.StatisticsMonitor, "on_stale"),
        ):
            yield function, name, repr(one)[:9], lambda one=one: one
    for name, make in MODELS.items():
        yield keras_bn.watch_statistics, "model", name, make
    for one in (3, "", b"logs", ["logs"], __file__, _Object()):
        yield (
            keras_bn.StatisticsMonitor,
            "log_dir",
            repr(one)[-9:],
            lambda one=one: one,
        )
    for name in ("str", "int", "object", "numbers", "no samples", "scalar"):
        yield keras_bn.RecalibrateStatistics, "data", name, DATA[name]
    for name in ("empty list", "None in a list", "endless PyDataset"):
        yield keras_bn.RecalibrateStatistics, "data", name, DATA[name]
    yield keras_bn.RecalibrateStatistics, "data", "None", lambda: None


_RIGHT = {
    keras_bn.audit: lambda: {"model": _model(), "data": X, "verbose": 0},
    keras_bn.recalibrate: lambda: {"model": _model(), "data": X, "verbose": 0},
    keras_bn.RecalibrateStatistics: lambda: {"data": X},
    keras_bn.StatisticsMonitor: dict,
    keras_bn.watch_statistics: lambda: {"model": _model()},
}
CASES = [
    pytest.param(*case, id=f"{case[0].__name__}-{case[1]}-{ascii(case[2])}")
    for case in _cases()
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function, argument, name, make", CASES)
def test_one_sentence(function, argument, name, make):
    arguments = _RIGHT[function]()
    arguments[argument] = make()
    model = arguments.get("model")
    before = model.get_weights() if isinstance(model, keras.Model) else []
    with pytest.raises((ValueError, TypeError)) as error:
        function(**arguments)
    text = str(error.value)
    assert "Received: " in text and "\n" not in text and len(text) < 900
    for found, right in zip(model.get_weights() if before else [], before):
        np.testing.assert_array_equal(found, right)


def test_an_error_of_the_user_comes_through():
    """In what is read later; the first batch is read by Keras."""
    for function in (keras_bn.audit, keras_bn.recalibrate):
        with pytest.raises(KeyError, match="a user's"):
            function(_model(), _raising(), verbose=0)


@pytest.mark.parametrize(
    "data",
    [X[:, :2], X * np.nan, _Dataset((X[:, :2],))],
    ids=["shape", "nan", "py"],
)
def test_data_that_is_wrong_in_fit(data):
    model = _model()
    callback = keras_bn.RecalibrateStatistics(data)
    with pytest.raises(ValueError, match="Received: "):
        model.fit(X, Y, callbacks=[callback], verbose=0)
