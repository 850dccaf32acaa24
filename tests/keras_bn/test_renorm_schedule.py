"""Bounds of renorm that depend on how many batches were seen."""

import keras
import numpy as np
import pytest

import keras_bn
from tests.keras_bn import frameworks

OURS = keras_bn.BatchNormalization
# The paper's ramp, a thousand times as fast.
FAST = keras_bn.renorm_schedule(begin=5, rmax_end=40, dmax_end=25)


def _paper(step):
    """Its bounds at a step of `FAST`, by hand."""
    rmax = np.interp(step, [5, 40], [1.0, 3.0])
    return {
        "rmin": 1.0 / rmax,
        "rmax": rmax,
        "dmax": np.interp(step, [5, 25], [0.0, 5.0]),
    }


def _batch(seed, channels=3):
    generator = np.random.default_rng(seed)
    spread = generator.uniform(0.1, 9.0, channels)
    values = generator.normal(2.0, 1.0, (8, channels)) * spread
    return values.astype("float32")


def _layer(clipping, **kwargs):
    layer = OURS(renorm=True, renorm_clipping=clipping, **kwargs)
    layer.build((8, 3))
    return layer


def _at_step(layer, step):
    names = [w.name for w in layer.weights]
    assert names[-1] == "renorm_step"
    assert layer.weights[-1].dtype.startswith("int")
    assert layer.weights[-1].shape == ()
    layer.renorm_step.assign(step)


def test_the_numbers_of_the_paper():
    schedule = keras_bn.renorm_schedule()
    for step, rmax, dmax in [
        (0, 1.0, 0.0),
        (5_000, 1.0, 0.0),
        (15_000, 1 + 2 * 10 / 35, 2.5),
        (25_000, 1 + 2 * 20 / 35, 5.0),
        (40_000, 3.0, 5.0),
        (2_000_000, 3.0, 5.0),
    ]:
        step = frameworks.tensor(step, "int32")
        found = {k: frameworks.array(v(step)) for k, v in schedule.items()}
        np.testing.assert_allclose(found["rmax"], rmax, 1e-6)
        np.testing.assert_allclose(found["rmin"], 1 / rmax, 1e-6)
        np.testing.assert_allclose(found["dmax"], dmax, 1e-6)


def test_on_the_ramp_as_with_these_constants():
    scheduled, inputs = _layer(FAST), frameworks.tensor(_batch(1))
    for step in (0, 5, 6, 20, 33, 40, 99):
        _at_step(scheduled, step)
        constant = _layer(_paper(step))
        constant.set_weights(scheduled.get_weights()[:-1])
        found, right = (
            frameworks.training_step(layer, inputs, _batch(2))
            for layer in (scheduled, constant)
        )
        for a, b in [
            (found.outputs, right.outputs),
            (found.input_gradient, right.input_gradient),
            *zip(
                found.weight_gradients.values(),
                right.weight_gradients.values(),
                strict=True,
            ),
        ]:
            np.testing.assert_allclose(a, b, 1e-5, 1e-5, err_msg=str(step))
        assert found.statistics.pop("renorm_step") == step + 1
        for name, value in right.statistics.items():
            np.testing.assert_allclose(found.statistics[name], value, 1e-6)


def test_begins_as_batch_normalization():
    inputs = frameworks.tensor(_batch(1))
    scheduled, plain = _layer(FAST), OURS()
    outputs = [
        frameworks.array(layer(inputs, training=True))
        for layer in (scheduled, plain)
    ]
    np.testing.assert_allclose(*outputs, 1e-5, 1e-5)


def test_any_schedule_of_keras():
    decay = keras.optimizers.schedules.PiecewiseConstantDecay(
        [2, 4], [2.0, 1.5, 1.25]
    )
    layer = _layer({"rmax": decay, "rmin": 0.9})
    inputs = frameworks.tensor(_batch(3))
    for step, rmax in enumerate([2.0, 2.0, 2.0, 1.5, 1.5, 1.25]):
        constant = _layer({"rmax": rmax, "rmin": 0.9})
        constant.set_weights(layer.get_weights()[:-1])
        outputs = [
            frameworks.array(one(inputs, training=True))
            for one in (layer, constant)
        ]
        np.testing.assert_allclose(*outputs, 1e-5, 1e-5)
        assert int(layer.renorm_step.numpy()) == step + 1


def test_counts_the_batches_that_were_taken_in():
    layer = _layer(FAST)

    def steps(inputs, **kwargs):
        layer(frameworks.tensor(inputs), **{"training": True, **kwargs})
        return int(layer.renorm_step.numpy())

    assert steps(_batch(0)) == 1
    assert steps(_batch(0), training=False) == 1
    assert steps(np.zeros((0, 3))) == 1
    nothing, some = np.zeros((8, 1), bool), np.zeros((8, 3), bool)
    some[0, 1] = True
    assert steps(_batch(0), mask=frameworks.tensor(nothing, "bool")) == 1
    assert steps(_batch(0), mask=frameworks.tensor(some, "bool")) == 2
    layer.use_moving_statistics = True
    assert steps(_batch(0)) == 3
    layer.update_moving_statistics = False
    assert steps(_batch(0)) == 3
    layer.trainable = False
    assert steps(_batch(0)) == 3


def test_constants_need_no_counter():
    layer = _layer({"rmax": 3.0, "dmax": 5.0})
    assert layer.renorm_step is None
    names = [w.name for w in layer.weights]
    theirs = keras.layers.BatchNormalization(renorm=True)
    theirs.build((8, 3))
    assert names == [w.name for w in theirs.weights]


def test_fit_saves_and_goes_on(tmp_path):
    """A whole training, in one trace, and what is left of it in a file."""
    calls = []

    class Counted(OURS):
        def call(self, inputs, training=None, mask=None):
            calls.append(1)
            return super().call(inputs, training, mask)

    layers = [keras.Input((3,)), OURS(renorm=True, renorm_clipping=FAST)]
    model = keras.Sequential(layers)
    counted = keras.Sequential(
        [keras.Input((3,)), Counted(renorm=True, renorm_clipping=FAST)]
    )
    inputs = np.concatenate([_batch(seed) for seed in range(20)])
    for one in (model, counted):
        one.compile(keras.optimizers.SGD(0.01), "mse")
        one.fit(inputs, inputs, batch_size=8, shuffle=False, verbose=0)
    # PyTorch compiles nothing; it calls the layer in each step.
    assert (len(calls) <= 3) != frameworks.IS_TORCH
    assert int(model.layers[-1].renorm_step.numpy()) == 20

    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    clone.compile(keras.optimizers.SGD(0.01), "mse")
    config = model.layers[-1].get_config()
    for one in (model, loaded, clone):
        one.fit(inputs, inputs, batch_size=8, shuffle=False, verbose=0)
        assert one.layers[-1].get_config() == config
    for one in (loaded, clone):
        for a, b in zip(one.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_allclose(a, b, 1e-6)
    assert int(loaded.layers[-1].renorm_step.numpy()) == 40


def test_config_and_back():
    layer = OURS(renorm=True, renorm_clipping=FAST)
    again = OURS.from_config(layer.get_config())
    step = frameworks.tensor(17, "int32")
    for key, schedule in FAST.items():
        np.testing.assert_array_equal(
            frameworks.array(again.renorm_clipping[key](step)),
            frameworks.array(schedule(step)),
        )
    assert again.get_config() == layer.get_config()


@pytest.mark.parametrize(
    "make, received",
    [
        (lambda: keras_bn.renorm_schedule(rmax=0.5), "rmax=0.5"),
        (lambda: keras_bn.renorm_schedule(dmax=-1.0), "dmax=-1.0"),
        (lambda: keras_bn.renorm_schedule(begin=50_000), "begin=50000"),
        (lambda: keras_bn.renorm_schedule(begin=-1), "begin=-1"),
        (lambda: _layer({"rmax": "3"}), "rmax='3'"),
        (lambda: _layer({"rmax": 1.0, "rmin": 2.0, **_DMAX}), "rmin=2.0"),
    ],
)
def test_bad_input(make, received):
    with pytest.raises(ValueError) as error:
        make()
    assert received in str(error.value)
    assert "\n" not in str(error.value)


_DMAX = {"dmax": FAST["dmax"]}
