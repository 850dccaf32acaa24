"""What PyTorch's own tools do to a model that holds the layer."""

import copy
import subprocess
import sys

import keras
import numpy as np
import pytest
import torch

import keras_bn
from tests.waiting import LIMIT

OURS = keras_bn.BatchNormalization
KERAS = keras.layers.BatchNormalization


class _Subclassed(keras.Model):
    """Built in a call; one layer is no module of it, being in a list."""

    def __init__(self, layer):
        super().__init__(name="subclassed")
        self.dense = keras.layers.Dense(3, name="dense")
        self.norms = [layer(name="first")]
        self.last = layer(name="last")

    def call(self, inputs, training=None):
        outputs = self.norms[0](self.dense(inputs), training=training)
        return self.last(outputs, training=training)


class _InTorch(torch.nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.parts = torch.nn.ModuleList(parts)

    def forward(self, inputs, training=None):
        for part in self.parts:
            ours = isinstance(part, keras.layers.Layer)
            inputs = part(inputs, training=training) if ours else part(inputs)
        return inputs


# All are named: the names are parts of the keys in `state_dict`.


def _functional(layer, name="functional"):
    inputs = keras.Input((4,))
    outputs = keras.layers.Dense(3, name=f"{name}_dense")(inputs)
    outputs = layer(name=f"{name}_norm")(outputs)
    return keras.Model(inputs, outputs, name=name)


def _sequential(layer):
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(3, name="dense"),
            layer(name="norm"),
        ],
        name="sequential",
    )


def _nested(layer):
    inputs = keras.Input((4,))
    outputs = _functional(layer, "inner")(layer(name="outer_norm")(inputs))
    return keras.Model(inputs, outputs, name="nested")


def _called(model):
    model(torch.ones(2, 4))
    return model


MODELS = {
    "functional": _functional,
    "sequential": _sequential,
    "nested": _nested,
    "subclassed": lambda layer: _called(_Subclassed(layer)),
    "layer in a module": lambda layer: _called(
        _InTorch(torch.nn.Linear(4, 3), layer(name="norm"))
    ),
    "model in a module": lambda layer: _called(
        _InTorch(torch.nn.Linear(4, 4), _functional(layer))
    ),
}
STATISTICS = {
    "moving_mean",
    "moving_variance",
    "moving_stddev",
    "num_batches_tracked",
    "renorm_mean",
    "renorm_stddev",
    "renorm_step",
}
EVERY_STATISTIC = {
    "renorm": True,
    "momentum": None,
    "renorm_clipping": keras_bn.renorm_schedule(begin=0),
}


def _everything(**kwargs):
    return OURS(**EVERY_STATISTIC, **kwargs)


def _build(name, layer=OURS):
    return MODELS[name](layer)


def _inputs(seed=0, count=8):
    generator = np.random.default_rng(seed)
    return torch.tensor(generator.normal(2.0, 3.0, (count, 4))).float()


def _trained(name, layer=OURS):
    model = _build(name, layer)
    for seed in range(3):
        model(_inputs(seed), training=True)
    return model


def _layers(model):
    """The layers of ours in a model, whoever holds them."""
    found = []
    for module in model.modules():
        if isinstance(module, keras.layers.Layer):
            found += module._flatten_layers()
    return list({id(x): x for x in found if isinstance(x, OURS)}.values())


def _statistics(model):
    return [
        v
        for layer in _layers(model)
        for v in layer.weights
        if v.name in STATISTICS
    ]


def _assert_one_storage(model):
    """Buffers are what Keras's variables hold, and nothing is twice there."""
    buffers = {id(x) for x in model.buffers()}
    assert buffers == {id(v.value) for v in _statistics(model)}
    assert not buffers & {id(x) for x in model.parameters()}
    pointers = {x.data_ptr() for x in model.buffers()}
    for key, value in model.state_dict().items():
        is_statistic = key.rpartition("/")[2] in STATISTICS
        assert (value.data_ptr() in pointers) == is_statistic, key


@pytest.mark.parametrize("name", MODELS)
def test_statistics_are_buffers(name):
    model = _build(name, _everything)
    names = [key.rpartition("/")[2] for key, _ in model.named_buffers()]
    assert sorted(names) == sorted([*STATISTICS] * len(_layers(model)))
    _assert_one_storage(model)


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_is_that_of_kerass_layer(name):
    theirs, ours = _trained(name, KERAS), _build(name)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    _assert_one_storage(ours)
    np.testing.assert_allclose(
        ours(_inputs()).detach(),
        theirs(_inputs()).detach(),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_state_dict_into_a_new_model(name, assign, tmp_path):
    model, other = _trained(name, _everything), _build(name, _everything)
    torch.save(model.state_dict(), tmp_path / "state")
    state = torch.load(tmp_path / "state")
    parts = other
    if assign and isinstance(other, _InTorch):
        # What is Keras's; the rest is PyTorch's own.
        parts = torch.nn.ModuleList(other.parts[1:])
        state = {
            key.replace("parts.1", "0", 1): value
            for key, value in state.items()
            if not key.startswith("parts.0")
        }
        other.parts[0] = model.parts[0]
    parts.load_state_dict(state, assign=assign)
    _assert_one_storage(other)
    for found, right in zip(_statistics(other), _statistics(model)):
        assert torch.equal(found.value, right.value)
    assert torch.equal(other(_inputs(9)), model(_inputs(9)))


@pytest.mark.parametrize("name", MODELS)
def test_buffers_follow_training_and_assignment(name):
    model = _trained(name, _everything)
    _assert_one_storage(model)
    for layer in _layers(model):
        layer.set_weights([w + 1 for w in layer.get_weights()])
        layer.moving_mean.assign(layer.moving_mean + 1.0)
        keras_bn.reset_statistics(layer)
    _assert_one_storage(model)
    for buffer, variable in zip(model.buffers(), _statistics(model)):
        buffer.fill_(3)
        assert (keras.ops.convert_to_numpy(variable) == 3).all()


CHANGES = [
    lambda model: model.double(),
    lambda model: model.to(torch.bfloat16),
    lambda model: model.float()(_inputs(5), training=True),
    lambda model: model.share_memory(),
    lambda model: model.train().eval().requires_grad_(False),
    lambda model: model.to_empty(device="cpu"),
]


@pytest.mark.parametrize("name", MODELS)
def test_buffers_follow_what_modules_do(name):
    model = _trained(name, _everything)
    for change in CHANGES:
        change(model)
        _assert_one_storage(model)


def test_dtypes_of_buffers_follow():
    model = _trained("sequential", _everything).double()
    kept = {v.name: v.value.dtype for v in _statistics(model)}
    assert kept.pop("num_batches_tracked") == torch.int32
    assert kept.pop("renorm_step") == torch.int32
    assert set(kept.values()) == {torch.float64}


@pytest.mark.parametrize("name", ["functional", "sequential", "nested"])
def test_copies_of_models(name, tmp_path):
    model = _trained(name, _everything)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = _build(name, _everything)
    loaded.load_weights(tmp_path / "model.weights.h5")
    copies = [
        loaded,
        copy.deepcopy(model),
        keras.models.load_model(tmp_path / "model.keras"),
    ]
    for other in copies:
        _assert_one_storage(other)
        pairs = list(zip(_statistics(other), _statistics(model), strict=True))
        assert all(torch.equal(a.value, b.value) for a, b in pairs)
        assert not any(a.value is b.value for a, b in pairs)


def test_a_copied_layer_in_a_module():
    model = _trained("layer in a module")
    other = copy.deepcopy(model)
    _assert_one_storage(other)
    other(_inputs(7), training=True)
    assert not torch.equal(*(_statistics(m)[0].value for m in (model, other)))


def test_torch_compile():
    models = [_trained("functional") for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    compiled = torch.compile(models[1], backend="eager")
    for seed in (5, 6):
        for run in (models[0], compiled):
            run(_inputs(seed), training=True)
    _assert_one_storage(models[1])
    for a, b in zip(*(m.state_dict().values() for m in models)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_optimizers_of_torch_do_not_get_them():
    model = _build("sequential")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    held = [x for group in optimizer.param_groups for x in group["params"]]
    assert {id(x) for x in held} == {
        id(v.value) for v in model.trainable_variables
    }


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_models_are_as_with_torchs_layer(use_buffers):
    theirs = torch.nn.Sequential(torch.nn.BatchNorm1d(4))
    layer = OURS(momentum=0.9, epsilon=1e-5, unbiased_variance=True)
    ours = keras.Sequential([keras.Input((4,)), layer])
    averaged = [
        torch.optim.swa_utils.AveragedModel(m, use_buffers=use_buffers)
        for m in (theirs, ours)
    ]
    for seed in range(3):
        theirs(_inputs(seed))
        ours(_inputs(seed), training=True)
        for average, model in zip(averaged, (theirs, ours)):
            average.update_parameters(model)
    right, found = averaged[0].module[0], _statistics(averaged[1])
    names = [v.name for v in found]
    assert names == ["moving_mean", "moving_variance"]
    for a, b in zip(found, (right.running_mean, right.running_var)):
        np.testing.assert_allclose(a.value, b, rtol=1e-5)


# Refusals.


REFUSED = {
    "update_bn": (
        lambda model: torch.optim.swa_utils.update_bn([_inputs()], model),
        RuntimeError,
        r"update_bn.*reset_statistics\(model\).*training=True",
    ),
    "convert_sync_batchnorm": (
        torch.nn.SyncBatchNorm.convert_sync_batchnorm,
        AttributeError,
        "convert_sync_batchnorm.*synchronized=True",
    ),
    "replace_all_batch_norm_modules_": (
        torch.func.replace_all_batch_norm_modules_,
        AttributeError,
        "replace_all_batch_norm.*update_moving_statistics = False",
    ),
}


def _assert_refused(model):
    for use, error, sentence in REFUSED.values():
        with pytest.raises(error, match=sentence) as raised:
            use(model)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", MODELS)
def test_refusals(name):
    model = _trained(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    _assert_refused(model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_refusals_of_copies_and_of_what_is_not_built():
    _assert_refused(copy.deepcopy(_trained("nested")))
    _assert_refused(_InTorch(torch.nn.Linear(4, 3), OURS()))
    _assert_refused(torch.nn.Sequential(OURS()))


def test_what_update_bn_would_do():
    """By the calls that the error names, against PyTorch's layer."""
    theirs = torch.nn.Sequential(torch.nn.BatchNorm1d(4))
    layer = OURS(momentum=None, epsilon=1e-5, unbiased_variance=True)
    ours = keras.Sequential([keras.Input((4,)), layer])
    loader = [_inputs(seed) for seed in range(4)]
    theirs(_inputs(8))
    ours(_inputs(8), training=True)
    torch.optim.swa_utils.update_bn(loader, theirs)
    keras_bn.reset_statistics(ours)
    for x in loader:
        ours(x, training=True)
    for found, right in (
        (layer.moving_mean, theirs[0].running_mean),
        (layer.moving_variance, theirs[0].running_var),
    ):
        np.testing.assert_allclose(found.value, right, rtol=1e-5)


def test_models_without_our_layer_are_as_before():
    model = _InTorch(torch.nn.BatchNorm1d(4), _build("functional", KERAS))
    assert not list(model.parts[1].buffers())
    assert type(model.parts[1]._torch_params) is torch.nn.ParameterDict
    torch.optim.swa_utils.update_bn([_inputs(), _inputs(1)], model)
    assert model.parts[0].num_batches_tracked == 2
    converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(converted.parts[0], torch.nn.SyncBatchNorm)


# DistributedDataParallel.

SETUPS = [
    (name, synchronized, broadcast)
    for name in ("sequential", "layer in a module")
    for synchronized in (False, True)
    for broadcast in (False, True)
]


def _on_rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    results = [_under_ddp(rank, *setup) for setup in SETUPS]
    torch.save(results, folder / f"rank-{rank}")
    gradient = _broadcast_before_backward(rank)
    torch.save(gradient, folder / f"gradient-{rank}")
    torch.distributed.destroy_process_group()


def _under_ddp(rank, name, synchronized, broadcast):
    """The statistics at each stage, and the state in the end."""
    keras.utils.set_random_seed(rank)
    model = _build(
        name, lambda **kwargs: OURS(synchronized=synchronized, **kwargs)
    )
    stages = []

    def set_apart():
        for variable in _statistics(model):
            variable.assign(variable + 1.0 + rank)

    def note():
        stages.append([v.value.clone() for v in _statistics(model)])

    set_apart()
    note()
    arguments = {} if broadcast else {"broadcast_buffers": False}
    parallel = torch.nn.parallel.DistributedDataParallel(model, **arguments)
    note()
    set_apart()
    parallel(_inputs(rank))
    note()
    if not broadcast:
        for variable in _statistics(model):
            variable.assign(variable - 2.0 * rank)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        outputs = parallel(_inputs(2 * step + rank, 6 + rank), training=True)
        (outputs**2).sum().backward()
        optimizer.step()
    return stages, model.state_dict()


def _broadcast_before_backward(rank):
    """The gradient of inputs that statistics normalized which changed since.

    The second forward pass gives this rank the statistics of rank 0.
    """
    layer = OURS(
        epsilon=0.0, use_moving_statistics=True, update_moving_statistics=False
    )
    model = keras.Sequential([keras.Input((4,)), layer])
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    layer.moving_variance.assign([4.0] * 4)
    inputs = _inputs(rank).requires_grad_()
    outputs = parallel(inputs, training=True)
    if rank == 0:
        layer.moving_variance.assign([9.0] * 4)
    others = parallel(_inputs(2 + rank), training=True)
    (outputs.sum() + others.sum()).backward()
    assert layer.moving_variance.value.tolist() == [9.0] * 4
    return inputs.grad


@pytest.fixture(scope="module")
def ddp_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    torch.multiprocessing.spawn(_on_rank, args=(folder,), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def of_ranks(ddp_folder):
    ranks = [torch.load(ddp_folder / f"rank-{rank}") for rank in (0, 1)]
    return dict(zip(SETUPS, zip(*ranks)))


def _agree(of_rank):
    return all(torch.equal(a, b) for a, b in zip(*of_rank))


@pytest.mark.parametrize("setup", SETUPS)
def test_distributed_data_parallel(of_ranks, setup):
    (stages, state), (others, other_state) = of_ranks[setup]
    _, synchronized, broadcast = setup
    apart, built, forward = zip(stages, others)
    assert not _agree(apart)
    # By PyTorch's rule, for its own layer too.
    assert _agree(built) == _agree(forward) == broadcast
    assert all(map(torch.equal, built[0], apart[0]))
    assert set(state) == set(other_state)
    for key, value in state.items():
        agree = synchronized or broadcast or "/moving_" not in key
        assert torch.equal(value, other_state[key]) == agree, key
    assert any(key.endswith("moving_mean") for key in state)


@pytest.mark.parametrize("rank", [0, 1])
def test_statistics_that_are_broadcast_before_the_backward_pass(
    ddp_folder, rank
):
    gradient = torch.load(ddp_folder / f"gradient-{rank}")
    # 1 / sqrt(variance), of what the forward pass had.
    np.testing.assert_array_equal(gradient, np.full((8, 4), 0.5))


def test_broadcasting_changes_nothing_that_agrees(of_ranks):
    for name in ("sequential", "layer in a module"):
        state, without = (of_ranks[name, True, b][0][1] for b in (True, False))
        for key, value in state.items():
            assert torch.equal(value, without[key])


IN_TWO_PROCESSES = """
import sys
import torch
import keras_bn

folder, rank = sys.argv[1], int(sys.argv[2])
synchronized = sys.argv[3] == "True"
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
)
"""
JOINED = (
    IN_TWO_PROCESSES
    + """
layer = keras_bn.BatchNormalization(momentum=0.0, synchronized=synchronized)
layer.build((None, 3))
model = torch.nn.Sequential(torch.nn.Linear(3, 3), layer)
model.forward = lambda x: layer(model[0](x), training=True)
parallel = torch.nn.parallel.DistributedDataParallel(model)
try:
    with parallel.join():
        for _ in range(3 - 2 * rank):
            parallel(torch.randn(4, 3)).sum().backward()
    print(layer.moving_mean.numpy().tolist())
except ValueError as error:
    print(str(error).splitlines()[2])
"""
)
# Each process is a group of its own.
CHECKPOINTED = (
    IN_TWO_PROCESSES
    + """
groups = [torch.distributed.new_group([i]) for i in range(2)]
layer = keras_bn.BatchNormalization(synchronized=synchronized)
layer.build((None, 3))
called = lambda x: torch.tanh(layer(x, training=True))
model = torch.nn.Sequential(torch.nn.Linear(3, 3), layer)
model.forward = lambda x: torch.utils.checkpoint.checkpoint(
    called, x, use_reentrant=False
)
parallel = torch.nn.parallel.DistributedDataParallel(
    model, process_group=groups[rank], find_unused_parameters=True
)
torch.manual_seed(rank)
gradients = []
inputs, output_gradient = torch.randn(4, 3) + rank, torch.randn(4, 3)
for function in (parallel, called):
    leaf = inputs.clone().requires_grad_()
    if function is called:
        layer.synchronized = False
    function(leaf).backward(output_gradient)
    gradients.append(leaf.grad)
print(torch.equal(*gradients))
"""
)


def _in_two_processes(program, folder, synchronized):
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program, folder, str(rank), synchronized],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    return [process.communicate(timeout=LIMIT)[0] for process in running]


def test_joined_processes_train_as_with_torchs_layer(tmp_path):
    """The statistics in the end are those of the process that went on."""
    first, second = _in_two_processes(JOINED, tmp_path, "False")
    assert first == second and "[0.0, 0.0, 0.0]" not in first


def test_joined_processes_are_not_synchronized(tmp_path):
    for said in _in_two_processes(JOINED, tmp_path, "True"):
        assert "does not work under DistributedDataParallel.join" in said


def test_checkpointing_in_a_group_of_ones_own(tmp_path):
    """The recomputation, outside of DDP, meets the same replicas."""
    for said in _in_two_processes(CHECKPOINTED, tmp_path, "True"):
        assert said == "True\n"
