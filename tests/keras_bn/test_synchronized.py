"""Replicas, synchronized, against one device that has the whole batch.

Those that are not are held against Keras's layer on each one's share.
"""

import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_bn
from tests.keras_bn import replicas
from tests.keras_bn.replicas import BACKEND
from tests.keras_bn.replicas import Case
from tests.waiting import LIMIT

KINDS = {
    "exponential": {"momentum": 0.8},
    "cumulative": {"momentum": None},
    "debiased": {"momentum": 0.8, "debias": True},
    "unbiased": {"momentum": 0.8, "unbiased_variance": True},
}
CLIPPING = {"rmax": 1.5, "rmin": 0.5, "dmax": 0.5}
VARIANTS = {
    "plain": ({}, False),
    "masked": ({}, True),
    "renormalized": ({"renorm": True, "renorm_clipping": CLIPPING}, False),
    "masked renormalized": ({"renorm": True}, True),
    "ghost batches": ({"virtual_batch_size": 2}, False),
    "masked ghost batches": ({"virtual_batch_size": 2}, True),
}


def _case(variant, kind, sizes, **more):
    arguments, masked = VARIANTS[variant]
    return Case({**arguments, **KINDS[kind]}, sizes, masked=masked, **more)


def _synchronized(cases):
    arguments = {"synchronized": True}
    return {name: (case, arguments) for name, case in cases.items()}


def _cases_for_two():
    cases = {}
    kinds = list(KINDS)
    for number, variant in enumerate(VARIANTS):
        for kind in (kinds[number % 4], kinds[(number + 1) % 4]):
            cases[f"{variant}, {kind}"] = _case(variant, kind, (4, 4))
        case = _case(variant, kind, (4, 4), dtype="mixed_bfloat16", steps=3)
        cases[f"{variant}, bfloat16"] = case
    for variant in ("plain", "masked"):
        cases[f"{variant}, far"] = _case(
            variant, "unbiased", (4, 4), far=2e4, shape=(40, 5)
        )
        cases[f"{variant}, one of them empty"] = _case(
            variant, "cumulative", (4, 4), nothing=(1,)
        )
    if BACKEND != "jax":
        # JAX has shards of one size only.
        for sizes in ((5, 2), (1, 0)):
            for variant in ("plain", "renormalized"):
                name = f"{variant}, {sizes[0]} and {sizes[1]} samples"
                cases[name] = _case(variant, "debiased", sizes)
    return _synchronized(cases)


def _unsynchronized():
    """Those whose replicas normalize on their own."""
    sizes = (4, 4) if BACKEND == "jax" else (5, 2)
    return {
        "apart": (_case("plain", "exponential", sizes, steps=3), {}),
        "apart, masked": (_case("masked", "exponential", sizes, steps=3), {}),
        "apart, one of them empty": (
            _case("masked", "exponential", (4, 4), nothing=(0,), steps=3),
            {},
        ),
        "apart, counting": (_case("plain", "cumulative", sizes, steps=3), {}),
    }


def _cases_for_four():
    cases = {
        "plain": _case("plain", "unbiased", (2,) * 4),
        "masked": _case("masked", "cumulative", (2,) * 4),
        "far": _case("plain", "debiased", (2,) * 4, far=2e4, shape=(40, 5)),
    }
    if BACKEND != "jax":
        cases["uneven"] = _case("plain", "unbiased", (3, 0, 2, 1))
    return _synchronized(cases)


def _cases_for_processes():
    return {
        variant: (_case(variant, "unbiased", (4, 4)), {"synchronized": True})
        for variant in ("plain", "masked")
    }


def _cases_that_jax_does_not_check():
    unchecked = {"synchronized": True, "check_vma": False}
    return {
        variant: (_case(variant, "unbiased", (4, 4)), unchecked)
        for variant in ("plain", "masked renormalized", "ghost batches")
    }


GROUPS = {
    "two": (2, 1, _cases_for_two() | _unsynchronized()),
    "four": (4, 1, _cases_for_four()),
}
if BACKEND != "torch":
    # There each replica is a process anyway.
    GROUPS["two processes"] = (2, 2, _cases_for_processes())
if BACKEND == "jax":
    unchecked = _cases_that_jax_does_not_check()
    GROUPS["two, unchecked"] = (2, 1, unchecked)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Each group's results, found by the first test that asks for them."""
    results = {}

    def of(group, name):
        number, processes, cases = GROUPS[group]
        if group not in results:
            folder = tmp_path_factory.mktemp("replicas")
            found = replicas.train(
                list(cases.values()), number, folder, processes
            )
            results[group] = dict(zip(cases, found))
        return cases[name][0], *results[group][name]

    return of


@pytest.mark.parametrize(
    "group, name",
    [
        (group, name)
        for group, (_, _, cases) in GROUPS.items()
        for name, (_, arguments) in cases.items()
        if arguments
    ],
)
def test_replicas_train_as_one_device(trained, group, name):
    case, whole, of_replicas = trained(group, name)
    # In the inputs' own rounding; short floats are rounded once more.
    unit = 1e-5 + 1e-7 * case.far
    coarse = 1e-2 if case.dtype == "mixed_bfloat16" else unit

    def close(found, right, unit):
        scale = max(1.0, np.abs(right).max(initial=0.0))
        np.testing.assert_allclose(found, right, 0, unit * scale, err_msg=name)

    for field in ("outputs", "input_gradients"):
        shards = [getattr(replica, field) for replica in of_replicas]
        close(np.concatenate(shards, 1), getattr(whole, field), coarse)
    for replica in of_replicas:
        for found, right in zip(replica.weights, whole.weights, strict=True):
            close(found, right, coarse)
        for found, first in zip(replica.weights, of_replicas[0].weights):
            np.testing.assert_array_equal(found, first)
    if "ghost" not in name and "unchecked" not in group:
        assert {replica.collectives for replica in of_replicas} == {2}


@pytest.mark.parametrize("name", _unsynchronized())
def test_replicas_apart_share_their_statistics(trained, name):
    """Each step's mean of what they came to, weighted by their positions."""
    case, _, of_replicas = trained("two", name)
    counting = case.kwargs["momentum"] is None
    statistics = [np.zeros(5), np.ones(5)]
    for step in range(case.steps):
        momentum = step / (step + 1) if counting else case.kwargs["momentum"]
        counts, values = [], []
        for replica in range(2):
            inputs, _, mask = (x[step] for x in case.batch(replica))
            counts.append(mask.sum())
            if mask.sum():
                layer = keras.layers.BatchNormalization(momentum=momentum)
                layer.build(inputs.shape)
                layer.moving_mean.assign(statistics[0])
                layer.moving_variance.assign(statistics[1])
                layer(inputs, **case.given(mask))
                moving = layer.moving_mean, layer.moving_variance
                values.append([np.array(v.numpy()) for v in moving])
        shares = [count for count in counts if count]
        statistics = np.average(values, axis=0, weights=shares)
    for replica in of_replicas:
        mean, variance, *batches = replica.weights[2:]
        np.testing.assert_allclose(mean, statistics[0], 1e-5, 1e-6)
        np.testing.assert_allclose(variance, statistics[1], 1e-5, 1e-6)
        for counter in batches:
            np.testing.assert_array_equal(counter, [case.steps] * 5)
        for found, first in zip(replica.weights, of_replicas[0].weights):
            np.testing.assert_array_equal(found, first)


if BACKEND == "jax":
    import jax

    def _fitted(layer, values):
        inputs = keras.Input(values.shape[1:])
        model = keras.Model(inputs, layer(inputs))
        model.compile(keras.optimizers.SGD(0.1), "mse")
        model.fit(values, values * 2, batch_size=8, shuffle=False, verbose=0)
        return model

    @pytest.fixture
    def data_parallel():
        keras.distribution.set_distribution(
            keras.distribution.DataParallel(
                devices=keras.distribution.list_devices()[:2]
            )
        )
        yield
        keras.distribution.set_distribution(None)

    @pytest.mark.parametrize(
        "arguments",
        [{}, {"renorm": True}, {"virtual_batch_size": 2}],
        ids=str,
    )
    def test_data_parallel_fits_as_one_device(arguments, request):
        values = np.random.default_rng(0).normal(9.0, 2.0, (16, 6, 5))
        values = values.astype("float32")
        weights = []
        for _ in range(2):
            layer = keras_bn.BatchNormalization(momentum=0.5, **arguments)
            weights.append(_fitted(layer, values).get_weights())
            if len(weights) == 1:
                request.getfixturevalue("data_parallel")
        for found, right in zip(*weights):
            np.testing.assert_allclose(found, right, 1e-5, 1e-6)

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.usefixtures("data_parallel")
    def test_data_parallel_has_one_collective_each_way(masked):
        distribution = keras.distribution.distribution()
        mesh = distribution.device_mesh.backend_mesh
        split = jax.sharding.NamedSharding(
            mesh, jax.sharding.PartitionSpec(mesh.axis_names[0])
        )
        layer = keras_bn.BatchNormalization()
        layer.build((None, 6, 5))
        weights = [
            [v.value for v in variables]
            for variables in (
                layer.trainable_variables,
                layer.non_trainable_variables,
            )
        ]

        def loss(trained, state, inputs, mask):
            outputs, state = layer.stateless_call(
                trained,
                state,
                inputs,
                training=True,
                mask=mask if masked else None,
            )
            return (outputs**3).sum(), state

        inputs, mask = (
            jax.ShapeDtypeStruct(shape, dtype, sharding=split)
            for shape, dtype in (((8, 6, 5), "float32"), ((8, 6), "bool"))
        )
        step = jax.jit(jax.grad(loss, (0, 2), has_aux=True))
        compiled = step.lower(*weights, inputs, mask).compile()
        assert replicas.count_collectives(compiled) == 2

    def test_an_axis_that_cannot_be_guessed():
        devices = np.array(jax.devices()[:1]).reshape(1, 1)
        mesh = jax.sharding.Mesh(devices, ("a", "b"))
        split = jax.sharding.PartitionSpec("a")

        def call(axis_name):
            layer = keras_bn.BatchNormalization(
                synchronized=True, axis_name=axis_name
            )
            layer.build((None, 3))
            jax.shard_map(
                lambda x: layer(x, training=True),
                mesh=mesh,
                in_specs=split,
                out_specs=split,
            )(np.ones((4, 3), "float32"))

        with pytest.raises(ValueError, match="needs `axis_name`"):
            call(None)
        with pytest.raises(ValueError, match="axis_name='c'"):
            call("c")


if BACKEND == "tensorflow":
    ON_TWO_DEVICES = """
import sys
import numpy as np
import tensorflow as tf

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * 2,
)
import keras
import keras_bn

values = np.random.default_rng(0).normal(3.0, 2.0, (17, 3)).astype("float32")


class InCondition(keras.layers.Layer):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def call(self, inputs, training=None):
        return tf.cond(
            tf.reduce_sum(inputs) > -1e9,
            lambda: self.layer(inputs, training=training),
            lambda: inputs,
        )


def fitted(layer, samples, wrapped):
    layer = layer(momentum=0.5)
    inner = InCondition(layer) if wrapped else layer
    model = keras.Sequential([keras.Input((3,)), inner])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    targets = values[:samples]
    model.fit(targets, targets, batch_size=8, shuffle=False, verbose=0)
    return np.array([layer.moving_mean.numpy(), layer.moving_variance.numpy()])


def ours(**kwargs):
    synchronized = sys.argv[1] == "17"
    return keras_bn.BatchNormalization(synchronized=synchronized, **kwargs)


with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    found = fitted(ours, int(sys.argv[1]), wrapped=sys.argv[1] == "16")
    if sys.argv[1] == "16":
        right = fitted(keras.layers.BatchNormalization, 16, wrapped=True)
if sys.argv[1] == "17":
    right = fitted(keras.layers.BatchNormalization, 17, wrapped=False)
np.testing.assert_allclose(found, right, 1e-5)
"""

    @pytest.mark.parametrize("samples", ["16", "17"])
    def test_on_two_devices_as_keras(samples):
        """16, in a `tf.cond`: alone on each, as Keras's layer there. 17: one
        device is left without any, and the layer is Keras's on one."""
        subprocess.run(
            [sys.executable, "-c", ON_TWO_DEVICES, samples],
            check=True,
            cwd=replicas.ROOT,
            timeout=LIMIT,
        )


if BACKEND == "torch":
    # One replica has other channels, or leaves before the others are done.
    UNEQUAL = """
import datetime, sys
import torch
import keras_bn

folder, rank, differs = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "channels"
inputs = torch.ones(4, 3 + rank if differs else 3)
layer = keras_bn.BatchNormalization(synchronized=True)
layer.build(inputs.shape)
# Both have come so far before the short time limit begins to count.
store = torch.distributed.FileStore(f"{folder}/store", 2)
store.set(f"here {rank}", "")
store.wait([f"here {1 - rank}"], datetime.timedelta(seconds=float(sys.argv[4])))
torch.distributed.init_process_group(
    "gloo",
    store=store,
    rank=rank,
    world_size=2,
    timeout=datetime.timedelta(seconds=10),
)
try:
    layer(inputs, training=True)
    if rank == 0:
        layer(inputs, training=True)
except (ValueError, RuntimeError) as error:
    print(str(error).splitlines()[2])
"""

    @pytest.mark.parametrize(
        "differs, said",
        [
            ("channels", "Received: [3, 4] channels on replicas 0 to 1."),
            ("steps", "waited in vain for another replica"),
        ],
    )
    def test_replicas_that_do_not_match(differs, said, tmp_path):
        running = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    UNEQUAL,
                    tmp_path,
                    str(rank),
                    differs,
                    str(LIMIT),
                ],
                stdout=subprocess.PIPE,
                text=True,
                cwd=replicas.ROOT,
            )
            for rank in range(2)
        ]
        outputs = [process.communicate(timeout=LIMIT)[0] for process in running]
        assert said in outputs[0]
