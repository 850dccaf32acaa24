"""Ragged tensors of TensorFlow, jagged ones of PyTorch, and sparse ones."""

import warnings

import keras
import numpy as np
import pytest

import keras_bn
from tests.keras_bn import frameworks

OURS = keras_bn.BatchNormalization
KERAS = keras.layers.BatchNormalization

if frameworks.IS_TENSORFLOW:
    import tensorflow as tf
elif frameworks.IS_TORCH:
    import torch


def _values(*shape, seed=0):
    generator = np.random.default_rng(seed)
    return generator.normal(1.0, 2.0, shape).astype("float32")


# Where the rows of a ragged tensor end, by the outermost axis first. TensorFlow
# has any number of ragged axes, PyTorch one.
SPLITS = {"rows": [[0, 3, 3, 7]]}
if frameworks.IS_TENSORFLOW:
    SPLITS["rows of rows"] = [[0, 1, 3], [0, 3, 3, 7]]
    SPLITS["no samples"] = [[0]]


def _ragged(values, splits):
    values = frameworks.tensor(values)
    if frameworks.IS_TENSORFLOW:
        splits = [tf.constant(s, tf.int64) for s in splits]
        return tf.RaggedTensor.from_nested_row_splits(values, splits)
    return torch.nested.nested_tensor_from_jagged(
        values, torch.tensor(splits[0])
    )


def _rows(ragged):
    if frameworks.IS_TENSORFLOW:
        return ragged.flat_values
    return ragged.values()


def _kept(ragged):
    """A mask of the same rows, and which are kept."""
    if frameworks.IS_TENSORFLOW:
        mask = tf.ragged.map_flat_values(lambda x: x[:, 0] > 0.5, ragged)
        return mask, mask.flat_values.numpy()
    mask = (ragged > 0.5)[..., :1]
    return mask, mask.values().detach().numpy()[:, 0]


def _built(layer_class, shape, **kwargs):
    layer = layer_class(momentum=0.5, **kwargs)
    layer.build(shape)
    for seed, weight in enumerate(layer.trainable_variables, 1):
        weight.assign(_values(*weight.shape, seed=seed))
    return layer


def _step(layer, rows, splits, gradient, training=True, mask=None):
    """Outputs, the gradients of rows and weights, and the statistics."""
    if frameworks.IS_TENSORFLOW:
        rows = tf.constant(rows)
        with tf.GradientTape() as tape:
            tape.watch(rows)
            inputs = _ragged(rows, splits)
            outputs = layer(inputs, training=training, mask=mask)
        gradients = tape.gradient(
            outputs.flat_values,
            [rows, *(w.value for w in layer.trainable_variables)],
            gradient,
        )
        assert isinstance(outputs, tf.RaggedTensor)
        for ours, theirs in zip(
            outputs.nested_row_splits, inputs.nested_row_splits, strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
    else:
        rows = torch.tensor(rows).requires_grad_()
        inputs = _ragged(rows, splits)
        outputs = layer(inputs, training=training, mask=mask)
        gradients = torch.autograd.grad(
            outputs.values(),
            [rows, *(w.value for w in layer.trainable_variables)],
            torch.tensor(gradient),
        )
        assert outputs.layout is torch.jagged
        assert outputs.shape == inputs.shape
    return [
        frameworks.array(x)
        for x in (
            _rows(outputs),
            *gradients,
            *(v.value for v in layer.non_trainable_variables),
        )
    ]


def _assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, 2e-5, 2e-5)


if not frameworks.IS_JAX:

    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("splits", SPLITS)
    @pytest.mark.parametrize(
        "inner, kwargs",
        [
            ((4,), {}),
            ((5, 4), {}),
            ((5, 4), {"axis": 0}),
            ((4,), {"renorm": True}),
            ((4,), {"synchronized": True}),
        ],
        ids=str,
    )
    def test_all_rows_are_one_batch(inner, kwargs, splits, training):
        """As Keras's layer normalizes the dense tensor of all rows."""
        splits = SPLITS[splits]
        rows = _values(splits[-1][-1], *inner)
        gradient = _values(*rows.shape, seed=9)
        shape = [None] * (len(splits) + 1) + list(inner)
        axis = {}
        if "axis" in kwargs:
            # Counted within a row.
            axis = {"axis": kwargs["axis"] + 1 + len(splits)}
        found = _step(
            _built(OURS, shape, **kwargs | axis),
            rows,
            splits,
            gradient,
            training,
        )
        if not len(rows):
            right = _built(OURS, shape, **kwargs | axis)
            statistics = [w.numpy() for w in right.non_trainable_variables]
            _assert_same(found[-len(statistics) :], statistics)
            return
        if "axis" in kwargs:
            axis = {"axis": kwargs["axis"] + 1}
        # Keras has it on TensorFlow alone, and there is one replica.
        others = {n: v for n, v in kwargs.items() if n != "synchronized"}
        right = _built(KERAS, rows.shape, **others | axis)
        step = frameworks.training_step(
            right, frameworks.tensor(rows), gradient, training=training
        )
        _assert_same(
            found,
            [
                step.outputs,
                step.input_gradient,
                *step.weight_gradients.values(),
                *step.statistics.values(),
            ],
        )

    def test_as_with_keras_layer():
        """Which takes ragged tensors, without gradients on PyTorch."""
        outputs = []
        for layer_class in (OURS, KERAS):
            layer = _built(layer_class, (None, None, 4))
            inputs = _ragged(_values(7, 4), SPLITS["rows"])
            for training in (True, False):
                result = layer(inputs, training=training)
                outputs.append(frameworks.array(_rows(result)))
        _assert_same(outputs[:2], outputs[2:])

    def test_a_mask():
        rows, gradient = _values(7, 4), _values(7, 4, seed=9)
        mask, kept = _kept(_ragged(rows, SPLITS["rows"]))
        assert 0 < kept.sum() < 7
        layer = _built(OURS, (None, None, 4))
        found = _step(layer, rows, SPLITS["rows"], gradient, mask=mask)
        dense = frameworks.training_step(
            _built(KERAS, (1, 7, 4)),
            frameworks.tensor(rows[None]),
            gradient[None],
            mask=frameworks.tensor(kept[None], "bool"),
        )
        _assert_same(found[0], dense.outputs[0])
        _assert_same(found[1], dense.input_gradient[0])
        _assert_same(found[2:4], dense.weight_gradients.values())
        _assert_same(found[4:], dense.statistics.values())

    def test_a_mask_that_is_not_ragged():
        inputs = _ragged(_values(7, 4), SPLITS["rows"])
        mask = frameworks.tensor(np.ones((3, 4), bool), "bool")
        with pytest.raises(ValueError, match="must be ragged as the inputs"):
            _built(OURS, (None, None, 4))(inputs, training=True, mask=mask)

    def test_ghost_batches():
        inputs = _ragged(_values(7, 4), SPLITS["rows"])
        layer = _built(OURS, (None, None, 4), virtual_batch_size=2)
        plain = _built(OURS, (None, None, 4))
        _assert_same(
            frameworks.array(_rows(layer(inputs))),
            frameworks.array(_rows(plain(inputs))),
        )
        with pytest.raises(ValueError, match="virtual_batch_size=2 and ragged"):
            layer(inputs, training=True)


if frameworks.IS_TENSORFLOW:

    def test_channels_that_are_ragged():
        inputs = tf.RaggedTensor.from_uniform_row_length(_values(6, 4), 2)
        assert OURS()(inputs, training=True).shape == (3, 2, 4)
        with pytest.raises(ValueError, match="must come after the ragged axes"):
            OURS(axis=1)(inputs, training=True)

    def test_a_mask_with_other_rows():
        inputs = _ragged(_values(7, 4), SPLITS["rows"])
        mask = _ragged(np.ones(7), [[0, 2, 4, 7]]) > 0
        with pytest.raises(tf.errors.InvalidArgumentError):
            OURS()(inputs, training=True, mask=mask)

    @pytest.mark.parametrize("dtype", ["float64", "mixed_bfloat16", "int32"])
    def test_dtypes(dtype):
        outputs, statistics = [], []
        policy = None if dtype == "int32" else dtype
        for layer_class in (OURS, KERAS):
            inputs = _ragged(_values(7, 4), SPLITS["rows"])
            inputs = tf.cast(inputs, dtype.removeprefix("mixed_"))
            layer = layer_class(momentum=0.5, dtype=policy)
            result = layer(inputs, training=True)
            outputs.append(tf.cast(result, "float64").flat_values)
            statistics.append(layer.get_weights())
            assert result.dtype == layer.compute_dtype
        error = 2**-8 if dtype == "mixed_bfloat16" else 2e-6
        np.testing.assert_allclose(*outputs, error, error)
        for ours, theirs in zip(*statistics):
            np.testing.assert_allclose(ours, theirs, 2e-6, 2e-6)

    def test_in_a_function_of_any_raggedness():
        layer, eager = (_built(OURS, (None, None, 4)) for _ in range(2))
        spec = tf.RaggedTensorSpec((None, None, 4), ragged_rank=1)

        @tf.function(input_signature=[spec])
        def step(inputs):
            return layer(inputs, training=True)

        for splits in ([0, 3, 3, 7], [0, 7], [0, 0]):
            inputs = _ragged(_values(splits[-1], 4), [splits])
            _assert_same(
                step(inputs).flat_values,
                eager(inputs, training=True).flat_values,
            )
        _assert_same(layer.get_weights(), eager.get_weights())

    def test_fit_evaluate_and_predict():
        inputs = _ragged(_values(7, 4), SPLITS["rows"])
        targets = _values(3, 1, seed=5)
        found = []
        for layer_class in (OURS, KERAS):
            x = keras.Input((None, 4), ragged=True)
            # A sample without rows has no mean.
            outputs = keras.layers.Lambda(lambda r: tf.reduce_sum(r, 1))(
                layer_class(momentum=0.5)(x)
            )
            outputs = keras.layers.Dense(1, kernel_initializer="ones")(outputs)
            model = keras.Model(x, outputs)
            model.compile(keras.optimizers.SGD(0.01), "mse")
            with warnings.catch_warnings():
                # Of Keras, that a ragged tensor is turned into a data set.
                warnings.simplefilter("ignore")
                model.fit(inputs, targets, epochs=2, shuffle=False, verbose=0)
                loss = model.evaluate(inputs, targets, verbose=0)
                predicted = model.predict(inputs, verbose=0)
            found.append([loss, predicted, *model.get_weights()])
        _assert_same(*found)


if frameworks.IS_TENSORFLOW:

    @pytest.mark.parametrize("layer_class", [OURS, KERAS])
    def test_recalibrate_and_audit_refuse_ragged_data(layer_class):
        """Keras would fill it up with zeros, and they would be counted."""
        x = keras.Input((None, 4), ragged=True)
        model = keras.Model(x, layer_class()(x))
        inputs = _ragged(_values(7, 4), SPLITS["rows"])
        for data in (inputs, tf.data.Dataset.from_tensors(inputs)):
            for function in (keras_bn.recalibrate, keras_bn.audit):
                with pytest.raises(ValueError, match="`data` is ragged"):
                    function(model, data)


def _sparse():
    """Sparse tensors of a kind each, and the call that makes them dense."""
    dense = np.eye(5, 4, dtype="float32")
    if frameworks.IS_TENSORFLOW:
        return [(tf.sparse.from_dense(dense), "tf.sparse.to_dense(x)")]
    if frameworks.IS_JAX:
        from jax.experimental import sparse

        kinds = (sparse.BCOO, sparse.BCSR)
        return [(kind.fromdense(dense), "x.todense()") for kind in kinds]
    dense = torch.tensor(dense)
    return [
        (x, "x.to_dense()") for x in (dense.to_sparse(), dense.to_sparse_csr())
    ]


@pytest.mark.parametrize("training", [False, True])
def test_sparse_tensors_are_refused(training):
    for inputs, call in _sparse():
        with pytest.raises(ValueError) as error:
            _built(OURS, (None, 4))(inputs, training=training)
        message = str(error.value)
        assert "takes no sparse tensor" in message
        assert f"Received: a sparse tensor of shape (5, 4). Give `{call}`" in (
            message
        )


if frameworks.IS_TORCH:

    def test_rows_with_gaps_between_them():
        values = torch.tensor(_values(2, 5, 4))
        starts, lengths = torch.tensor([0, 1]), torch.tensor([3, 2])
        inputs = torch.nested.narrow(
            values, 1, starts, lengths, layout=torch.jagged
        )
        assert inputs.lengths() is not None
        layer, dense = (_built(OURS, (None, None, 4)) for _ in range(2))
        rows = torch.cat([values[0, :3], values[1, 1:3]])
        outputs = layer(inputs, training=True)
        _assert_same(
            outputs.values().detach(),
            dense(rows[None], training=True)[0].detach(),
        )
        _assert_same(layer.get_weights(), dense.get_weights())

    def test_a_nested_tensor_that_is_ragged_elsewhere():
        inputs = _ragged(_values(7, 4), SPLITS["rows"]).transpose(1, 2)
        with pytest.raises(ValueError, match="ragged along axis 1. Received"):
            _built(OURS, (None, 4, None), axis=1)(inputs, training=True)
