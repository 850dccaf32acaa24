"""Trains a layer on replicas, in processes that have their devices.

`train` is what tests call. This module is also the program of the processes it
starts: `python -m tests.keras_bn.replicas FOLDER RANK`.
"""

import atexit
import dataclasses
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np

import keras_bn
from experiments.two_workers import free_ports
from keras_bn import kernels
from tests.waiting import LIMIT

ROOT = Path(__file__).parents[2]
BACKEND = keras.backend.backend()
LEARNING_RATE = 0.01


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer, and what its replicas train on.

    Attributes:
        kwargs: the layer's arguments.
        sizes: samples of each replica.
        shape: of a sample, the last axis that of channels.
        masked: whether a mask leaves out positions.
        nothing: replicas of which it leaves out all.
        far: mean of the inputs, whose deviation is about 2.
        dtype: the layer's dtype policy.
        steps: of gradient descent on gamma and beta.
    """

    kwargs: dict
    sizes: tuple
    shape: tuple = (6, 5)
    masked: bool = False
    nothing: tuple = ()
    far: float = 0.0
    dtype: str = "float32"
    steps: int = 10

    def layer(self, **kwargs):
        layer = keras_bn.BatchNormalization(
            dtype=self.dtype, **{**self.kwargs, **kwargs}
        )
        layer.build((None, *self.shape))
        for seed, weight in enumerate((layer.gamma, layer.beta)):
            generator = np.random.default_rng(seed)
            weight.assign(generator.uniform(0.5, 2.0, weight.shape))
        return layer

    def rows(self, replica):
        """The samples of a replica; None: of all."""
        if replica is None:
            return slice(None)
        start = sum(self.sizes[:replica])
        return slice(start, start + self.sizes[replica])

    def batch(self, replica=None):
        """`(steps, samples, ...)`: inputs, output gradients, and masks."""
        generator = np.random.default_rng(0)
        shape = self.steps, sum(self.sizes), *self.shape
        # Replicas that differ: their moments must not be mixed up.
        inputs = generator.normal(self.far, 2.0, shape)
        inputs += np.arange(shape[1]).reshape(-1, 1, 1) / shape[1]
        output_gradient = generator.normal(size=shape)
        mask = np.ones(shape[:-1], bool)
        if self.masked:
            mask = generator.random(shape[:-1]) < 0.6
        for empty in self.nothing:
            mask[:, self.rows(empty)] = False
        rows = self.rows(replica)
        return [
            x[:, rows].astype(dtype)
            for x, dtype in (
                (inputs, "float32"),
                (output_gradient, "float32"),
                (mask, "bool"),
            )
        ]

    def given(self, mask):
        """The call's arguments beside the inputs."""
        masked = self.masked or self.nothing
        return {"training": True, "mask": mask if masked else None}


@dataclasses.dataclass
class Trained:
    """What training came to.

    Attributes:
        outputs, input_gradients: `(steps, samples, ...)`.
        weights: all weights in the end.
        collectives: how many sums over replicas the layer takes part in, in a
            step; 0 for one device.
    """

    outputs: np.ndarray
    input_gradients: np.ndarray
    weights: list
    collectives: int = 0


def train(cases, replicas, folder, processes=1):
    """Trains every case on replicas, and on one device.

    Args:
        cases: list of pairs: a `Case`, and arguments for the layer on
            replicas alone.
        replicas: how many there are; one in each process, or all in one.
        folder: for the files by which processes talk.
        processes: 1 or `replicas`; PyTorch always has one for each.

    Returns:
        For each case the `Trained` of one device, and the list of those of
        replicas.
    """
    if BACKEND == "torch":
        processes = replicas
    (folder / "cases").write_bytes(pickle.dumps((cases, replicas, processes)))
    run([__name__, str(folder)], processes, replicas)
    results = [
        pickle.loads((folder / f"result-{rank}").read_bytes())
        for rank in range(processes)
    ]
    return [
        (whole, sum((of_rank[i][1] for of_rank in results), []))
        for i, (whole, _) in enumerate(results[0])
    ]


def run(program, processes, replicas):
    """Runs a program in processes that train together.

    Args:
        program: a module and its arguments; the rank comes after them. The
            address at which processes meet is $COORDINATOR, on TensorFlow
            they have $TF_CONFIG.
        processes: how many.
        replicas: how many in all of them; where there are several processes,
            each has one.
    """
    ports = free_ports(processes)
    running = []
    for rank in range(processes):
        devices = 1 if processes > 1 else replicas
        environment = {
            **os.environ,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "COORDINATOR": f"127.0.0.1:{ports[0]}",
        }
        if BACKEND == "tensorflow" and processes > 1:
            workers = [f"127.0.0.1:{port}" for port in ports]
            environment["TF_CONFIG"] = json.dumps(
                {
                    "cluster": {"worker": workers},
                    "task": {"type": "worker", "index": rank},
                }
            )
        running.append(
            subprocess.Popen(
                [sys.executable, "-m", *program, str(rank)],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        said = [process.communicate(timeout=LIMIT)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    failed = [s for s, p in zip(said, running) if p.returncode]
    assert not failed, failed[0]


def count_collectives(compiled):
    """How many there are in a program that JAX compiled."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute"
    return len(re.findall(rf"({kinds})(-start)?\(", compiled.as_text()))


def _counted(owner, name):
    """A list that each call of the function of that name is added to."""
    function = getattr(owner, name)
    function = getattr(function, "counted", function)
    calls = []

    def counted(*args, **kwargs):
        calls.append(name)
        return function(*args, **kwargs)

    counted.counted = function
    setattr(owner, name, counted)
    return calls


def _on_tensorflow(cases, replicas, processes, rank):
    import tensorflow as tf

    if processes > 1:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    else:
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0],
            [tf.config.LogicalDeviceConfiguration()] * replicas,
        )
        strategy = tf.distribute.MirroredStrategy(
            [f"CPU:{i}" for i in range(replicas)]
        )

    def steps(case, layer):
        def step(inputs, output_gradient, mask):
            weights = [layer.gamma.value, layer.beta.value]
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                outputs = tf.cast(
                    layer(inputs, **case.given(mask)), tf.float32
                )
            of_inputs, *gradients = tape.gradient(
                outputs, [inputs, *weights], output_gradient
            )
            context = tf.distribute.get_replica_context()
            if context is not None and context.num_replicas_in_sync > 1:
                gradients = context.all_reduce("SUM", gradients)
            for weight, gradient in zip(weights, gradients):
                weight.assign_sub(LEARNING_RATE * gradient)
            return outputs, of_inputs

        return step

    def whole(case):
        layer = case.layer()
        step = tf.function(steps(case, layer))
        results = [step(*map(tf.constant, b)) for b in zip(*case.batch())]
        outputs, gradients = zip(*results)
        return Trained(
            np.stack(outputs), np.stack(gradients), layer.get_weights()
        )

    def on_replicas(case, **kwargs):
        with strategy.scope():
            layer = case.layer(**kwargs)
        mine = range(replicas) if processes == 1 else [rank]
        batches = [case.batch(replica) for replica in mine]
        # The graph is for any number of samples, as with a dataset's batches.
        step = tf.function(
            lambda *batch: strategy.run(steps(case, layer), batch),
            reduce_retracing=True,
        )
        sums = _counted(kernels.tensorflow.replicas.Replicas, "total")
        values = strategy.experimental_distribute_values_from_function
        local = strategy.experimental_local_results
        results, collectives = [], None
        for i in range(case.steps):
            of_step = [
                values(
                    lambda context, k=k: tf.constant(
                        batches[
                            context.replica_id_in_sync_group - mine[0]
                        ][k][i]
                    )
                )
                for k in range(3)
            ]
            results.append([local(r) for r in step(*of_step)])
            if collectives is None:
                # As many as are put into the graph.
                collectives = len(sums) // len(mine)
        weights = [local(w.value) for w in layer.weights]
        return [
            Trained(
                *(
                    np.stack([of_step[k][n] for of_step in results])
                    for k in range(2)
                ),
                [np.asarray(w[n]) for w in weights],
                collectives,
            )
            for n in range(len(mine))
        ]

    return whole, on_replicas


def _on_jax(cases, replicas, processes, rank):
    import jax
    import jax.numpy as jnp

    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            os.environ["COORDINATOR"], processes, rank
        )
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("replica",))
    split = jax.sharding.PartitionSpec(None, "replica")
    same = jax.sharding.PartitionSpec()

    def train(case, layer, sums_itself=True):
        def run(trained, state, inputs, output_gradient, mask):
            outputs, state = layer.stateless_call(
                trained, state, inputs, **case.given(mask)
            )
            outputs = outputs.astype("float32")
            return jnp.sum(outputs * output_gradient), (outputs, state)

        def step(weights, batch):
            trained, state = weights
            (_, (outputs, state)), (gradients, of_inputs) = jax.value_and_grad(
                run, (0, 2), has_aux=True
            )(trained, state, *batch)
            if not sums_itself:
                gradients = jax.lax.psum(gradients, "replica")
            trained = [
                w - LEARNING_RATE * g for w, g in zip(trained, gradients)
            ]
            return (trained, state), (outputs, of_inputs)

        return lambda weights, batch: jax.lax.scan(step, weights, batch)

    def weights_of(layer):
        return tuple(
            [v.value for v in variables]
            for variables in (
                layer.trainable_variables,
                layer.non_trainable_variables,
            )
        )

    def trained(layer, weights, results, collectives=0):
        kinds = layer.trainable_variables, layer.non_trainable_variables
        by_id = {
            id(variable): np.asarray(value)
            for variables, values in zip(kinds, weights)
            for variable, value in zip(variables, values)
        }
        outputs, gradients = map(np.asarray, results)
        weights = [by_id[id(w)] for w in layer.weights]
        return Trained(outputs, gradients, weights, collectives)

    def whole(case):
        layer = case.layer()
        run = jax.jit(train(case, layer))
        return trained(layer, *run(weights_of(layer), case.batch()))

    def on_replicas(case, **kwargs):
        kwargs = dict(kwargs)
        checked = kwargs.pop("check_vma", True)
        layer = case.layer(**kwargs)
        run = jax.jit(
            jax.shard_map(
                train(case, layer, sums_itself=checked),
                mesh=mesh,
                in_specs=(same, split),
                out_specs=(same, split),
                check_vma=checked,
            )
        )
        sharding = jax.sharding.NamedSharding(mesh, split)
        batch = [
            jax.make_array_from_callback(x.shape, sharding, x.__getitem__)
            for x in case.batch()
        ]
        weights = jax.tree.map(np.asarray, weights_of(layer))
        compiled = run.lower(weights, batch).compile()
        collectives = count_collectives(compiled)
        weights, results = compiled(weights, batch)
        found = []
        for i in range(len(results[0].addressable_shards)):

            def of_device(x, i=i):
                return x.addressable_shards[i].data

            weights_here, results_here = jax.tree.map(
                of_device, (weights, results)
            )
            found.append(
                trained(layer, weights_here, results_here, collectives)
            )
        return found

    return whole, on_replicas


def _on_torch(cases, replicas, processes, rank):
    import datetime

    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"tcp://{os.environ['COORDINATOR']}",
        rank=rank,
        world_size=processes,
        timeout=datetime.timedelta(seconds=LIMIT),
    )

    class Parallel(torch.nn.Module):
        """The layer in training, as `DistributedDataParallel` calls it."""

        def __init__(self, case, layer):
            super().__init__()
            self.case, self.layer = case, layer

        def forward(self, inputs, mask):
            return self.layer(inputs, **self.case.given(mask))

    def train(case, layer, replica):
        module = Parallel(case, layer)
        if replica is not None:
            module = torch.nn.parallel.DistributedDataParallel(module)
        outputs, gradients = [], []
        sums = _counted(torch.distributed, "all_reduce")
        for inputs, output_gradient, mask in zip(*case.batch(replica)):
            inputs = torch.tensor(inputs, requires_grad=True)
            result = module(inputs, torch.tensor(mask)).float()
            weights = [layer.gamma.value, layer.beta.value]
            for weight in weights:
                weight.grad = None
            result.backward(torch.tensor(output_gradient))
            with torch.no_grad():
                for weight in weights:
                    # DistributedDataParallel takes the mean.
                    scale = 1 if replica is None else processes
                    weight -= LEARNING_RATE * scale * weight.grad
            outputs.append(result.detach().numpy())
            gradients.append(inputs.grad.numpy())
        return Trained(
            np.stack(outputs),
            np.stack(gradients),
            layer.get_weights(),
            # Beside the comparison of sizes in the first step.
            len(sums) // case.steps,
        )

    def whole(case):
        return train(case, case.layer(), None)

    def on_replicas(case, **kwargs):
        return [train(case, case.layer(**kwargs), rank)]

    # Left to Python's end, its threads may abort the process.
    atexit.register(torch.distributed.destroy_process_group)
    return whole, on_replicas


def main(folder, rank):
    """Trains what `train` left in the folder, and leaves the results there."""
    folder = Path(folder)
    cases, replicas, processes = pickle.loads((folder / "cases").read_bytes())
    on_backend = {
        "tensorflow": _on_tensorflow,
        "jax": _on_jax,
        "torch": _on_torch,
    }[BACKEND]
    whole, on_replicas = on_backend(cases, replicas, processes, rank)
    results = []
    for case, kwargs in cases:
        one = whole(case) if rank == 0 else None
        results.append((one, on_replicas(case, **kwargs)))
    (folder / f"result-{rank}").write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    # What is pickled belongs to the module that tests import.
    from tests.keras_bn import replicas

    replicas.main(sys.argv[1], int(sys.argv[2]))
