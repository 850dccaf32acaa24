"""When a score that is lost in one of the modes counts."""

import numpy as np
import pytest

from keras_bn.diagnostics.batches import Batch
from keras_bn.diagnostics.scores import Comparison

SAMPLES = 10_000
LABELS = np.arange(SAMPLES) % 10


def _outputs(accuracy):
    """Right for the first samples alone."""
    outputs = np.eye(10)[LABELS]
    wrong = np.arange(SAMPLES) >= round(accuracy * SAMPLES)
    outputs[wrong] = np.roll(outputs[wrong], 1, axis=1)
    return outputs


def _comparison(in_inference, with_batch, order, batches=1):
    comparison = Comparison(None)
    both = _outputs(in_inference)[order], _outputs(with_batch)[order]
    for rows in np.array_split(np.arange(SAMPLES), batches):
        batch = Batch(rows, LABELS[order][rows])
        comparison.add(*(x[rows] for x in both), batch)
    return comparison


# What a moving average that lags may cost, from the table of thresholds.
@pytest.mark.parametrize(
    "in_inference, with_batch, least",
    [
        (0.7, 0.6, 0.05),
        (0.97, 0.95, 0.05),
        (0.5, 0.6, 0.2),
        (0.9, 0.95, 0.05),
        (0.2, 0.3, 0.14),
    ],
)
def test_what_has_to_be_lost(in_inference, with_batch, least):
    comparison = _comparison(in_inference, with_batch, np.arange(SAMPLES))
    assert comparison.in_inference == pytest.approx(in_inference)
    assert comparison.with_batch == pytest.approx(with_batch)
    lost = in_inference - with_batch
    assert comparison.lost_with_batch() == pytest.approx(lost)
    # Of paired differences that are 0 or 1, as large a share of them as lost.
    error = np.sqrt(abs(lost) * (1 - abs(lost)) / SAMPLES)
    assert comparison.standard_error() == pytest.approx(error)
    assert comparison.least() == pytest.approx(least + 2 * error, abs=0.015)


def test_samples_of_a_batch_are_not_independent():
    """Whole batches that differ count as one sample each."""
    sorted_by_what_differs = np.arange(SAMPLES)
    mixed = np.random.default_rng(0).permutation(SAMPLES)
    of_batches, of_samples = (
        _comparison(0.5, 0.6, order, 20).standard_error()
        for order in (sorted_by_what_differs, mixed)
    )
    # Two batches of 20 have all that was lost.
    shares = np.repeat([1.0, 0.0], [2, 18])
    error = shares.std(ddof=1) / np.sqrt(20)
    assert of_batches == pytest.approx(error)
    assert of_samples < error / 10
