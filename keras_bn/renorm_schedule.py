"""The schedule by which batch renormalization loosens its bounds."""

import keras
from keras import ops

from keras_bn.dtypes import at_least
from keras_bn.dtypes import at_most

_Schedule = keras.optimizers.schedules.LearningRateSchedule


@keras.saving.register_keras_serializable(package="keras_bn")
class LinearRamp(_Schedule):
    """A value that stays, moves on a straight line, and stays again.

    Args:
        first: Float, the value up to the step `begin`.
        last: Float, the value from the step `end` on.
        begin: Int, the step at which it begins to move, not negative.
        end: Int, greater than `begin`.
        reciprocal: Whether the result is 1 / value.
    """

    def __init__(self, first, last, begin, end, reciprocal=False):
        if not 0 <= begin < end:
            raise ValueError(
                "A ramp must begin at step 0 or later and end after that. "
                f"Received: begin={begin}, end={end}."
            )
        self.first = first
        self.last = last
        self.begin = begin
        self.end = end
        self.reciprocal = reciprocal

    def __call__(self, step):
        """The value at `step`, an integer tensor, as a float32 tensor."""
        done = ops.cast(step, "float32") - float(self.begin)
        done = at_least(done / float(self.end - self.begin), 0.0)
        done = at_most(done, 1.0)
        value = self.first * (1.0 - done) + self.last * done
        return 1.0 / value if self.reciprocal else value

    def get_config(self):
        return {
            "first": self.first,
            "last": self.last,
            "begin": self.begin,
            "end": self.end,
            "reciprocal": self.reciprocal,
        }


def renorm_schedule(
    rmax=3.0, dmax=5.0, begin=5_000, rmax_end=40_000, dmax_end=25_000
):
    """The bounds of batch renormalization as its paper trained with them.

    `r` stays in `[1 / rmax, rmax]` and `d` in `[-dmax, dmax]`. With rmax 1 and
    dmax 0, where both start, this is batch normalization. The defaults are
    those of Ioffe, 2017, arXiv 1702.03275, section 4, who relaxes the bounds
    "gradually": here on a straight line. A training that is shorter than his
    wants steps that are as much smaller.

    Args:
        rmax: Float of at least 1, the bound of `r` in the end.
        dmax: Float, not negative, the bound of `d` in the end.
        begin: Int, after how many training batches the bounds begin to move.
        rmax_end: Int, after how many `rmax` is reached.
        dmax_end: Int, after how many `dmax` is reached.

    Returns:
        Dictionary for the layer's argument `renorm_clipping`.

    Raises:
        ValueError: `rmax` below 1, `dmax` below 0, or an end that is not
            after the beginning.
    """
    if not (rmax >= 1 and dmax >= 0):
        raise ValueError(
            "`rmax` must be at least 1 and `dmax` not negative. "
            f"Received: rmax={rmax}, dmax={dmax}."
        )
    return {
        "rmin": LinearRamp(1.0, rmax, begin, rmax_end, reciprocal=True),
        "rmax": LinearRamp(1.0, rmax, begin, rmax_end),
        "dmax": LinearRamp(0.0, dmax, begin, dmax_end),
    }
