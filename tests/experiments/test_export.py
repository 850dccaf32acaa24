"""`experiments.export`: from a run's folder to a version that is served."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from experiments import ExperimentError
from experiments import data
from experiments import export
from experiments import run_model
from experiments import train
from keras_bn.serving import served
from keras_bn.serving import summary


@pytest.fixture(scope="module")
def few():
    """A few digits: a data set on which a step costs little."""
    digits = data.load("digits")
    return dataclasses.replace(
        digits,
        train_images=digits.train_images[:40],
        train_labels=digits.train_labels[:40],
        test_images=digits.test_images[:70],
        test_labels=digits.test_labels[:70],
    )


def _settings(**changes):
    return train.Settings(
        condition=11, steps=4, eval_every=4, batch_size=8, **changes
    )


@pytest.fixture(scope="module")
def results(few, tmp_path_factory):
    """Runs of condition 11 with raw and with standardized pixels."""
    output = tmp_path_factory.mktemp("results")
    for input in data.INPUTS:
        train.run(_settings(input=input), few, output / input)
    return output


@pytest.fixture(scope="module")
def version(results, few, tmp_path_factory):
    """The standardized run, published; and its network."""
    run = results / "standardized" / "11" / "0"
    settings, _ = export.read_run(run)
    network = export.load_run(run, settings)
    output = tmp_path_factory.mktemp("models") / "digits"
    with pytest.MonkeyPatch.context() as patch:
        # `test_the_program` measures the latency.
        patch.setattr(summary, "folding", lambda *args, **options: "")
        path = export.publish(network, few, "standardized", output)
    return path, network


def _logits(network, dataset, input):
    prepare = data.inputs(dataset, input)
    return network.predict_on_batch(prepare(dataset.test_images))


def test_a_version_of_a_run(version, few):
    """Pixels as they come are scaled as in training."""
    path, network = version
    signatures = tf.saved_model.load(str(path)).signatures
    found = signatures["serving_uint8"](inputs=tf.constant(few.test_images))
    expected = _logits(network, few, "standardized")
    assert np.std(expected, axis=0).min() > 0.1
    np.testing.assert_allclose(found["outputs"], expected, 1e-4, 1e-4)
    assert not np.allclose(
        found["outputs"], _logits(network, few, "raw"), atol=0.1
    )
    png = tf.stack([tf.io.encode_png(x) for x in few.test_images[:5]])
    names = signatures["classify_bytes"](image_bytes=png)["class_names"]
    assert [int(x) for x in names[:, 0].numpy()] == list(
        expected[:5].argmax(-1)
    )


def _check_answers(version, dataset, batches):
    path, network = version
    images = np.float32(dataset.test_images)
    different, answer = served.answers_to_threads(
        path, {"inputs": images}, threads=2, batches=batches
    )
    assert different == 1
    np.testing.assert_allclose(
        answer["outputs"],
        _logits(network, dataset, "standardized"),
        1e-4,
        1e-4,
    )


def test_one_answer_to_two_threads(version, few):
    _check_answers(version, few, 100)


@pytest.mark.slow
def test_one_answer_to_two_threads_for_long(version, few):
    _check_answers(version, few, 1_000)


def _program(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.export", *map(str, arguments)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )


def test_the_program(results, tmp_path):
    run, output = results / "raw" / "11" / "0", tmp_path / "models"
    done = _program(f"--model={run}", f"--output={output}")
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    assert printed.startswith("condition 11, seed 0, 4 steps; digits ")
    assert f"raw pixels -> {output}\npublished {output}/1: " in printed
    assert "checked on 64 samples: classify_bytes: probabi" in printed
    assert re.search(r"\nfolded [1-3] of 3 batch normalizations", printed)
    assert re.search(r"\n64 ( +\d+\.\d+){5}\n", printed)
    found = re.findall(r"\n  (.*): (0\.\d{4})", printed)
    assert [name for name, _ in found] == [
        "as trained",
        "folded",
        "folded, int8",
        "not folded, int8",
    ]
    trained, folded, *int8 = (float(x) for _, x in found)
    assert trained == pytest.approx(folded, abs=0.005)
    for accuracy in int8:
        assert trained == pytest.approx(accuracy, abs=0.05)
    signatures = tf.saved_model.load(str(output / "1")).signatures
    assert sorted(signatures) == [
        "classify_bytes",
        "serving_default",
        "serving_uint8",
    ]


def test_a_file(version, few, tmp_path):
    """The same network, from a .keras file."""
    _, network = version
    network.save(tmp_path / "model.keras")
    loaded = export.load_file(tmp_path / "model.keras")
    np.testing.assert_array_equal(
        _logits(loaded, few, "raw"), _logits(network, few, "raw")
    )


def test_accuracies_without_batch_normalization(few):
    network = run_model.network(train.Settings(condition=0))
    found = export.accuracies(network, few, "raw")
    right = _logits(network, few, "raw").argmax(-1) == few.test_labels
    assert found["as trained"] == found["folded"] == pytest.approx(
        right.mean()
    )


def test_bad_runs(results, few, tmp_path):
    def refused(function, *arguments, said):
        with pytest.raises(ExperimentError) as error:
            function(*arguments)
        assert said in str(error.value) and "\n" not in str(error.value)

    run = results / "raw" / "11" / "0"
    refused(export.read_run, tmp_path, said="which has no run.json")
    facts = (run / "run.json").read_text()
    (tmp_path / "run.json").write_text(facts)
    refused(export.read_run, tmp_path, said="has no trained weights")
    (tmp_path / "final.weights.h5").write_bytes(b"half")
    settings, facts = export.read_run(tmp_path)
    refused(export.load_run, tmp_path, settings, said="cannot be read")
    (tmp_path / "run.json").write_text("{")
    refused(export.read_run, tmp_path, said="not JSON")
    other = dataclasses.replace(few, copy="another copy")
    refused(export.require_same_data, facts, other, said="another copy")
    export.require_same_data(facts, few)
    small = tmp_path / "small.keras"
    refused(export.load_file, small, said="no such file")
    small.write_bytes(b"half")
    refused(export.load_file, small, said="cannot be loaded")
    keras.Sequential([keras.Input((3,)), keras.layers.Dense(10)]).save(small)
    refused(export.load_file, small, said="must take images of 32x32x3")
    # Somebody else's folder is left as it is.
    network = export.load_run(run, settings)
    before = sorted(os.listdir(tmp_path))
    refused(
        export.publish, network, few, "raw", tmp_path, said="something else"
    )
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "give --model"),
        (["--model=results/one/11/0"], "give --output"),
        (["--model=a.keras", "--output=b"], "--input is for a .keras file"),
        (
            ["--model=a/11/0", "--output=b", "--input=raw"],
            "--input is for a .keras file",
        ),
        (["--model=no/11/0", "--output=b"], "which has no run.json"),
    ],
)
def test_bad_flags(arguments, said):
    done = _program(*arguments)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("error: ") and said in done.stderr
    assert done.stderr.count("\n") == 1
