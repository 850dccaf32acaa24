"""`keras-bn convert` and `keras-bn fold`, on files as a user has them."""

import json
import os
import resource
import zipfile

import keras
import numpy as np
import pytest
from keras import layers

import keras_bn
import keras_bn_command
from keras_bn import cli_measures
from tests.keras_bn import frameworks
from tests.keras_bn.surgery import models

INPUTS = np.random.default_rng(3).normal(size=(5, 6, 7, 3)).astype("float32")


def _model():
    return models.randomize(
        keras.Sequential(
            [
                keras.Input((6, 7, 3)),
                layers.Conv2D(8, 3),
                layers.BatchNormalization(name="first"),
                layers.ReLU(),
                keras_bn.BatchNormalization(name="second"),
                layers.ReLU(),
            ]
        )
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_measures, "_REPEATS", 2)
    _model().save("model.keras")
    return tmp_path


def _run(capsys, *arguments):
    """The exit code, and what was printed."""
    return keras_bn_command.main(list(arguments)), *capsys.readouterr()


def _outputs(path):
    return frameworks.array(keras.saving.load_model(path)(INPUTS))


@pytest.mark.parametrize(
    "to, kind, count",
    [
        ("keras_bn", keras_bn.BatchNormalization, 1),
        ("keras", layers.BatchNormalization, 1),
        ("group", layers.GroupNormalization, 2),
        ("layer", layers.LayerNormalization, 2),
        ("instance", layers.GroupNormalization, 2),
    ],
)
def test_convert(to, kind, count, folder, capsys):
    before = (folder / "model.keras").read_bytes()
    code, printed, error = _run(
        capsys, "convert", "model.keras", "--to", to, "--output", "new.keras"
    )
    assert code == 0 and not error
    assert f"\nconverted {count} batch normalizations to {to}\n" in printed
    assert "times as fast" in printed
    new = keras.saving.load_model("new.keras")
    for name in ("first", "second"):
        layer, old = new.get_layer(name), _model().get_layer(name)
        assert type(layer) is kind
        for weight in ("gamma", "beta"):
            np.testing.assert_array_equal(
                frameworks.array(getattr(layer, weight)),
                frameworks.array(getattr(old, weight)),
            )
    assert ("checked on" in printed) == ("keras" in to)
    if "keras" in to:
        expected = _outputs("model.keras")
        np.testing.assert_allclose(_outputs("new.keras"), expected, 1e-5, 1e-5)
    assert (folder / "model.keras").read_bytes() == before
    assert sorted(os.listdir(folder)) == ["model.keras", "new.keras"]


def test_options_that_are_lost_are_said(folder, capsys):
    ghosts = keras_bn.BatchNormalization(virtual_batch_size=2)
    keras.Sequential([keras.Input((4,)), ghosts]).save("ghosts.keras")
    code, _, error = _run(
        capsys, "convert", "ghosts.keras", "--to=keras", "--output=new.keras"
    )
    assert code == 0 and "'virtual_batch_size'" in error
    assert error.startswith("keras-bn: warning: ") and error.count("\n") == 1


def test_fold(folder, capsys):
    code, printed, error = _run(
        capsys, "fold", "model.keras", "--output", "folded.keras"
    )
    assert code == 0 and not error
    assert printed.startswith("wrote folded.keras: ")
    assert "\nfolded 1 of 2 batch normalizations\nchecked on 8 " in printed
    assert "ReLU 're_lu' comes before it" in printed
    rows = [line.split() for line in printed.splitlines()]
    for size in ("1", "8", "64"):
        (times,) = [row[1:] for row in rows if row[:1] == [size]]
        assert len(times) == 5 and all(float(x) > 0.0 for x in times)
    folded = keras.saving.load_model("folded.keras")
    assert not any(
        isinstance(x, (layers.BatchNormalization, keras_bn.BatchNormalization))
        for x in folded.layers
    )
    expected = _outputs("model.keras")
    np.testing.assert_allclose(_outputs("folded.keras"), expected, 1e-5, 1e-5)
    assert sorted(os.listdir(folder)) == ["folded.keras", "model.keras"]


def _strided(training):
    inputs = keras.Input((None, None, 3))
    conv = layers.Conv2D(4, 3, strides=2, padding="same", name="conv")
    return keras.Model(inputs, conv(layers.BatchNormalization()(inputs)))


def _in_training(training):
    inputs = keras.Input((4,))
    inner = keras.Sequential(
        [keras.Input((4,)), layers.BatchNormalization(), layers.Dense(3)]
    )
    return keras.Model(inputs, inner(inputs, training=training))


@pytest.mark.parametrize(
    "made, said",
    [
        (_strided, "the padding of 'conv' depends on a size that is not"),
        (_in_training, "it is called with training=True"),
    ],
)
def test_what_cannot_be_folded_is_in_the_table(made, said, folder, capsys):
    models.randomize(made(training=True)).save("given.keras")
    for command in ("fold", "convert"):
        code, printed, error = _run(
            capsys, command, "given.keras", "--output", f"{command}.keras"
        )
        assert code == 0 and not error
        assert ("folded 0 of 1" in printed) == (command == "fold")
        assert (said in printed) == (command == "fold")


def _sick(kind=keras_bn.BatchNormalization):
    layer = kind()
    model = keras.Sequential([keras.Input((4,)), layers.Dense(4), layer])
    layer.moving_mean.assign([0.0, np.inf, 0.0, 0.0])
    return model


def _rewritten(path, new, old_text, new_text, version="4.0.0"):
    """A file as another version of Keras might have saved it."""
    with zipfile.ZipFile(path) as there, zipfile.ZipFile(new, "w") as here:
        for name in there.namelist():
            content = there.read(name)
            if name == "metadata.json":
                facts = {**json.loads(content), "keras_version": version}
                content = json.dumps(facts)
            elif name == "config.json":
                content = content.decode().replace(old_text, new_text)
            here.writestr(name, content)


def test_a_file_of_tf_keras_is_converted_first(folder, capsys):
    _rewritten("model.keras", "old.keras", "", "", version="2.15.0")
    for arguments in (
        ["audit", "old.keras"],
        ["fold", "old.keras", "--output=new.keras"],
        ["export", "old.keras", "--output=new"],
    ):
        code, printed, error = _run(capsys, *arguments)
        assert code == 2 and not printed
        assert "saved by tf-keras (Keras 2)" in error
        assert "`keras-bn convert old.keras --output NEW.keras`" in error
    assert sorted(os.listdir(folder)) == ["model.keras", "old.keras"]


@pytest.mark.parametrize("command", ["convert", "fold"])
def test_bad_input(command, folder, capsys):
    keras.Sequential([keras.Input((4,)), layers.Dense(4)]).save("plain.keras")
    _sick().save("sick.keras")
    _sick(layers.BatchNormalization).save("sick_too.keras")
    whole = (folder / "model.keras").read_bytes()
    (folder / "cut.keras").write_bytes(whole[: len(whole) // 2])
    (folder / "model.h5").write_bytes(b"")
    _rewritten("model.keras", "other_name.keras", '"ReLU"', '"ReLU4"')
    _rewritten("model.keras", "argument.keras", '"epsilon"', '"epsilons"')
    (folder / "taken.keras").write_bytes(b"mine")
    (folder / "folder.keras").mkdir()
    before = {x: x.read_bytes() for x in folder.iterdir() if x.is_file()}
    sick = "sick_too" if command == "convert" else "sick"
    for model, output, said in (
        ("missing.keras", "new.keras", "no such file"),
        ("plain.keras", "new.keras", "found no batch normalization"),
        (f"{sick}.keras", "new.keras", "moving_mean not finite"),
        ("cut.keras", "new.keras", "damaged"),
        ("model.h5", "new.keras", "model.h5"),
        ("other_name.keras", "new.keras", "saved by Keras 4.0.0: Could not"),
        ("argument.keras", "new.keras", "saved by Keras 4.0.0: Unrecognized"),
        ("model.keras", "taken.keras", "something is there already"),
        ("model.keras", "folder.keras", "something is there already"),
        ("model.keras", "model.keras", "something is there already"),
        ("model.keras", "new.h5", "must end in .keras"),
        ("model.keras", "missing/new.keras", "cannot write there"),
    ):
        code, printed, error = _run(capsys, command, model, "--output", output)
        assert code == 2 and not printed, model
        assert error.startswith("keras-bn: error: ") and said in error
        assert error.count("\n") == 1
    assert before == {x: x.read_bytes() for x in before}
    assert set(before) | {folder / "folder.keras"} == set(folder.iterdir())


@pytest.mark.parametrize("command", ["convert", "fold"])
def test_a_model_that_answers_differently_is_not_written(
    command, folder, capsys, monkeypatch
):
    def wrong(model, *to):
        new = keras.models.clone_model(model)
        new.set_weights([1.01 * x for x in model.get_weights()])
        new.fold_report = ()
        return new

    monkeypatch.setattr(keras_bn, command, wrong)
    code, printed, error = _run(
        capsys, command, "model.keras", "--output", "new.keras"
    )
    assert code == 2 and not printed
    assert "does not answer as the one before" in error
    assert os.listdir(folder) == ["model.keras"]


def test_a_full_disk(folder, capsys):
    """The system stops writing in the middle of the file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))
    try:
        code, printed, error = _run(
            capsys, "fold", "model.keras", "--output", "folded.keras"
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and not printed
    assert "File too large" in error and "Nothing was written" in error
    assert error.count("\n") == 1
    assert os.listdir(folder) == ["model.keras"]


def test_a_file_that_appears_meanwhile_is_kept(folder, capsys, monkeypatch):
    fold = keras_bn.fold

    def slow(model):
        (folder / "folded.keras").write_bytes(b"mine")
        return fold(model)

    monkeypatch.setattr(keras_bn, "fold", slow)
    code, _, error = _run(
        capsys, "fold", "model.keras", "--output", "folded.keras"
    )
    assert code == 2 and "something is there" in error
    assert (folder / "folded.keras").read_bytes() == b"mine"
    assert sorted(os.listdir(folder)) == ["folded.keras", "model.keras"]
