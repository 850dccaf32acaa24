"""Studies that are run, on a few digits."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import ExperimentError
from experiments import data
from experiments import studies
from experiments import train
from experiments.studies import records
from experiments.studies import verdict
from experiments.studies.settings import shrink


@pytest.fixture(scope="module")
def digits():
    return shrink(data.load("digits"))


def _small(study, monkeypatch, **changes):
    size = dataclasses.replace(
        study.quick,
        **{
            "seeds": 1,
            "steps": 4,
            "eval_every": 1,
            "train_images": 130,
            "test_images": 60,
            **changes,
        },
    )
    monkeypatch.setattr(study, "quick", size)
    return study


def _lines(study, output):
    path = study.folder(output) / records.FILE
    return [json.loads(x) for x in path.read_text().splitlines()]


def test_images_are_shrunk_by_means_of_four(digits):
    full = data.load("digits")
    right = full.train_images[:5].reshape(5, 16, 2, 16, 2, 3).mean(axis=(2, 4))
    assert np.abs(digits.train_images[:5] - right).max() <= 0.5
    assert digits.train_images.dtype == np.uint8
    assert digits.copy.endswith("shrunk to 16x16")


# Each runs code of its own; the others are the same but for their settings.
@pytest.mark.parametrize(
    ("name", "arms"),
    [
        ("batch_size", ("batch_4",)),
        ("cost", ("none",)),
        ("covariate_shift", ("none_3", "noisy_3")),
        ("overfitting", ("augmented_1000",)),
        ("recurrent", ("batch_recurrent", "layer")),
        ("scale_and_shift", ("neither",)),
        ("transfer", ("recalibrated",)),
    ],
)
def test_a_study_is_run(name, arms, digits, tmp_path, monkeypatch):
    study = _small(studies.find(name), monkeypatch, arms=arms)
    study.run(digits, tmp_path, quick=True)
    lines = _lines(study, tmp_path)
    wanted = {(x.arm, x.seed) for x in study.settings(True, "keras_bn")}
    found = [(x["facts"]["arm"], x["facts"]["seed"]) for x in lines]
    assert sorted(found) == sorted(wanted)
    results = study.read(tmp_path)
    assert results.verdict == verdict.NOT_ASSESSED
    assert study.figure(results).startswith("<?xml")
    assert not list(study.folder(tmp_path).glob("*/*/final.weights.h5"))


def test_finished_runs_are_not_trained_again(digits, tmp_path, monkeypatch):
    study = _small(studies.find("convergence"), monkeypatch, seeds=2)
    really, trained = train._train, []

    def interrupted(settings, *arguments):
        trained.append((settings.arm, settings.seed))
        if len(trained) == 3:
            raise KeyboardInterrupt("stopped")
        really(settings, *arguments)

    monkeypatch.setattr(train, "_train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study.run(digits, tmp_path, quick=True)
    study.run(digits, tmp_path, quick=True)
    third = ("none", 1)
    assert trained == [("none", 0), ("batch", 0), third, third, ("batch", 1)]
    monkeypatch.setattr(train, "_train", None)
    before = _lines(study, tmp_path)
    study.run(digits, tmp_path, quick=True)
    assert _lines(study, tmp_path) == before
    _small(study, monkeypatch, steps=5)
    with pytest.raises(ExperimentError, match="steps=4 there, 5 now"):
        study.run(digits, tmp_path, quick=True)


def test_runs_that_another_process_trained(digits, tmp_path, monkeypatch):
    """It looked at the records before those runs were added to them."""
    study = _small(studies.find("convergence"), monkeypatch)
    runs = study.settings(quick=True, layer="keras_bn")
    folder = study.folder(tmp_path)
    study.train(runs, digits, folder)
    before = _lines(study, tmp_path)
    assert len(before) == len(runs)
    monkeypatch.setattr(train.training, "Training", None)
    study.train(runs, digits, folder)
    for settings in runs:
        own = train.open_folder(settings, digits, folder)
        # As one that waited for the other's lock.
        train._train(settings, digits, own, lambda steps: None, None)
        settings.conclude(digits, own)
    assert _lines(study, tmp_path) == before


def test_a_record_holds_what_the_folder_does(digits, tmp_path, monkeypatch):
    study = _small(studies.find("convergence"), monkeypatch, arms=("none",))
    study.run(digits, tmp_path, quick=True)
    (line,) = _lines(study, tmp_path)
    folder = study.folder(tmp_path) / "none" / "0"
    assert line["facts"] == json.loads((folder / "run.json").read_text())
    metrics = (folder / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(x)["test_loss"] for x in metrics]
    np.testing.assert_allclose(line["lines"]["test_loss"], losses, rtol=1e-4)
    assert line["lines"]["step"] == [1, 2, 3, 4]


def test_what_is_not_a_number_is_null(tmp_path):
    facts = {"study": "cost", "arm": "none", "seed": 0, "steps": 2}
    rows = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 1.0}]
    records.add_lines(
        tmp_path, {**facts, "dataset": "digits"}, rows, [], {"x": float("inf")}
    )
    text = (tmp_path / records.FILE).read_text()
    assert '"loss": [null, 1.0]' in text
    record = records.read(tmp_path)["none"][0]
    assert np.isnan(record.lines["loss"][0]) and np.isnan(record.measures["x"])
