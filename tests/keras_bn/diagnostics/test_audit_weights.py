"""`audit` without data: what the weights alone tell.

Weights are assigned as training of each kind would leave them.
"""

import json
import time
import warnings

import keras
import numpy as np
import pytest

import keras_bn
from tests.keras_bn import frameworks

OURS = keras_bn.BatchNormalization
KERAS = keras.layers.BatchNormalization
LAYERS = pytest.mark.parametrize("layer", [OURS, KERAS], ids=["ours", "keras"])

RNG = np.random.default_rng(0)


def _model(layer=OURS, **kwargs):
    """Not trained: gamma, beta and the statistics are initial."""
    return keras.Sequential(
        [
            keras.Input((4,)),
            layer(name="first", **kwargs),
            keras.layers.Dense(8),
            layer(name="second", **kwargs),
            keras.layers.Dense(2),
        ]
    )


def _trained(layer=OURS, steps=0, statistics=True, **kwargs):
    """What training leaves; `steps` of an optimizer, or a model without."""
    model = _model(layer, **kwargs)
    for one in _layers(model):
        for variable in (one.gamma, one.beta):
            variable.assign(RNG.normal(1.0, 0.1, variable.shape))
        if statistics:
            one.moving_mean.assign(RNG.normal(size=one.moving_mean.shape))
            shape = one.moving_variance.shape
            one.moving_variance.assign(RNG.uniform(2.0, 3.0, shape))
    if steps:
        model.compile("sgd", "mse")
        model.optimizer.build(model.trainable_variables)
        model.optimizer.iterations.assign(steps)
    return model


def _layers(model):
    return [model.get_layer("first"), model.get_layer("second")]


def _found(model):
    """Pairs of layer and what was found."""
    return {(one.layer, one.what) for one in keras_bn.audit(model).findings}


def _what(model):
    return {what for _, what in _found(model)}


AT_INITIAL = {
    ("first", "statistics at their initial values"),
    ("second", "statistics at their initial values"),
}


@LAYERS
def test_healthy(layer):
    for steps in (0, 1000):
        report = keras_bn.audit(_trained(layer, steps))
        assert report.status == "healthy" and report.ok
        assert report.output_gap is None and report.scores is None
        assert report.layers == [] and report.samples == 0


@LAYERS
def test_a_model_that_was_never_trained_accuses_no_layer(layer):
    model = _model(layer)
    for _ in range(2):
        report = keras_bn.audit(model)
        assert report.status == "not trained" and not report.ok
        assert report.findings == []
        model.compile("sgd", "mse")


@LAYERS
def test_statistics_at_their_initial_values(layer):
    model = _trained(layer, statistics=False)
    assert _found(model) == AT_INITIAL
    # The optimizer's steps alone tell that a model was trained.
    model = _model(layer)
    model.compile("sgd", "mse")
    model.optimizer.iterations.assign(1000)
    assert _found(model) == AT_INITIAL


def test_a_file_without_an_optimizer(tmp_path):
    model = _trained(statistics=False)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert _found(loaded) == AT_INITIAL


@LAYERS
def test_initial_values_are_those_of_the_initializers(layer):
    kwargs = {
        "moving_mean_initializer": keras.initializers.Constant(0.5),
        "moving_variance_initializer": keras.initializers.RandomUniform(
            1.0, 2.0, seed=3
        ),
    }
    model = _trained(layer, statistics=False, **kwargs)
    assert _found(model) == AT_INITIAL
    for one in _layers(model):
        one.moving_mean.assign(one.moving_mean * 0.0)
        one.moving_variance.assign(one.moving_variance * 0.0 + 1.0)
    assert _found(model) == set()


def test_initial_values_that_nobody_knows():
    kwargs = {"moving_mean_initializer": "random_normal"}
    assert _found(_trained(statistics=False, **kwargs)) == set()


def test_gamma_and_beta_that_are_not_there():
    model = _model(center=False, scale=False)
    assert keras_bn.audit(model).status == "not trained"
    for one in _layers(model):
        one.moving_mean.assign(one.moving_mean + 1.0)
    assert keras_bn.audit(model).ok


@LAYERS
def test_frozen_before_it_learned(layer):
    model = _trained(layer, statistics=False)
    keras_bn.freeze(model)
    report = keras_bn.audit(model)
    assert {(x.layer, x.what) for x in report.findings} == AT_INITIAL
    assert {x.remedy for x in report.findings} == {
        "keras_bn.thaw(model)  # and train again"
    }


def test_statistics_that_are_not_used():
    model = _trained(steps=3, use_moving_statistics=False)
    keras_bn.reset_statistics(model)
    assert _found(model) == set()


@LAYERS
@pytest.mark.parametrize(
    "name, value, what",
    [
        ("moving_variance", np.nan, "moving_variance that is not finite"),
        ("gamma", np.inf, "gamma that is not finite"),
        ("moving_variance", -1.0, "moving_variance that is negative"),
        ("moving_variance", 0.0, "variance far below epsilon"),
        ("moving_variance", 5e-7, "variance far below epsilon"),
        ("gamma", 1e-5, "gamma near 0"),
    ],
)
def test_values_that_are_wrong(layer, name, value, what):
    model = _trained(layer)
    variable = getattr(model.get_layer("second"), name)
    variable.assign(np.full(variable.shape, value))
    report = keras_bn.audit(model)
    (one,) = [x for x in report.findings if what in x.what]
    assert one.layer == "second" and one.measured == 1.0
    json.loads(report.to_json(), parse_constant=pytest.fail)


@LAYERS
@pytest.mark.parametrize(
    "name, values, orders",
    [("gamma", [2e-3, 200.0], 5.0), ("moving_variance", [0.0, 1e8], 11.0)],
)
def test_many_orders_of_magnitude(layer, name, values, orders):
    model = _trained(layer)
    variable = getattr(model.get_layer("second"), name)
    variable.assign([values[0], *[values[1]] * 7])
    (one,) = keras_bn.audit(model).findings
    assert one.what == f"orders of magnitude that {name} spans"
    assert one.measured == pytest.approx(orders, rel=1e-3)


@LAYERS
def test_too_few_steps(layer):
    model = _trained(layer, steps=50)
    found = keras_bn.audit(model).findings
    assert [x.layer for x in found] == ["first", "second"]
    assert found[0].measured == pytest.approx(0.99**50)
    assert found[0].threshold == 0.05
    model.optimizer.iterations.assign(299)
    assert _found(model) == set()
    model.optimizer.iterations.assign(298)
    assert _found(model) != set()


@pytest.mark.parametrize(
    "kwargs",
    [
        {"momentum": None},
        {"debias": True},
        {"momentum": 0.5},
        {"virtual_batch_size": 2},
    ],
)
def test_averages_that_need_few_steps(kwargs):
    assert _found(_trained(steps=20, **kwargs)) == set()


@LAYERS
def test_statistics_older_than_the_optimizer(layer):
    """A variance is at least the share of its initial value that is left."""
    model = _trained(layer, steps=50)
    variance = model.get_layer("second").moving_variance
    variance.assign(variance * 0.0 + 0.1)
    assert {layer for layer, _ in _found(model)} == {"first"}


@LAYERS
def test_steps_are_enough_after_recalibration(layer):
    model = _trained(layer, steps=50)
    values = RNG.normal(size=(64, 4)).astype("float32") * 10.0
    keras_bn.recalibrate(model, values, verbose=0)
    assert _found(model) == set()
    one = model.get_layer("first")
    one.moving_variance.assign(one.moving_variance + 1.0)
    assert {layer for layer, _ in _found(model)} == {"first"}


def test_steps_that_accumulate_gradients_count():
    """Batch normalization takes every batch in."""
    model = _trained()
    model.compile(keras.optimizers.SGD(gradient_accumulation_steps=10), "mse")
    model.optimizer.build(model.trainable_variables)
    model.optimizer._iterations.assign(1000)
    assert _found(model) == set()


def _freeze(layer):
    if isinstance(layer, OURS):
        layer.use_moving_statistics = True
        layer.update_moving_statistics = False
    else:
        layer.trainable = False


@LAYERS
def test_frozen_beside_trainable(layer):
    what = "frozen, while others before it train"
    model = _trained(layer)
    _freeze(model.get_layer("second"))
    assert _found(model) == {("second", what)}
    # All of them: that is a choice.
    _freeze(model.get_layer("first"))
    assert _found(model) == set()
    # Below everything that trains: nothing that it is given changes.
    model = _trained(layer)
    model.get_layer("first").trainable = False
    assert _found(model) == set()


@LAYERS
def test_set_after_compile(layer):
    model = _trained(layer, steps=1000)
    model.get_layer("first").trainable = False
    assert ("first", "frozen after compile") in _found(model)
    model = _trained(layer)
    model.get_layer("first").trainable = False
    model.compile("sgd", "mse")
    model.optimizer.build(model.trainable_variables)
    model.optimizer.iterations.assign(1000)
    assert _found(model) == set()
    model.get_layer("first").trainable = True
    assert _found(model) == {("first", "thawed after compile")}
    model.compile("sgd", "mse")
    assert _found(model) == set()


def test_switched_after_a_function_was_compiled():
    model = _trained()
    model.compile("sgd", "mse")
    model.fit(np.ones((8, 4)), np.ones((8, 2)), verbose=0)
    model.optimizer.iterations.assign(1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.get_layer("first").update_moving_statistics = False
    # PyTorch runs the layer itself.
    right = set() if frameworks.IS_TORCH else {"frozen after compile"}
    assert _what(model) == right


def test_a_hundred_layers_in_a_second():
    inputs = x = keras.Input((8,))
    for _ in range(100):
        x = KERAS()(keras.layers.Dense(8)(x))
    model = keras.Model(inputs, x)
    model.layers[2].beta.assign(np.ones(8))
    keras_bn.audit(model)
    start = time.process_time()
    assert len(keras_bn.audit(model).findings) == 100
    assert time.process_time() - start < 1.0
