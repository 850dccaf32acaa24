"""Flax's batch normalization, and the settings that mean the same."""

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.keras_bn import coming_from
from tests.keras_bn import frameworks

HERE = "BatchNormalization(epsilon=1e-5)"
LINEN = [
    ("flax.linen.BatchNorm()", HERE),
    (
        "flax.linen.BatchNorm(axis=(1, 3))",
        "BatchNormalization(axis=(1, 3), epsilon=1e-5)",
    ),
    (
        "flax.linen.BatchNorm(use_scale=False, use_bias=False)",
        "BatchNormalization(epsilon=1e-5, scale=False, center=False)",
    ),
    ("flax.linen.BatchNorm(use_fast_variance=False)", HERE),
]
SHORT = (
    "flax.linen.BatchNorm(dtype=jnp.bfloat16)",
    'BatchNormalization(epsilon=1e-5, dtype="mixed_bfloat16")',
)
NNX = ("flax.nnx.BatchNorm(C, rngs=rngs)", HERE)
SYNCHRONIZED = (
    'flax.linen.BatchNorm(axis_name="devices")',
    'BatchNormalization(epsilon=1e-5, synchronized=True, axis_name="devices")',
)
SHAPE = (4, 5, 2, 3)


class Linen:
    def __init__(self, module, shape):
        self.module = module
        variables = module.init(
            jax.random.key(0), jnp.zeros(shape), use_running_average=False
        )
        self.params = variables.get("params", {})
        self.statistics = variables["batch_stats"]
        # Once for all steps: it compiles.
        self._vjp = jax.jit(self._of_batch)

    def apply(self, params, statistics, batch, mask=None):
        return self.module.apply(
            {"params": params, "batch_stats": statistics},
            batch,
            use_running_average=False,
            mask=mask,
            mutable=["batch_stats"],
        )

    def _of_batch(self, params, statistics, batch, output_gradient, mask):
        outputs, vjp, state = jax.vjp(
            lambda params, batch: self.apply(params, statistics, batch, mask),
            params,
            batch,
            has_aux=True,
        )
        gradients = vjp(output_gradient.astype(outputs.dtype))
        return outputs, gradients, state["batch_stats"]

    def step(self, batch, output_gradient, mask=None):
        batch = jnp.asarray(batch, self.module.dtype)
        outputs, (of_params, of_batch), self.statistics = self._vjp(
            self.params, self.statistics, batch, output_gradient, mask
        )
        self.params = jax.tree.map(
            lambda p, g: p - coming_from.LEARNING_RATE * g,
            self.params,
            of_params,
        )
        return outputs, of_batch, _present(of_params, "scale", "bias")

    def infer(self, batch):
        return self.module.apply(
            {"params": self.params, "batch_stats": self.statistics},
            jnp.asarray(batch, self.module.dtype),
            use_running_average=True,
        )

    def weights(self):
        return _present(self.params, "scale", "bias") + _present(
            self.statistics, "mean", "var"
        )


class Nnx:
    def __init__(self, module):
        self.module = module

    def step(self, batch, output_gradient, mask=None):
        self.module.train()
        graph, params, statistics = flax.nnx.split(
            self.module, flax.nnx.Param, ...
        )

        def apply(params, batch):
            module = flax.nnx.merge(graph, params, statistics, copy=True)
            return module(batch, mask=mask), flax.nnx.state(
                module, flax.nnx.BatchStat
            )

        outputs, vjp, state = jax.vjp(
            apply, params, jnp.asarray(batch), has_aux=True
        )
        of_params, of_batch = vjp(jnp.asarray(output_gradient))
        params = jax.tree.map(
            lambda p, g: p - coming_from.LEARNING_RATE * g, params, of_params
        )
        flax.nnx.update(self.module, params, state)
        of_params = flax.nnx.to_pure_dict(of_params)
        return outputs, of_batch, _present(of_params, "scale", "bias")

    def infer(self, batch):
        self.module.eval()
        return self.module(jnp.asarray(batch))

    def weights(self):
        module = self.module
        weights = (module.scale, module.bias, module.mean, module.var)
        return [np.asarray(w[...]) for w in weights]


def _present(tree, *names):
    return [np.asarray(tree[name]) for name in names if name in tree]


def _linen(there, here, shape=SHAPE):
    module = eval(there, {"flax": flax, "jnp": jnp})
    return Linen(module, shape), coming_from.ours(here)


def test_the_table_has_these_rows_and_no_others():
    rows = coming_from.rows("flax.")
    assert rows == {*LINEN, SHORT, NNX, SYNCHRONIZED}


@pytest.mark.parametrize("there, here", LINEN)
def test_linen(there, here):
    coming_from.check(*_linen(there, here), SHAPE)


def test_short_floats():
    coming_from.check(*_linen(*SHORT), SHAPE, tolerance=0.02)


def test_nnx():
    there, here = NNX
    module = eval(
        there, {"flax": flax, "C": SHAPE[-1], "rngs": flax.nnx.Rngs(0)}
    )
    coming_from.check(Nnx(module), coming_from.ours(here), SHAPE)


def test_axis_name():
    """Both on two devices, in one `shard_map` each."""
    theirs, ours = _linen(*SYNCHRONIZED)
    ours.build(SHAPE)
    mesh = jax.sharding.Mesh(jax.devices()[:2], "devices")
    whole, split = jax.P(), jax.P("devices")
    batch, output_gradient = (coming_from.values(SHAPE, i) for i in range(2))

    def run(function, weights, statistics):
        function = jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(whole, whole, split),
            out_specs=(split, whole),
        )

        @jax.jit
        def both(weights, batch):
            outputs, vjp, state = jax.vjp(
                lambda weights, batch: function(weights, statistics, batch),
                weights,
                batch,
                has_aux=True,
            )
            return outputs, vjp(jnp.asarray(output_gradient)), state

        return both(weights, batch)

    outputs, (of_params, of_batch), state = run(
        theirs.apply, theirs.params, theirs.statistics
    )
    found, (of_weights, of_inputs), statistics = run(
        lambda *given: ours.stateless_call(*given, training=True),
        [v.value for v in ours.trainable_variables],
        [v.value for v in ours.non_trainable_variables],
    )
    coming_from.close(found, outputs, "outputs")
    coming_from.close(of_inputs, of_batch, "gradient of inputs")
    of_params = _present(of_params, "scale", "bias")
    state = _present(state["batch_stats"], "mean", "var")
    for one, other in zip(
        [*of_weights, *statistics], [*of_params, *state], strict=True
    ):
        coming_from.close(one, other, "gradients and statistics")


@pytest.mark.parametrize("axis", [(0, 1), (0, 1, 2, 3)])
def test_masks(axis):
    """Of the inputs' rank: for positions, and for every value."""
    sizes = [n if i in axis else 1 for i, n in enumerate(SHAPE)]
    mask = np.random.default_rng(0).random(sizes) < 0.6
    coming_from.check(*_linen(*LINEN[0]), SHAPE, mask)


def test_a_channel_that_is_masked_everywhere():
    """Theirs is NaN from then on; ours keeps its moving statistics."""
    theirs, ours = _linen(*LINEN[0])
    mask = np.arange(SHAPE[-1]).reshape(1, 1, 1, -1) > 0
    batch = coming_from.values(SHAPE, 0)
    theirs.step(batch, batch, mask)
    assert np.isnan(theirs.statistics["mean"][0])
    step = frameworks.training_step(
        ours, frameworks.tensor(batch), mask=frameworks.tensor(mask, "bool")
    )
    assert step.statistics["moving_mean"][0] == 0.0
    assert step.statistics["moving_variance"][0] == 1.0


def test_a_large_mean():
    """Flax's default loses the digits of the variance that ours keeps."""
    batch = coming_from.values(SHAPE, 0) + np.float32(1e4)
    (fast, ours), (exact, _) = (_linen(*LINEN[i]) for i in (0, 3))
    found = frameworks.training_step(ours, frameworks.tensor(batch)).outputs
    coming_from.close(found, exact.step(batch, batch)[0], "outputs", 1e-3)
    assert np.abs(found - fast.step(batch, batch)[0]).max() > 0.1


def test_debiased_statistics():
    """As optax.ema, and so Haiku's and Sonnet's moving averages."""
    ours = coming_from.ours("BatchNormalization(momentum=0.9, debias=True)")
    average = optax.ema(0.9, debias=True)
    state = average.init((jnp.zeros(3), jnp.zeros(3)))
    for seed in range(3):
        batch = coming_from.values(SHAPE, seed)
        statistics = frameworks.training_step(
            ours, frameworks.tensor(batch)
        ).statistics
        moments = batch.mean((0, 1, 2)), batch.var((0, 1, 2))
        (mean, variance), state = average.update(moments, state)
        coming_from.close(statistics["moving_mean"], mean, "mean", 1e-5)
        coming_from.close(
            statistics["moving_variance"], variance, "variance", 1e-5
        )
