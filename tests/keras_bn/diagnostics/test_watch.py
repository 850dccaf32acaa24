"""`watch_statistics`: loops that forget the statistics, and loops that do not.

The loops are written as one writes them for each framework, with what is
forgotten there.
"""

import contextlib
import warnings

import numpy as np
import pytest

import keras_bn
from tests.keras_bn import frameworks
from tests.keras_bn.diagnostics.stale_models import KERAS
from tests.keras_bn.diagnostics.stale_models import OURS
from tests.keras_bn.diagnostics.stale_models import compiled
from tests.keras_bn.diagnostics.stale_models import loop
from tests.keras_bn.diagnostics.stale_models import model_of

LAYERS = pytest.mark.parametrize("layer", [OURS, KERAS], ids=["ours", "keras"])

# What is forgotten, by the arguments of `loop`.
FORGOTTEN = [{"training": False}]
if frameworks.IS_JAX:
    FORGOTTEN.append({"keeps": False})


@contextlib.contextmanager
def _silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@LAYERS
@pytest.mark.parametrize("forgotten", FORGOTTEN)
def test_at_the_end(layer, forgotten):
    model = model_of(layer(name="first"))
    with pytest.warns(UserWarning) as warned:
        with keras_bn.watch_statistics(model):
            loop(model, 3, **forgotten)
    (warning,) = (w for w in warned if "stood still" in str(w.message))
    assert "'first' stood still over the steps" in str(warning.message)
    assert warning.filename == __file__


@LAYERS
def test_a_right_loop(layer):
    model = model_of(layer(), layer())
    with _silence():
        with keras_bn.watch_statistics(model, every=2) as watch:
            loop(model, 5, after=watch.step)


@pytest.mark.parametrize("forgotten", FORGOTTEN)
def test_every_so_many_steps(forgotten):
    model = model_of(OURS())
    steps = []
    with pytest.raises(RuntimeError, match="over 4 steps"):
        with keras_bn.watch_statistics(
            model, on_stale="raise", every=4
        ) as watch:

            def after(*variables):
                steps.append(len(steps))
                watch.step(*variables)

            loop(model, 10, after=after, **forgotten)
    assert len(steps) == 4


def test_steps_after_the_last_check():
    model = model_of(OURS())
    with pytest.warns(UserWarning, match="over 2 steps"):
        with keras_bn.watch_statistics(model, every=4) as watch:
            loop(model, 4, after=watch.step)
            loop(model, 2, training=False, after=watch.step)


def test_steps_that_the_optimizer_counts():
    model = compiled(model_of(OURS()))
    model.optimizer.build(model.trainable_variables)
    with pytest.warns(UserWarning, match="over 7 steps"):
        with keras_bn.watch_statistics(model):
            loop(model, 1, training=False)
            model.optimizer.iterations.assign(7)


def test_nothing_moved():
    model = model_of(OURS())
    with pytest.warns(UserWarning, match="Nothing can be told"):
        with keras_bn.watch_statistics(model, on_stale="raise"):
            pass


if frameworks.IS_JAX:

    def test_variables_that_are_not_assigned():
        model = model_of(OURS())
        with pytest.warns(UserWarning, match="has to assign its variables"):
            with keras_bn.watch_statistics(model) as watch:
                loop(model, 3, assigns=False)
        with pytest.warns(UserWarning, match="stood still over 3 steps"):
            with keras_bn.watch_statistics(model) as watch:
                loop(
                    model, 3, keeps=False, assigns=False, after=watch.step
                )


def test_an_error_is_not_masked():
    model = model_of(OURS())
    with pytest.raises(KeyError), _silence():
        with keras_bn.watch_statistics(model, on_stale="raise"):
            loop(model, 2, training=False)
            raise KeyError


def test_frozen_on_purpose():
    model = model_of(OURS())
    keras_bn.freeze(model)
    with _silence(), keras_bn.watch_statistics(model):
        loop(model, 2)


@pytest.mark.parametrize(
    "wrong, match",
    [
        ({"model": model_of()}, "`watch_statistics` found no batch"),
        ({"model": 3}, "model of type int"),
        ({"on_stale": None}, "on_stale=None"),
        ({"every": -1}, "every=-1"),
    ],
)
def test_bad_arguments(wrong, match):
    with pytest.raises(ValueError, match=match):
        keras_bn.watch_statistics(**{"model": model_of(OURS())} | wrong)


def test_bad_variables():
    model = model_of(OURS())
    with pytest.raises(ValueError, match="all 4 of the model's trainable"):
        with keras_bn.watch_statistics(model) as watch:
            watch.step(model.variables, [])
    values = [np.ones(v.shape) for v in model.trainable_variables]
    for wrong, match in (
        ((values,), "non_trainable_variables of type NoneType"),
        ((None, values), "trainable_variables of type NoneType"),
        ((3, values), "trainable_variables of type int"),
        ((values[::-1], []), r"with shape \(1,\) for '.*gamma'"),
        ((values, [None, None]), r"with shape None for '.*moving_mean'"),
    ):
        with keras_bn.watch_statistics(model) as watch:
            with pytest.raises(ValueError, match=match):
                watch.step(*wrong)
            model.layers[0].gamma.assign([2.0] * 3)
            model.layers[0].moving_mean.assign([2.0] * 3)
        model.set_weights([w + 1.0 for w in model.get_weights()])
    with pytest.raises(ValueError, match="a call outside of it"):
        keras_bn.watch_statistics(model).step()
