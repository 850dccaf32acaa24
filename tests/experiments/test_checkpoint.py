"""Checkpoints: all state, whole or not at all, and of this run."""

import os

import keras
import numpy as np
import pytest

from experiments import ExperimentError
from experiments import checkpoint
from experiments.checkpoint import Position

_RUN = {"condition": 9, "seed": 0, "steps": 5, "device": "one"}
# Numbers that no decimal fraction of few digits is.
_BETWEEN = Position(3, 2, 128, {"loss": 1 / 3, "accuracy": 0.1}, 2 / 7)


def _model(seed=0):
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(
                3,
                kernel_initializer=keras.initializers.GlorotUniform(seed),
            ),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5, seed=seed, name="dropout"),
        ]
    )
    model.compile(optimizer="adam", loss="mse")
    return model


def _values(model):
    return [
        keras.ops.convert_to_numpy(variable)
        for variable in [*model.variables, *model.optimizer.variables]
    ]


def _train(model):
    random = np.random.default_rng(0)
    model.train_on_batch(
        random.normal(size=(5, 4)).astype("float32"),
        random.normal(size=(5, 3)).astype("float32"),
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint.npz"


def test_a_checkpoint_holds_all_state(path):
    model = _model()
    generator = model.get_layer("dropout").seed_generator
    begun = keras.ops.convert_to_numpy(generator.state).tolist()
    _train(model)
    # A .keras file lacks this one; without it other units would be dropped.
    drawn = keras.ops.convert_to_numpy(generator.state).tolist()
    assert drawn != begun
    checkpoint.save(path, model, _BETWEEN, _RUN)

    other = _model(seed=5)
    # Another device may go on.
    description = _RUN | {"device": "another"}
    assert checkpoint.restore(path, other, description) == _BETWEEN
    state = other.get_layer("dropout").seed_generator.state
    assert keras.ops.convert_to_numpy(state).tolist() == drawn
    assert int(other.optimizer.iterations) == 1
    for step in range(2):
        for one, another in zip(_values(model), _values(other), strict=True):
            np.testing.assert_array_equal(one, another)
        _train(model)
        _train(other)


def test_the_one_before_is_kept(path):
    model = _model()
    assert checkpoint.newest(path) is None
    for step in (1, 2, 3):
        checkpoint.save(path, model, Position(step, step), _RUN)
    assert sorted(os.listdir(path.parent)) == [
        "checkpoint.npz",
        "previous.checkpoint.npz",
    ]
    for found, step in ((path, 3), (checkpoint.previous(path), 2)):
        assert checkpoint.newest(path) == found
        assert checkpoint.restore(found, model, _RUN).step == step
        found.unlink()


def test_a_full_disk_leaves_the_checkpoints(path, monkeypatch):
    model = _model()
    for step in (2, 3):
        checkpoint.save(path, model, Position(step, step), _RUN)
    before = {x: x.read_bytes() for x in path.parent.iterdir()}

    def half(file, **arrays):
        file.write(b"PK")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", half)
        with pytest.raises(OSError):
            checkpoint.save(path, model, Position(4, 4), _RUN)
    assert {x: x.read_bytes() for x in path.parent.iterdir()} == before


def _flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path, 1000),
        lambda path: os.truncate(path, 0),
        lambda path: path.write_bytes(b"PK" + bytes(1000)),
        # A bit of a variable: the first one's values begin before this.
        lambda path: _flip(path, 190),
        lambda path: _flip(path, path.stat().st_size // 2),
    ],
)
def test_a_damaged_checkpoint_is_refused(damage, path):
    model = _model()
    checkpoint.save(path, model, Position(2, 2), _RUN)
    advice = "delete its folder to begin the run anew"
    for _ in range(2):
        checkpoint.check(path)
        damage(path)
        before = _values(model)
        for use in (
            lambda: checkpoint.check(path),
            lambda: checkpoint.restore(path, model, _RUN),
        ):
            with pytest.raises(ExperimentError) as error:
                use()
            assert str(error.value) == f"{path} is damaged: {advice}"
        for one, another in zip(_values(model), before, strict=True):
            np.testing.assert_array_equal(one, another)
        for step in (3, 4):
            checkpoint.save(path, model, Position(step, step), _RUN)
        advice = "delete it to go on from the checkpoint before it"
    assert checkpoint.restore(checkpoint.previous(path), model, _RUN).step == 3


def test_a_checkpoint_of_another_run_is_refused(path):
    checkpoint.save(path, _model(), Position(3, 3), _RUN | {"seed": 4})
    with pytest.raises(ExperimentError, match="seed=4 there, 0 now.: delete"):
        checkpoint.restore(path, _model(), _RUN)


def test_a_checkpoint_of_another_model_is_refused(path):
    checkpoint.save(path, _model(), Position(3, 3), _RUN)
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    other.compile(optimizer="adam", loss="mse")
    with pytest.raises(ExperimentError, match="is of another model: delete"):
        checkpoint.restore(path, other, _RUN)


def test_a_checkpoint_of_an_older_program_is_read(path):
    """They had the step and the variables, and were written with a line."""
    model = _model()
    _train(model)
    values = {f"variable_{i}": x for i, x in enumerate(_values(model))}
    np.savez(path, step=4, **values)
    other = _model(seed=5)
    assert checkpoint.restore(path, other, _RUN) == Position(4, 4)
    for one, another in zip(_values(model), _values(other), strict=True):
        np.testing.assert_array_equal(one, another)
