"""Each form of data that Keras takes, for models of several inputs."""

import importlib.util

import keras
import numpy as np
import pytest

import keras_bn
from tests.keras_bn import frameworks

RNG = np.random.default_rng(0)
N, SIZE = 96, 32
A = RNG.normal([3.0, -3.0], [2.0, 0.5], (N, 2)).astype("float32")
B = RNG.normal(1.0, 1.0, (N, 3)).astype("float32")
LABELS = RNG.normal(size=(N, 1)).astype("float32")
WEIGHTS = RNG.uniform(0.5, 1.5, N).astype("float32")

# From a structure of inputs to that of the model.
STRUCTURES = {
    "list": lambda a, b: [a, b],
    "tuple": lambda a, b: (a, b),
    # In the order of names the second comes first.
    "dictionary": lambda a, b: {"later": a, "first": b},
    "nested": lambda a, b: {"x": [a, {"b": b}]},
    "one": lambda a, b: a,
}


def _model(structure):
    inputs = STRUCTURES[structure](
        keras.Input((2,), name="later"), keras.Input((3,), name="first")
    )
    tensors = keras.tree.flatten(inputs)
    (a,) = (x for x in tensors if x.shape[-1] == 2)
    outputs = [keras_bn.BatchNormalization(epsilon=0.0)(a)]
    outputs += [x for x in tensors if x is not a]
    y = keras.layers.Concatenate()(outputs) if outputs[1:] else outputs[0]
    model = keras.Model(inputs, keras.layers.Dense(1)(y))
    model.compile("sgd", "mse")
    (layer,) = (x for x in model.layers if hasattr(x, "moving_mean"))
    layer.gamma.assign([1.5, 1.0])
    return model, layer


def _rows(structure, rows):
    return keras.tree.map_structure(lambda x: x[rows], structure)


class _Dataset(keras.utils.PyDataset):
    def __init__(self, data):
        super().__init__()
        self.data = data

    def __len__(self):
        return N // SIZE

    def __getitem__(self, i):
        return _rows(self.data, slice(i * SIZE, (i + 1) * SIZE))


def _generator(data):
    yield from (_Dataset(data)[i] for i in range(N // SIZE))


def _tf_data(data):
    import tensorflow as tf

    # It would stack what is in a list.
    data = keras.tree.lists_to_tuples(data)
    return tf.data.Dataset.from_tensor_slices(data).batch(SIZE)


def _data_loader(data):
    import torch

    samples = [_rows(data, i) for i in range(N)]
    return torch.utils.data.DataLoader(samples, SIZE)


FORMS = {"PyDataset": _Dataset, "generator": _generator}
if importlib.util.find_spec("tensorflow"):
    FORMS["tf.data"] = _tf_data
if importlib.util.find_spec("torch"):
    FORMS["DataLoader"] = _data_loader


def _arrays(kind, array):
    if kind == "tensors":
        return keras.ops.convert_to_tensor(array)
    return array


def _check(model, layer, scores, weights=None):
    """Scores of `audit`; then the statistics are those of another model."""
    with_weights = [] if weights is None else [weights]
    data = scores(*with_weights)
    report = keras_bn.audit(model, *data, batch_size=SIZE, verbose=0)
    assert report.samples == N
    arguments = {"force": True, "batch_size": SIZE, "verbose": 0}
    keras_bn.recalibrate(model, *scores(*with_weights)[:1], **arguments)
    mean = frameworks.array(layer.moving_mean)
    np.testing.assert_allclose(mean, A.mean(0, "float64"), rtol=1e-5)
    variance = frameworks.array(layer.moving_variance)
    np.testing.assert_allclose(variance, A.var(0, "float64"), rtol=1e-5)
    return report.scores.in_inference


@pytest.mark.parametrize("kind", ["arrays", "tensors"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_arrays(structure, kind):
    model, layer = _model(structure)
    inputs = STRUCTURES[structure](A, B)
    right = model.evaluate(inputs, LABELS, verbose=0)
    given = keras.tree.map_structure(lambda x: _arrays(kind, x), inputs)
    found = _check(model, layer, lambda: (given, _arrays(kind, LABELS)))
    assert found == pytest.approx(right, rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_forms_with_labels_and_weights(structure, form):
    model, layer = _model(structure)
    inputs = STRUCTURES[structure](A, B)
    right = model.evaluate(inputs, LABELS, SIZE, 0, WEIGHTS)
    data = inputs, LABELS, WEIGHTS
    found = _check(model, layer, lambda: (FORMS[form](data),))
    assert found == pytest.approx(right, rel=1e-5)


@pytest.mark.parametrize("form", ["arrays", *FORMS])
def test_a_callback_and_a_loop(form):
    """`RecalibrateStatistics` reads data again; a loop brings its own."""
    model, layer = _model("dictionary")
    inputs = STRUCTURES["dictionary"](A, B)
    data = inputs if form == "arrays" else FORMS[form]((inputs,))
    if form == "generator":
        with pytest.raises(ValueError, match="can be read once"):
            keras_bn.RecalibrateStatistics(data)
        return
    callback = keras_bn.RecalibrateStatistics(data)
    with keras_bn.watch_statistics(model, on_stale="raise"):
        model.fit(inputs, LABELS, epochs=2, callbacks=[callback], verbose=0)
    mean = frameworks.array(layer.moving_mean)
    np.testing.assert_allclose(mean, A.mean(0, "float64"), rtol=1e-5)


def test_no_progress_of_an_unknown_number(capfd):
    """Keras's bar would say "1/Unknown"; a known number of batches is said."""
    model, _ = _model("one")
    keras_bn.audit(model, _generator((A, LABELS)))
    keras_bn.recalibrate(model, _generator((A, LABELS)), force=True)
    assert capfd.readouterr() == ("", "")
    keras_bn.audit(model, A, LABELS, batch_size=SIZE)
    assert "3/3" in capfd.readouterr().out
    keras_bn.audit(model, A, LABELS, verbose=0)
    assert capfd.readouterr().out == ""


def test_inputs_that_the_model_does_not_take():
    """Keras would take them in the order of what it is given."""
    model, layer = _model("dictionary")
    data = {"a_number": np.arange(N), "later": A, "first": B}
    keras_bn.recalibrate(model, data, verbose=0)
    mean = frameworks.array(layer.moving_mean)
    np.testing.assert_allclose(mean, A.mean(0, "float64"), rtol=1e-5)
    for wrong in ({"later": A}, [A, B, B], A):
        for function in (keras_bn.audit, keras_bn.recalibrate):
            with pytest.raises(ValueError, match="The model takes"):
                function(model, wrong, verbose=0)


def test_names_for_a_list_of_inputs():
    model, layer = _model("list")
    data = {"later": A, "first": B}
    keras_bn.recalibrate(model, data, verbose=0)
    mean = frameworks.array(layer.moving_mean)
    np.testing.assert_allclose(mean, A.mean(0, "float64"), rtol=1e-5)


if frameworks.IS_TENSORFLOW:

    def test_text():
        """On the other backends no model takes it."""
        words = np.array([["cat"], ["dog"], ["dog"], ["cat"]] * 8)
        lookup = keras.layers.StringLookup(vocabulary=["cat", "dog"])
        embedding = keras.layers.Embedding(3, 2)
        model = keras.Sequential(
            [
                keras.Input((1,), dtype="string"),
                lookup,
                embedding,
                keras_bn.BatchNormalization(),
            ]
        )
        keras_bn.recalibrate(model, words, verbose=0)
        right = frameworks.array(embedding.embeddings)[1:].mean(0, "float64")
        mean = frameworks.array(model.layers[-1].moving_mean)
        np.testing.assert_allclose(mean, right, rtol=1e-5, atol=1e-7)
        assert keras_bn.audit(model, words, verbose=0).samples == len(words)
