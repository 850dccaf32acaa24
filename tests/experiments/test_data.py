"""Where images come from, and the batches made of them."""

import dataclasses
import os
import shutil
import time
import types
from pathlib import Path

import numpy as np
import pytest

from experiments import ExperimentError
from experiments import article
from experiments import data
from experiments import download
from experiments import run_model
from experiments import train


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def cifar10_dir():
    """The prepared CIFAR-10 that TFDS_DATA_DIR names, readable here."""
    folder = os.environ.get("TFDS_DATA_DIR", "")
    prepared = Path(folder, "cifar10", "3.0.2")
    if not folder or not prepared.is_dir():
        pytest.skip("TFDS_DATA_DIR names no folder with CIFAR-10")
    pytest.importorskip("tensorflow_datasets")
    if not list(prepared.glob("*.array_record-*")):
        pytest.importorskip("tensorflow")
    return folder


def test_digits(digits):
    assert digits.train_images.shape == (1437, 32, 32, 3)
    assert digits.test_images.shape == (360, 32, 32, 3)
    for images in (digits.train_images, digits.test_images):
        assert images.dtype == np.uint8
        assert (images.min(), images.max()) == (0, 255)
    for labels in (digits.train_labels, digits.test_labels):
        assert labels.dtype == np.int32
        assert set(labels) == set(range(10))
    # Each pixel of the 8x8 original is a 4x4 square, alike in each channel.
    image = digits.train_images[0]
    squares = image.reshape(8, 4, 8, 4, 3)
    assert np.all(squares == squares[:, :1, :, :1, :1])
    assert digits.name == "digits"
    assert "32x32x3" in digits.note


@pytest.fixture(scope="module")
def cifar10(cifar10_dir):
    return data.load("auto", cifar10_dir)


def test_cifar10(cifar10):
    dataset = cifar10
    assert dataset.train_images.shape == (50_000, 32, 32, 3)
    assert dataset.test_images.shape == (10_000, 32, 32, 3)
    assert dataset.train_images.dtype == dataset.test_images.dtype == np.uint8
    assert np.bincount(dataset.train_labels).tolist() == [5_000] * 10
    assert np.bincount(dataset.test_labels).tolist() == [1_000] * 10
    # The means of CIFAR-10 by channel, known to be 125.3, 123.0, 113.9.
    means = dataset.train_images.mean(axis=(0, 1, 2))
    np.testing.assert_allclose(means, [125.3, 123.0, 113.9], atol=0.5)
    assert dataset.note.startswith("cifar10 3.0.2 (")


def test_the_copys_encoding_is_told_from_its_images(cifar10, cifar10_dir):
    files = Path(cifar10_dir, "cifar10", "3.0.2").glob("cifar10-test.*")
    is_jpeg = b"\xff\xd8\xff\xe0\x00\x10JFIF" in next(files).read_bytes()
    assert cifar10.copy == ("JPEG re-encoded" if is_jpeg else "PNG of TFDS")


def test_truncated_data_is_named(cifar10_dir, tmp_path):
    copy = tmp_path / "cifar10" / "3.0.2"
    shutil.copytree(Path(cifar10_dir, "cifar10", "3.0.2"), copy)
    copy.chmod(0o755)
    for file in copy.glob("cifar10-t*"):
        file.chmod(0o644)
        os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ExperimentError) as error:
        data.load("cifar10", str(tmp_path))
    assert str(copy) in str(error.value)
    assert "cannot be read" in str(error.value)
    assert "\n" not in str(error.value)


def _prepared(folder, info):
    pytest.importorskip("tensorflow_datasets")
    version = folder / "cifar10" / "3.0.2"
    version.mkdir(parents=True)
    if info is not None:
        (version / "dataset_info.json").write_text(info)
    return version


@pytest.mark.parametrize("dataset", ["auto", "cifar10"])
@pytest.mark.parametrize("info", [None, "{", "{}"])
def test_corrupt_data_is_named_and_not_replaced(dataset, info, tmp_path):
    version = _prepared(tmp_path, info)
    with pytest.raises(ExperimentError, match="cannot be read") as error:
        data.load(dataset, str(tmp_path))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
    assert version.is_dir()


@pytest.mark.parametrize("dataset", ["auto", "cifar10"])
def test_missing_data_folder(dataset, tmp_path):
    missing = str(tmp_path / "missing")
    with pytest.raises(ExperimentError, match=f"data_dir={missing}$"):
        data.load(dataset, missing)
    assert not os.path.exists(missing)


def test_the_environment_names_the_folder(tmp_path, monkeypatch):
    missing = str(tmp_path / "missing")
    monkeypatch.setenv("TFDS_DATA_DIR", missing)
    with pytest.raises(ExperimentError, match=f"data_dir={missing}$"):
        data.load("cifar10")


def test_data_set_that_does_not_exist():
    with pytest.raises(ExperimentError, match="Received: dataset='mnist'"):
        data.load("mnist")


def test_auto_falls_back_to_digits_with_one_line(
    tmp_path, monkeypatch, capsys, digits
):
    def fail(data_dir):
        raise download.DownloadError("CIFAR-10 could not be downloaded (why)")

    monkeypatch.setattr(download, "download", fail)
    dataset = data.load("auto", str(tmp_path))
    np.testing.assert_array_equal(dataset.train_images, digits.train_images)
    said = capsys.readouterr().err.splitlines()
    said = [line for line in said if "CIFAR-10" in line]
    assert len(said) == 1
    for word in ("digits", "not the article's data"):
        assert word in said[0]
    with pytest.raises(ExperimentError):
        data.load("cifar10", str(tmp_path))


def test_auto_falls_back_where_the_folder_is_read_only(
    tmp_path, monkeypatch, capsys
):
    pytest.importorskip("tensorflow_datasets")

    def refuse(**arguments):
        raise PermissionError(13, "Permission denied")

    refusing = types.SimpleNamespace(mkdtemp=refuse)
    monkeypatch.setattr(download, "tempfile", refusing)
    assert data.load("auto", str(tmp_path)).name == "digits"
    assert "(Permission denied). Going on with" in capsys.readouterr().err
    with pytest.raises(ExperimentError, match="cannot write to the data"):
        data.load("cifar10", str(tmp_path))


def _numbered(images):
    """A data set whose labels number its images, and whose pixels differ."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (images, 32, 32, 3), np.uint8)
    labels = np.arange(images, dtype=np.int32)
    return data.Dataset(pixels, labels, pixels, labels, "numbered", "1", "only")


def test_an_epoch_of_cifar10_has_390_batches():
    images = np.broadcast_to(np.uint8(0), (50_000, 32, 32, 3))
    dataset = dataclasses.replace(_numbered(1), train_images=images)
    batches = data.Batches(dataset, article.BATCH_SIZE)
    assert batches.per_epoch == article.BATCHES_PER_EPOCH


def test_batches_in_fixed_order():
    dataset = _numbered(50)
    batches = data.Batches(dataset, 8)
    labels = [batches[step][1].tolist() for step in range(12)]
    assert labels[0] == list(range(8))
    assert labels[5] == list(range(40, 48))  # the last 2 are dropped
    assert labels[6:] == labels[:6]
    inputs, _ = batches[7]
    assert inputs.dtype == np.float32
    np.testing.assert_array_equal(inputs, dataset.train_images[8:16])


def test_shuffled_batches():
    dataset = _numbered(50)
    batches = data.Batches(dataset, 8, shuffle=True, seed=1)
    labels = [batches[step][1].tolist() for step in range(12)]
    first, second = sum(labels[:6], []), sum(labels[6:], [])
    assert len(set(first)) == len(set(second)) == 48
    assert first != second and first != sorted(first)
    # Any step on its own gives the batch that it has in a whole run.
    again = data.Batches(dataset, 8, shuffle=True, seed=1)
    for step in (11, 3, 7):
        inputs, rows = again[step]
        assert rows.tolist() == labels[step]
        np.testing.assert_array_equal(inputs, dataset.train_images[rows])
    other = data.Batches(dataset, 8, shuffle=True, seed=2)
    assert other[0][1].tolist() != labels[0]


def test_standardized_inputs(digits):
    random = np.random.default_rng(0)
    pixels = random.integers(0, [80, 160, 256], (64, 32, 32, 3), np.uint8)
    dataset = dataclasses.replace(digits, train_images=pixels)
    inputs = data.inputs(dataset, "standardized")(pixels)
    assert inputs.dtype == np.float32
    np.testing.assert_allclose(inputs.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(inputs.std((0, 1, 2)), 1, atol=1e-4)
    # The test images are measured by the training images.
    white = data.inputs(dataset, "standardized")(np.full_like(pixels, 255))
    expected = (255 - pixels.mean((0, 1, 2))) / pixels.std((0, 1, 2))
    np.testing.assert_allclose(white[0, 0, 0], expected, rtol=1e-4)


def test_inputs_that_do_not_exist(digits):
    with pytest.raises(ExperimentError, match="Received: input='grey'"):
        data.inputs(digits, "grey")


def test_a_batch_larger_than_the_data():
    with pytest.raises(ExperimentError, match="batch_size=51"):
        data.Batches(_numbered(50), 51)


def test_batches_cost_little_beside_a_training_step(digits):
    settings = train.Settings(condition=0)
    model = run_model.build(settings)

    def best(task, repetitions):
        seconds = []
        for repetition in range(repetitions):
            began = time.perf_counter()
            task(repetition)
            seconds.append(time.perf_counter() - began)
        return min(seconds)

    plain = data.Batches(digits, settings.batch_size)
    costly = data.Batches(digits, settings.batch_size, "standardized", True)
    step = best(lambda step: model.train_on_batch(*plain[step]), 5)
    for batches in (plain, costly):
        assert best(lambda step: batches[step], 20) < 0.05 * step
