"""The kernels of the backend Keras runs on, picked once at import.

Five pure functions of tensors, the same on every backend; `reference.py` is
their definition. Moments are float32, or float64 for float64 inputs, whatever
the inputs' dtype; outputs have the inputs' dtype.

`find_replicas(axis_name, synchronized, state)`
    The replicas of the caller that share out a batch, or None: those of
    `tf.distribute`, of `shard_map` or `pmap` along `axis_name`, of
    `torch.distributed`. Where nothing is `synchronized` they are found only if
    all of them are sure to run the same layers. Their `gather(row)` gives the
    rows of all, `(replicas, n)`, from each one's `(n,)`, by one collective.
    Arrays that JAX has split over devices are whole to the caller.

`batch_moments(inputs, *, axis, mask=None, replicas=None)`
    `(mean, variance, count)`: `mean` and the biased `variance` of shape
    `(channels,)`; `count`, how many positions entered: an int where the shape
    says it, else a scalar or, under a mask, of shape `(channels,)`. A channel
    without any position has mean 0, variance 0 and count 0. No gradient flows
    through the result.

`normalize_batch(inputs, gamma, beta, *, axis, epsilon, mask=None,
moments=None, replicas=None)`
    `(outputs, mean, variance, count)`. The gradient of `outputs` goes to
    `inputs` (through the moments too), `gamma` and `beta`; none is asked for
    the other three, but JAX has that of the moments, which its users get back
    as new state. `moments` hands in the result of `batch_moments` for these
    inputs, this mask and these replicas, where the caller needed it
    beforehand. With `replicas` the backward pass has one collective too.

`normalize_ghost_batches(inputs, gamma, beta, *, axis, epsilon, size,
mask=None)`
    As `normalize_batch` for each `size` samples on their own, the last ones
    being fewer: `outputs`, and `mean`, `variance` and `count` with a row for
    each part; `count` of shape `(parts, 1)` or `(parts, channels)`. `axis` is
    not 0. Hoffer et al., 2017, arXiv 1705.08741, call the parts ghost batches.

`normalize_with(inputs, mean, variance, gamma, beta, *, axis, epsilon)`
    `outputs`, normalized with moments that do not depend on `inputs`.

`rows_of(inputs, mask)`
    None for dense `inputs`. For ragged ones `(rows, mask, rank, restore)`: all
    rows one after the other in a dense tensor, their mask or None, and how many
    axes came to lie in its first one besides the first; `restore(rows)` has
    the raggedness of `inputs`. ValueError for sparse inputs.

`is_recomputation()`
    Whether the call is known to repeat a forward pass for the backward one,
    as gradient checkpointing does.

`axis` is an int in `[0, rank)`. `gamma` and `beta` may be None and are
otherwise `(channels,)` in the dtype of the moments. `mask` is boolean, of the
rank of `inputs`, broadcastable to it: False positions are normalized like the
others but do not enter the moments.
"""

import keras

if keras.backend.backend() == "tensorflow":
    from keras_bn.kernels.tensorflow import batch_moments
    from keras_bn.kernels.tensorflow import is_recomputation
    from keras_bn.kernels.tensorflow import normalize_batch
    from keras_bn.kernels.tensorflow import normalize_ghost_batches
    from keras_bn.kernels.tensorflow import normalize_with
    from keras_bn.kernels.tensorflow.ragged import rows_of
    from keras_bn.kernels.tensorflow.replicas import find_replicas
elif keras.backend.backend() == "jax":
    from keras_bn.kernels.jax import batch_moments
    from keras_bn.kernels.jax import is_recomputation
    from keras_bn.kernels.jax import normalize_batch
    from keras_bn.kernels.jax import normalize_ghost_batches
    from keras_bn.kernels.jax import normalize_with
    from keras_bn.kernels.jax.ragged import rows_of
    from keras_bn.kernels.jax.replicas import find_replicas
else:
    from keras_bn.kernels.torch import batch_moments
    from keras_bn.kernels.torch import normalize_batch
    from keras_bn.kernels.torch import normalize_ghost_batches
    from keras_bn.kernels.torch import normalize_with
    from keras_bn.kernels.torch.checkpointing import is_recomputation
    from keras_bn.kernels.torch.ragged import rows_of
    from keras_bn.kernels.torch.replicas import find_replicas

__all__ = [
    "batch_moments",
    "find_replicas",
    "is_recomputation",
    "normalize_batch",
    "normalize_ghost_batches",
    "normalize_with",
    "rows_of",
]
