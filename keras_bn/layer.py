"""The batch-normalization layer: arguments, weights, call and config."""

import keras
from keras import ops

from keras_bn import kernels
from keras_bn.argument_checks import axes_within
from keras_bn.argument_checks import channel_sizes
from keras_bn.argument_checks import checked_axis
from keras_bn.argument_checks import checked_axis_name
from keras_bn.argument_checks import checked_momentum
from keras_bn.argument_checks import checked_virtual_batch_size
from keras_bn.argument_checks import flag
from keras_bn.argument_checks import fraction
from keras_bn.argument_checks import not_negative
from keras_bn.argument_checks import refuse_axis_name_off_jax
from keras_bn.argument_checks import refuse_axis_of_samples
from keras_bn.argument_checks import refuse_ragged_ghost_batches
from keras_bn.channel_axes import split_channel_axes
from keras_bn.channel_axes import weights_shape
from keras_bn.config import config_of
from keras_bn.dtypes import as_floats
from keras_bn.dtypes import moments_dtype
from keras_bn.kernel_inputs import as_kernels_see
from keras_bn.kernel_inputs import axes_of_rows
from keras_bn.kernel_inputs import counts_of_parts
from keras_bn.moving_statistics import as_vector
from keras_bn.moving_statistics import assign_where_counted
from keras_bn.moving_statistics import moving_average
from keras_bn.moving_statistics import take_in
from keras_bn.moving_statistics import unbiased
from keras_bn.renormalization import bounds_at
from keras_bn.renormalization import checked_clipping
from keras_bn.renormalization import copy_of
from keras_bn.renormalization import count_step
from keras_bn.renormalization import initializer_of_stddev
from keras_bn.renormalization import is_scheduled
from keras_bn.renormalization import renormalized
from keras_bn.renormalization import updates_of_reference
from keras_bn.switches import SwitchedLayer


@keras.saving.register_keras_serializable(package="keras_bn")
class BatchNormalization(SwitchedLayer):
    """Batch normalization, a drop-in for `keras.layers.BatchNormalization`.

    In training the layer normalizes with the moments of the batch,
    `gamma * (x - mean(x)) / sqrt(variance(x) + epsilon) + beta`, and takes
    them into its moving statistics:
    `moving = moving * momentum + batch * (1 - momentum)`. In inference it
    normalizes with the moving statistics. The mean and the variance are those
    of each channel, over all other axes (Ioffe & Szegedy, 2015,
    arXiv 1502.03167). The variance is the biased one, divided by N, in both
    places, as in Keras.

    Arguments, defaults, weights, their order and the meaning of `training` and
    `trainable` are those of Keras 3.15's layer, so that weights move between
    the two with `set_weights(get_weights())`. It is not a subclass of Keras's
    layer: `isinstance(layer, keras.layers.BatchNormalization)` is False.

    Moments are computed in float32, or float64 for float64 inputs, whatever
    the dtype policy, and the moving statistics are kept in float32 or wider.
    An empty batch, and one that is masked everywhere, leaves them as they are.

    Args:
        axis: Int, the channel axis: `-1` (default) with channels last, `1`
            with channels first. Any axis of the inputs, but not the only one.
            A list or tuple: every index of these axes together has statistics
            of its own, and the weights have the rank of the inputs, size 1
            along the other axes, as in tf.keras 2.
        momentum: Float in `[0, 1]`, the weight of the past in the moving
            statistics. None: they are the mean of all batches seen, as in
            PyTorch.
        epsilon: Float, not negative, added to the variance.
        center: Whether `beta` is added.
        scale: Whether the result is multiplied by `gamma`.
        beta_initializer: Initializer of `beta`.
        gamma_initializer: Initializer of `gamma`.
        moving_mean_initializer: Initializer of the moving mean.
        moving_variance_initializer: Initializer of the moving variance.
        beta_regularizer: Regularizer of `beta`.
        gamma_regularizer: Regularizer of `gamma`.
        beta_constraint: Constraint of `beta`.
        gamma_constraint: Constraint of `gamma`.
        renorm: Whether to train with batch renormalization (Ioffe, 2017,
            arXiv 1702.03275). Inference is the same with and without.
        renorm_clipping: Dictionary with any of the keys `"rmax"`, `"rmin"`,
            `"dmax"`: the bounds of the correction `x * r + d`. Missing ones
            do not bound. Each is a number or a
            `keras.optimizers.schedules.LearningRateSchedule` of the number of
            training batches taken in so far, which the layer then counts in
            the integer weight `renorm_step`; see `keras_bn.renorm_schedule`.
        renorm_momentum: Float in `[0, 1]`, the momentum of the statistics
            that the correction uses.
        synchronized: Whether the moments are those of the batch over all
            replicas: of a `tf.distribute` strategy, of `shard_map` or `pmap`,
            of `torch.distributed`. Without any it changes nothing. Replicas
            that are not synchronized still share their moving statistics:
            those of `tf.distribute`, of `shard_map` and `pmap`, and of
            `DistributedDataParallel` unless it leaves buffers alone
            (`forward_sync_buffers=False`).
        axis_name: JAX only: the name of the axis of `shard_map` or `pmap`
            that the batch is split along, or a tuple of names. None: the only
            manual axis there is. A model that was saved with one loads on the
            other backends too, where it means nothing.
        virtual_batch_size: Int of at least 1, or None. In training, so many
            samples at a time are normalized on their own, the last ones being
            fewer, and enter the moving statistics in turn (ghost batches:
            Hoffer et al., 2017, arXiv 1705.08741). The first axis of the
            inputs is that of samples. Not with `renorm`. Each replica has
            ghost batches of its own; `synchronized` takes all of them in, in
            the order of replicas.
        unbiased_variance: Whether the moving variance takes in the variance
            divided by N - 1, as PyTorch and TensorFlow 1's fused layer do.
            The batch is normalized with the one divided by N regardless.
        debias: Whether the initial moving statistics count for nothing, as
            in Adam (Kingma & Ba, 2015, arXiv 1412.6980). Not with
            `momentum=None`, nor for the statistics that renorm corrects by.
        use_moving_statistics: Which statistics normalize. None: the batch's in
            training, else the moving ones. True: the moving ones, as they are
            before the batch. False: the batch's, in inference too, where ghost
            batches and renorm play no part.
        update_moving_statistics: Whether a training call takes the batch's
            moments into the moving statistics. Inference never does.
        train_gamma_and_beta: Whether `gamma` and `beta` are trainable weights.
            They keep their place in `get_weights()`.
        **kwargs: Those of `keras.layers.Layer`: `name`, `dtype`, `trainable`.

    The last three and `trainable` are attributes that can be set later. A
    function that was compiled with the layer before does not follow. Where
    `fit`, `evaluate` or `predict` then runs one, a UserWarning names the model
    to compile again; not for `trainable` where the layer is in several models,
    which may each have a value of their own.

    Call arguments:
        inputs: Tensor of rank 2 or more; any float dtype, integers count as
            float32, or float64 where that is the compute dtype. Of a
            `tf.RaggedTensor`, or a jagged nested tensor of PyTorch, all rows
            are normalized together; the channel axis comes after the ragged
            ones, and a mask is ragged too. Sparse tensors are refused.
        training: Bool, whether to normalize with the batch's moments. With
            `trainable = False` the layer runs as in inference regardless, as
            in Keras.
        mask: Boolean tensor, True at the positions that enter the moments.
            Of the rank of `inputs`, broadcastable to it, or one axis less:
            the channel axis, or else, as Keras reads it, the last axis. Where
            the shape fits both it is refused.

    Output shape: that of `inputs`, in the compute dtype.

    Raises:
        ValueError: an argument is out of its range; when the layer is built,
            `axis` is not an axis of the inputs or the number of channels is
            unknown; in the call, the shape of `mask` does not fit, inputs are
            sparse, or ragged and to be trained in ghost batches.
    """

    def __init__(
        self,
        axis=-1,
        momentum=0.99,
        epsilon=1e-3,
        center=True,
        scale=True,
        beta_initializer="zeros",
        gamma_initializer="ones",
        moving_mean_initializer="zeros",
        moving_variance_initializer="ones",
        beta_regularizer=None,
        gamma_regularizer=None,
        beta_constraint=None,
        gamma_constraint=None,
        renorm=False,
        renorm_clipping=None,
        renorm_momentum=0.99,
        synchronized=False,
        axis_name=None,
        virtual_batch_size=None,
        unbiased_variance=False,
        debias=False,
        use_moving_statistics=None,
        update_moving_statistics=True,
        train_gamma_and_beta=True,
        **kwargs,
    ):
        super().__init__(**kwargs)
        refuse_axis_name_off_jax(axis_name)
        self.axis_name = checked_axis_name(axis_name)
        self.axis = checked_axis(axis)
        self.momentum = checked_momentum(momentum, debias)
        self.debias = flag("debias", debias)
        self.unbiased_variance = flag("unbiased_variance", unbiased_variance)
        self.epsilon = not_negative("epsilon", epsilon)
        self.center = flag("center", center)
        self.scale = flag("scale", scale)
        self.beta_initializer = keras.initializers.get(beta_initializer)
        self.gamma_initializer = keras.initializers.get(gamma_initializer)
        self.moving_mean_initializer = keras.initializers.get(
            moving_mean_initializer
        )
        self.moving_variance_initializer = keras.initializers.get(
            moving_variance_initializer
        )
        self.beta_regularizer = keras.regularizers.get(beta_regularizer)
        self.gamma_regularizer = keras.regularizers.get(gamma_regularizer)
        self.beta_constraint = keras.constraints.get(beta_constraint)
        self.gamma_constraint = keras.constraints.get(gamma_constraint)
        self.renorm = flag("renorm", renorm)
        if renorm:
            renorm_clipping = checked_clipping(renorm_clipping)
        self.renorm_clipping = renorm_clipping
        self.renorm_momentum = fraction("renorm_momentum", renorm_momentum)
        self.synchronized = flag("synchronized", synchronized)
        self.virtual_batch_size = checked_virtual_batch_size(
            virtual_batch_size, renorm
        )
        self.supports_masking = True

        self.moving_mean = None
        self.moving_variance = None
        self.num_batches_tracked = None
        self.renorm_step = None

        self.use_moving_statistics = use_moving_statistics
        self.update_moving_statistics = update_moving_statistics
        self.train_gamma_and_beta = train_gamma_and_beta

    def build(self, input_shape):
        sizes = channel_sizes(self.axis, input_shape)
        if self.virtual_batch_size is not None:
            refuse_axis_of_samples(self.axis, input_shape)
        shape = weights_shape(sizes, len(input_shape))
        if self.scale:
            self.gamma = self.add_weight(
                shape=shape,
                name="gamma",
                initializer=self.gamma_initializer,
                regularizer=self.gamma_regularizer,
                constraint=self.gamma_constraint,
                autocast=False,
            )
        if self.center:
            self.beta = self.add_weight(
                shape=shape,
                name="beta",
                initializer=self.beta_initializer,
                regularizer=self.beta_regularizer,
                constraint=self.beta_constraint,
                autocast=False,
            )
        self.mark_gamma_and_beta()
        mean_initializer = self.moving_mean_initializer
        variance_initializer = self.moving_variance_initializer
        self.moving_mean = self._add_statistic(
            "moving_mean", shape, mean_initializer
        )
        self.moving_variance = self._add_statistic(
            "moving_variance", shape, variance_initializer
        )
        if moving_average(self.momentum, self.debias).counts_batches:
            # Of each channel: a mask may leave one out.
            self.num_batches_tracked = self._add_statistic(
                "num_batches_tracked", shape, "zeros", "int"
            )
        if self.renorm:
            stddev_initializer = initializer_of_stddev(variance_initializer)
            self.moving_stddev = self._add_statistic(
                "moving_stddev", shape, stddev_initializer
            )
            self.renorm_mean = self._add_statistic(
                "renorm_mean", shape, copy_of(mean_initializer)
            )
            self.renorm_stddev = self._add_statistic(
                "renorm_stddev", shape, stddev_initializer
            )
            if is_scheduled(self.renorm_clipping):
                self.renorm_step = self._add_statistic(
                    "renorm_step", (), "zeros", "int"
                )
        self.input_spec = keras.layers.InputSpec(
            ndim=len(input_shape), axes=sizes
        )

    def _add_statistic(self, name, shape, initializer, dtype=None):
        # float16 statistics overflow, so the dtype policy has a lower bound.
        # "int" is int64 on TensorFlow, which keeps int32 variables in the
        # host's memory, where XLA's code for a GPU does not find them.
        return self.add_weight(
            shape=shape,
            name=name,
            dtype=dtype or moments_dtype(self.variable_dtype),
            initializer=initializer,
            trainable=False,
            autocast=False,
        )

    def compute_output_shape(self, input_shape):
        axes_within(self.axis, input_shape)
        return input_shape

    def call(self, inputs, training=None, mask=None):
        mode = self.settings().mode(training)
        self._compiled_functions.note(training, self.settings)
        sizes = self.input_spec.axes
        ragged = kernels.rows_of(inputs, mask)
        if ragged is None:
            return self._call_on_dense(inputs, mask, sizes, mode)
        rows, mask, rank, restore = ragged
        if self.virtual_batch_size is not None and mode.training:
            refuse_ragged_ghost_batches(self.virtual_batch_size, inputs.shape)
        sizes = axes_of_rows(sizes, rank, inputs.shape)
        return restore(self._call_on_dense(rows, mask, sizes, mode))

    def _call_on_dense(self, inputs, mask, sizes, mode):
        inputs, merged, axis, mask = as_kernels_see(inputs, mask, sizes)
        outputs = self._normalize(merged, axis, mask, mode)
        return split_channel_axes(outputs, inputs, tuple(sizes))

    def _normalize(self, inputs, axis, mask, mode):
        inputs = as_floats(inputs, self.compute_dtype)
        dtype = moments_dtype(inputs.dtype)
        gamma = as_vector(self.gamma, dtype) if self.scale else None
        beta = as_vector(self.beta, dtype) if self.center else None

        if not mode.normalizes_with_batch:
            moving = [
                as_vector(v, dtype)
                for v in (self.moving_mean, self.moving_variance)
            ]
            outputs = kernels.normalize_with(
                inputs, *moving, gamma, beta, axis=axis, epsilon=self.epsilon
            )
            if not mode.updates:
                return ops.cast(outputs, self.compute_dtype)

        replicas = None
        if self.synchronized or mode.updates:
            replicas = kernels.find_replicas(
                self.axis_name, self.synchronized, self.moving_mean.value
            )
        if self.virtual_batch_size is not None and mode.training:
            by_batch, *moments = kernels.normalize_ghost_batches(
                inputs,
                gamma,
                beta,
                axis=axis,
                epsilon=self.epsilon,
                size=self.virtual_batch_size,
                mask=mask,
            )
            if mask is None:
                known = counts_of_parts(
                    inputs.shape, axis, self.virtual_batch_size
                )
                moments[2] = known or moments[2]
        else:
            batch = {"axis": axis, "mask": mask}
            if self.synchronized:
                # The moments are those of all, who need not agree afterwards.
                batch["replicas"], replicas = replicas, None
            moments = None
            renorm = self.renorm and mode.training
            if renorm or not mode.normalizes_with_batch:
                moments = kernels.batch_moments(inputs, **batch)
            if renorm:
                gamma, beta = self._renormalize(gamma, beta, *moments)
            if mode.normalizes_with_batch:
                by_batch, *moments = kernels.normalize_batch(
                    inputs,
                    gamma,
                    beta,
                    epsilon=self.epsilon,
                    moments=moments,
                    **batch,
                )
        if mode.normalizes_with_batch:
            outputs = by_batch
        if mode.updates and not kernels.is_recomputation():
            self._take_in(*moments, replicas)
        return ops.cast(outputs, self.compute_dtype)

    def _renormalize(self, gamma, beta, mean, variance, count):
        """The scale and offset to normalize with, by the paper's correction."""
        clipping = bounds_at(
            self.renorm_clipping, self.renorm_step, mean.dtype
        )
        return renormalized(
            gamma,
            beta,
            mean,
            ops.sqrt(variance + self.epsilon),
            [
                as_vector(v, mean.dtype)
                for v in (self.renorm_mean, self.renorm_stddev)
            ],
            self.epsilon,
            clipping,
        )

    def _take_in(self, mean, variance, count, replicas):
        updates = []
        if self.renorm:
            updates = updates_of_reference(self, mean, variance)
        if self.unbiased_variance:
            variance = unbiased(variance, count)
        moving, spread = self.moving_variance, variance
        if self.renorm:
            # The paper averages the standard deviation; the moving variance
            # is derived from it.
            moving = self.moving_stddev
            spread = ops.sqrt(variance + self.epsilon)
        average = moving_average(self.momentum, self.debias)
        updates += [
            (average, self.moving_mean, mean),
            (average, moving, spread),
        ]
        count = take_in(
            updates,
            count,
            self.num_batches_tracked,
            replicas,
            self.synchronized,
        )
        if self.renorm:
            stddev = as_vector(self.moving_stddev, mean.dtype)
            assign_where_counted(
                self.moving_variance,
                ops.relu(ops.square(stddev) - self.epsilon),
                count,
            )
        if self.renorm_step is not None:
            count_step(self.renorm_step, count)

    def get_config(self):
        return {**super().get_config(), **config_of(self)}

    @classmethod
    def from_config(cls, config):
        # JAX may have written what another backend reads.
        config = dict(config)
        axis_name = config.pop("axis_name", None)
        layer = super().from_config(config)
        layer.axis_name = checked_axis_name(axis_name)
        return layer
