"""The layers on JAX."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from experiments.benchmark_candidates import EPSILON
from experiments.benchmark_candidates import MOMENTUM
from experiments.benchmark_candidates import OPERATIONS
from experiments.benchmark_candidates import REPLICAS
from experiments.benchmark_candidates import Candidate
from experiments.benchmark_candidates import has_peer
from experiments.benchmark_candidates import keras_layer_classes
from experiments.benchmark_candidates import keras_setups
from experiments.benchmark_candidates import policy_of


def candidates(inputs, gradient, dtype) -> list[Candidate]:
    x = jnp.asarray(inputs, dtype)
    dy = jnp.asarray(gradient, dtype)

    def operations(
        apply, parameters, statistics, names=OPERATIONS, mask=None
    ) -> dict:
        """Jits `(parameters, statistics, x, training[, mask])` -> pair."""
        masks = () if mask is None else (jnp.asarray(mask),)

        @jax.jit
        def inference(parameters, statistics, x):
            return apply(parameters, statistics, x, False)[0]

        @jax.jit
        def forward(parameters, statistics, x):
            return apply(parameters, statistics, x, True)

        @jax.jit
        def forward_backward(parameters, statistics, x, dy, *masks):
            y, pullback, updated = jax.vjp(
                lambda parameters, x: apply(
                    parameters, statistics, x, True, *masks
                ),
                parameters,
                x,
                has_aux=True,
            )
            return y, updated, pullback(dy)

        state = (parameters, statistics, x)
        wait = jax.block_until_ready
        calls = {
            "inference": lambda: wait(inference(*state)),
            "forward": lambda: wait(forward(*state)),
            "forward_backward": lambda: wait(
                forward_backward(*state, dy, *masks)
            ),
        }
        return {name: calls[name] for name in names}

    def keras_operations(layer, names, mask) -> dict:
        layer.build(x.shape)

        def apply(parameters, statistics, x, training, mask=None):
            return layer.stateless_call(
                parameters, statistics, x, training=training, mask=mask
            )

        return operations(
            apply,
            [variable.value for variable in layer.trainable_variables],
            [variable.value for variable in layer.non_trainable_variables],
            names,
            mask,
        )

    def synchronized_operations() -> dict:
        """Inside `shard_map`; Keras's layer does not synchronize there."""
        layer = keras_layer_classes()["keras_bn"](
            dtype=policy_of(dtype), synchronized=True
        )
        layer.build(x.shape)
        mesh = jax.sharding.Mesh(jax.devices()[:REPLICAS], ("replica",))
        same, split = PartitionSpec(), PartitionSpec("replica")

        def train(parameters, statistics, x, dy):
            y, pullback, updated = jax.vjp(
                lambda parameters, x: layer.stateless_call(
                    parameters, statistics, x, training=True
                ),
                parameters,
                x,
                has_aux=True,
            )
            return y, updated, pullback(dy)

        forward_backward = jax.jit(
            jax.shard_map(
                train,
                mesh=mesh,
                in_specs=(same, same, split, split),
                out_specs=(split, same, (same, split)),
            )
        )
        weights = [
            [variable.value for variable in variables]
            for variables in (
                layer.trainable_variables,
                layer.non_trainable_variables,
            )
        ]
        arguments = jax.device_put(
            [*weights, x, dy],
            [NamedSharding(mesh, spec) for spec in (same, same, split, split)],
        )
        return {
            "forward_backward": lambda: jax.block_until_ready(
                forward_backward(*arguments)
            )
        }

    def flax_operations() -> dict:
        from flax import linen

        module = linen.BatchNorm(
            momentum=MOMENTUM, epsilon=EPSILON, dtype=dtype
        )
        variables = module.init(jax.random.key(0), x, use_running_average=False)

        def apply(parameters, statistics, x, training):
            y, updated = module.apply(
                {"params": parameters, "batch_stats": statistics},
                x,
                use_running_average=not training,
                mutable=["batch_stats"],
            )
            return y, updated["batch_stats"]

        return operations(apply, variables["params"], variables["batch_stats"])

    found = [
        Candidate(name, keras_operations(*setup))
        for name, setup in keras_setups(dtype, inputs.shape).items()
    ]
    if len(jax.devices()) >= REPLICAS and len(x) % REPLICAS == 0:
        found.append(Candidate("keras_bn_sync", synchronized_operations()))
    if has_peer("jax"):
        found.append(Candidate("flax", flax_operations()))
    return found
