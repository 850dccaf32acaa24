"""`keras-bn export`, on a file as a user has it."""

import os
import resource

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bn_command
from keras_bn.serving import export
from tests.keras_bn.serving import models
from tests.keras_bn.serving.models import CLASS_NAMES
from tests.keras_bn.serving.models import IMAGES

_MEAN = f"--mean={','.join(map(str, models.MEAN))}"
_DEVIATION = f"--deviation={','.join(map(str, models.DEVIATION))}"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models.folding_model().save("model.keras")
    (tmp_path / "names.txt").write_text("\n".join(CLASS_NAMES) + "\n")
    np.savez("data.npz", x=IMAGES)
    return tmp_path


def _run(capsys, *arguments):
    """The exit code, and what was printed."""
    code = keras_bn_command.main(["export", "model.keras", *arguments])
    return code, *capsys.readouterr()


def test_export(folder, capsys):
    code, printed, error = _run(
        capsys,
        *("--output=models/animals", "--class_names=names.txt"),
        *(_MEAN, _DEVIATION, "--data=data.npz"),
    )
    assert code == 0 and not error
    assert f"published {folder}/models/animals/1: 0." in printed
    for what in ("default: outputs", "uint8: outputs"):
        assert f"checked on 6 samples: serving_{what} off by " in printed
    assert "classify_bytes: probabilities off by " in printed
    assert "folded 2 of 3 batch normalizations (not folded it is" in printed
    assert "MaxPooling2D 'max_pooling2d' takes maxima" in printed
    rows = [line.split() for line in printed.splitlines()]
    for size in ("1", "8", "64"):
        (times,) = [row[1:] for row in rows if row[:1] == [size]]
        assert len(times) == 5 and all(float(x) > 0.0 for x in times)
    signatures = tf.saved_model.load("models/animals/1").signatures
    found = signatures["serving_default"](inputs=np.float32(IMAGES))
    model = keras.saving.load_model("model.keras")
    np.testing.assert_allclose(
        found["outputs"], models.outputs(model, IMAGES), 1e-4, 1e-4
    )
    labels = folder / "models" / "animals" / "1" / "assets" / "labels.txt"
    assert labels.read_text().splitlines() == CLASS_NAMES


def test_a_model_without_batch_normalization(folder, capsys):
    dense = keras.layers.Dense(2)
    keras.Sequential([keras.Input((3,)), dense]).save("model.keras")
    code, printed, _ = _run(capsys, "--output=plain")
    assert code == 0 and "no batch normalization to fold" in printed
    assert os.listdir("plain") == ["1"]


def test_bad_input(folder, capsys, monkeypatch):
    (folder / "notes").mkdir()
    (folder / "notes" / "notes.txt").write_text("mine")
    (folder / "latin.txt").write_bytes(b"caf\xe9\n")
    (folder / "two.txt").write_text("cat\ndog\n")
    np.savez("wide.npz", x=IMAGES[..., :1])
    before = sorted(folder.rglob("*"))
    for arguments, said in (
        (["--output=notes"], "something else than numbered versions"),
        (["--output=model.keras"], "a file"),
        (["--output=new", "--class_names=two.txt"], "Received: 2 names"),
        (["--output=new", "--class_names=latin.txt"], "are not UTF-8"),
        (["--output=new", "--class_names=missing.txt"], "no such file"),
        (["--output=new", _MEAN], "--mean and --deviation go together"),
        (["--output=new", "--mean=0", "--deviation=0"], "above zero"),
        (["--output=new", "--mean=0,1", "--deviation=1"], "Received: mean=[0"),
        (["--output=new", "--data=wide.npz"], "must hold numbers of shape"),
        (["--output=new", "--data=missing.npz"], "no such file"),
    ):
        code, printed, error = _run(capsys, *arguments)
        assert code == 2 and not printed, arguments
        assert error.startswith("keras-bn: error: ") and said in error
        assert error.count("\n") == 1
    assert sorted(folder.rglob("*")) == before
    with pytest.raises(SystemExit) as end:
        _run(capsys, "--output=new", "--mean=x", "--deviation=1")
    assert end.value.code == 2
    assert "must be a number" in capsys.readouterr().err


def test_a_wrong_export_is_not_published(folder, capsys, monkeypatch):
    def wrong(model):
        new = keras.models.clone_model(model)
        new.set_weights([1.01 * x for x in model.get_weights()])
        return new

    monkeypatch.setattr(export, "_folded", wrong)
    before = sorted(folder.rglob("*"))
    code, printed, error = _run(capsys, "--output=new", "--data=data.npz")
    assert code == 2 and not printed and "is off by" in error
    assert error.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


def test_a_full_disk(folder, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    before = sorted(folder.rglob("*"))
    try:
        code, printed, error = _run(capsys, "--output=new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and not printed
    assert "cannot be written" in error and error.count("\n") == 1
    assert sorted(folder.rglob("*")) == before
