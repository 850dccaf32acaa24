"""What batch normalization is in inference, and how it moves past layers.

`x * scale + shift`, in float64 NumPy. Arrays have the rank of one sample, size
1 along axes on which they do not depend: (1, 1, C) for images with channels
last. Where moving would change the result, `NotExact` says why.
"""

import dataclasses

import numpy as np


class NotExact(Exception):
    """Why something cannot be folded; a clause without a full stop."""


@dataclasses.dataclass(frozen=True)
class Affine:
    """The map `x * scale + shift`.

    Attributes:
        scale: float64 array of the rank of a sample.
        shift: The same, of the same shape.
    """

    scale: np.ndarray
    shift: np.ndarray

    def vectors(self, axis, size):
        """`(scale, shift)` of shape `(size,)`, of the indices of one axis.

        Args:
            axis: Int in `[0, rank)`, without the axis of samples.
            size: Of that axis; None: not known.

        Raises:
            NotExact: they depend on other axes too, or have no size.
        """
        if size is None:
            raise NotExact("the number of channels there is not known")
        others = np.delete(self.scale.shape, axis)
        if np.any(others != 1):
            raise NotExact("it depends on more than the channel there")
        return (
            np.broadcast_to(self.scale.ravel(), (size,)),
            np.broadcast_to(self.shift.ravel(), (size,)),
        )


def of_batch_normalization(
    mean, variance, gamma, beta, epsilon, sizes, rank
):
    """The map of batch normalization with moving statistics.

    Args:
        mean, variance, gamma, beta: Arrays of the layer's weights, the last
            two None where there are none.
        epsilon: Float.
        sizes: From each channel axis, without that of samples, to its size.
        rank: Of a sample.

    Returns:
        `Affine`.
    """
    scale = 1.0 / np.sqrt(variance + epsilon)
    if gamma is not None:
        scale = gamma * scale
    shift = -mean * scale
    if beta is not None:
        shift = shift + beta
    shape = [sizes.get(i, 1) for i in range(rank)]
    return Affine(scale.reshape(shape), shift.reshape(shape))


def reshaped(affine, shape, new_shape):
    """Moves past a reshape of samples from `shape` to `new_shape`.

    Raises:
        NotExact: the map depends on the position, and sizes are unknown.
    """
    if affine.scale.size == 1:
        ones = (1,) * len(new_shape)
        return Affine(affine.scale.reshape(ones), affine.shift.reshape(ones))
    if None in shape or None in new_shape:
        raise NotExact("is reshaped, and its size is not known")
    scale, shift = (
        np.broadcast_to(x, shape).reshape(new_shape)
        for x in (affine.scale, affine.shift)
    )
    for axis in range(len(new_shape)):
        first = [np.take(x, [0], axis) for x in (scale, shift)]
        if all(np.all(x == y) for x, y in zip((scale, shift), first)):
            scale, shift = first
    return Affine(scale, shift)


def transposed(affine, permutation):
    """Moves past a transpose; `permutation` as for `numpy.transpose`."""
    return Affine(
        affine.scale.transpose(permutation), affine.shift.transpose(permutation)
    )
