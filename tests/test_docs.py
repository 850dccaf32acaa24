"""What the pages in `docs/` say to type, typed."""

import re
from pathlib import Path

import keras
import pytest
from sklearn.datasets import load_digits

import keras_bn

_DOCS = Path(__file__).parents[1] / "docs"


def _blocks(page):
    text = (_DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def _compile(model):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.Adam(use_ema=True)
    model.compile(optimizer, loss, metrics=["accuracy"])


@pytest.fixture
def names():
    """What the pages call by name: a small classifier and its data."""
    images, labels = load_digits(return_X_y=True)
    images = images.astype("float32").reshape(-1, 8, 8, 1)
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(8, 3, activation="relu"),
            keras_bn.BatchNormalization(momentum=0.9),
            keras.layers.Flatten(),
            keras.layers.Dense(10),
        ]
    )
    _compile(model)
    x_train, y_train = images[:1024], labels[:1024]
    model.fit(x_train, y_train, epochs=5, verbose=0)
    batches = [(x_train[:64], y_train[:64]), (x_train[64:128], y_train[64:128])]
    return {
        "keras": keras,
        "keras_bn": keras_bn,
        "model": model,
        "x_train": x_train,
        "y_train": y_train,
        "x_test": images[1024:],
        "y_test": labels[1024:],
        "x_new": 0.5 * images[1024:],
        "batches": batches,
        "train_step": model.train_on_batch,
    }


def test_find_sick_statistics(names, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = _blocks("find_sick_statistics.md")
    assert len(blocks) == 6
    for block in blocks:
        # With an optimizer of its own: on JAX, Keras 3.15 gives the weights
        # the buffers of their averages at the end of `fit`, and the next one
        # fails.
        _compile(names["model"])
        exec(block, names)
    assert names["report"].ok
    assert "healthy" in capsys.readouterr().out
    assert list(tmp_path.glob("logs/**/events*"))
