"""What is only true, or can only be seen, on PyTorch."""

import keras
import pytest

if keras.backend.backend() != "torch":
    pytest.skip("PyTorch's kernels", allow_module_level=True)

import numpy as np
import torch

import keras_bn
from keras_bn.kernels import reference
from keras_bn.kernels import torch as kernels

SHAPE = (64, 12, 12, 16)


def _inputs(offset=0.0, shape=SHAPE, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (values + offset).to(dtype).requires_grad_()


def _vectors(dtype=torch.float32, channels=SHAPE[-1]):
    gamma = torch.linspace(0.5, 1.5, channels, dtype=dtype)
    beta = torch.linspace(-1.0, 1.0, channels, dtype=dtype)
    return gamma.requires_grad_(), beta.requires_grad_()


def _mask(inputs):
    generator = torch.Generator().manual_seed(8)
    shape = (*inputs.shape[:-1], 1)
    return torch.rand(shape, generator=generator) > 0.3


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("offset", [0.0, 200.0])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_saves_inputs_once_and_vectors(dtype, offset, masked):
    inputs = _inputs(offset, dtype=getattr(torch, dtype))
    gamma, beta = _vectors(torch.promote_types(inputs.dtype, torch.float32))
    mask = _mask(inputs) if masked else None
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kernels.normalize_batch(
            inputs, gamma, beta, axis=3, epsilon=1e-3, mask=mask
        )
    vectors = 4 * gamma.numel() * gamma.element_size()
    allowed = inputs.numel() * inputs.element_size() + vectors
    if masked:
        allowed += mask.numel()
    assert sum(saved.values()) <= allowed


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape, axis", [((9, 4), 1), ((3, 2, 4), 1)])
def test_differentiates_twice(shape, axis, masked):
    inputs = _inputs(2.0, shape, torch.float64)
    gamma, beta = _vectors(torch.float64, shape[axis])
    mask = _mask(inputs) if masked else None

    def outputs(inputs, gamma, beta):
        return kernels.normalize_batch(
            inputs, gamma, beta, axis=axis, epsilon=1e-3, mask=mask
        )[0]

    assert torch.autograd.gradcheck(outputs, (inputs, gamma, beta))
    assert torch.autograd.gradgradcheck(outputs, (inputs, gamma, beta))


def test_normalize_with_differentiates_twice():
    inputs = _inputs(2.0, (9, 4), torch.float64)
    gamma, beta = _vectors(torch.float64, 4)
    mean, variance = torch.ones(4).double(), torch.full((4,), 2.0).double()

    def outputs(inputs, gamma, beta):
        return kernels.normalize_with(
            inputs, mean, variance, gamma, beta, axis=1, epsilon=1e-3
        )

    assert torch.autograd.gradcheck(outputs, (inputs, gamma, beta))
    assert torch.autograd.gradgradcheck(outputs, (inputs, gamma, beta))


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x.permute(0, 3, 1, 2),
        lambda x: x.transpose(0, 2),
        lambda x: x[:, ::2],
        lambda x: x[:1].expand(4, -1, -1, -1),
    ],
    ids=["contiguous", "channels_last", "transposed", "sliced", "expanded"],
)
def test_any_layout(view, axis):
    inputs = view(_inputs(3.0, (6, 8, 5, 7)).detach())
    outputs, mean, variance, _ = kernels.normalize_batch(
        inputs, None, None, axis=axis, epsilon=1e-3
    )
    expected = reference.normalize_batch(
        inputs.numpy(), None, None, axis=axis, epsilon=1e-3
    )
    np.testing.assert_allclose(outputs, expected[0], atol=1e-5)
    np.testing.assert_allclose(mean, expected[1], rtol=1e-5)
    np.testing.assert_allclose(variance, expected[2], rtol=1e-5)


def test_outputs_have_the_layout_of_the_inputs():
    inputs = _inputs().detach().permute(0, 3, 1, 2)
    outputs, *_ = kernels.normalize_batch(
        inputs, None, None, axis=1, epsilon=1e-3
    )
    assert outputs.stride() == inputs.stride()


@pytest.mark.parametrize("shape", [(131072, 4), (64, 4, 2048)])
@pytest.mark.parametrize("deviations", [0.0, 30.0, 100.0, 1e3, 1e4, -1e4])
def test_large_means(deviations, shape):
    inputs = _inputs(deviations, shape).detach()
    mean, variance, _ = kernels.batch_moments(inputs, axis=1)
    expected = reference.batch_moments(inputs.numpy(), axis=1)
    ulp = np.spacing(np.abs(expected[0]).max().astype(np.float32))
    np.testing.assert_allclose(mean, expected[0], atol=4 * ulp + 1e-5)
    np.testing.assert_allclose(variance, expected[1], rtol=2e-6)


def test_one_far_channel_among_others():
    inputs = _inputs(0.0, (4096, 3)).detach()
    inputs[:, 1] += 1e4
    inputs[:, 2] = torch.nan
    mean, variance, _ = kernels.batch_moments(inputs, axis=1)
    expected = reference.batch_moments(inputs.numpy(), axis=1)
    np.testing.assert_allclose(mean, expected[0], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(variance, expected[1], rtol=2e-6)


def test_sums_of_equal_gradients_do_not_drift():
    inputs = _inputs(0.0, (131072, 4))
    _, beta = _vectors(channels=4)
    outputs, *_ = kernels.normalize_batch(
        inputs, None, beta, axis=1, epsilon=1e-3
    )
    gradient = torch.full_like(outputs, 0.1)
    (beta_gradient,) = torch.autograd.grad(outputs, beta, gradient)
    expected = gradient.double().sum(0)
    np.testing.assert_allclose(beta_gradient, expected, rtol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_compiles_to_one_graph(masked):
    inputs = _inputs(20.0)
    gamma, beta = _vectors()
    mask = _mask(inputs) if masked else None

    def step(inputs, gamma, beta):
        outputs, mean, variance, _ = kernels.normalize_batch(
            inputs, gamma, beta, axis=3, epsilon=1e-3, mask=mask
        )
        again = kernels.normalize_with(
            inputs, mean, variance, gamma, beta, axis=3, epsilon=1e-3
        )
        return outputs + 2.0 * again

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    results = []
    for function in (step, compiled):
        outputs = function(inputs, gamma, beta)
        loss = (outputs**3).sum()
        gradients = torch.autograd.grad(loss, (inputs, gamma, beta))
        results.append([outputs.detach(), *gradients])
    for eager, traced in zip(*results):
        scale = eager.abs().max().item()
        np.testing.assert_allclose(traced, eager, atol=1e-4 * scale)


def test_meta_tensors():
    inputs = torch.empty(4, 5, 6, device="meta")
    gamma = torch.empty(6, device="meta")
    outputs, mean, variance, count = kernels.normalize_batch(
        inputs, gamma, gamma, axis=2, epsilon=1e-3
    )
    assert outputs.shape == inputs.shape
    assert mean.shape == variance.shape == (6,)
    outputs = kernels.normalize_with(
        inputs, mean, variance, gamma, gamma, axis=2, epsilon=1e-3
    )
    assert outputs.shape == inputs.shape


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_masked_out_values_poison_nothing(bad):
    inputs = _inputs(1.0)
    mask = _mask(inputs)
    gamma, beta = _vectors()
    kept = mask.expand_as(inputs)
    gradient = torch.ones(SHAPE).where(kept, 0.0)
    results = []
    for value in (0.0, bad):
        values = inputs.detach().where(kept, value).requires_grad_()
        outputs, mean, variance, _ = kernels.normalize_batch(
            values, gamma, beta, axis=3, epsilon=1e-3, mask=mask
        )
        gradients = torch.autograd.grad(
            outputs, (values, gamma, beta), gradient
        )
        results.append((mean, variance, *gradients))
    for zeros, others in zip(*results):
        torch.testing.assert_close(others, zeros)


def test_constants_get_gradients():
    inputs = _inputs(2.0, (9, 4), torch.float64)
    gamma, beta = _vectors(torch.float64, 4)
    mean = torch.linspace(0.0, 1.0, 4, dtype=torch.float64).requires_grad_()
    variance = torch.linspace(1.0, 2.0, 4, dtype=torch.float64)
    variance.requires_grad_()

    def outputs(inputs, mean, variance, gamma, beta):
        return kernels.normalize_with(
            inputs, mean, variance, gamma, beta, axis=1, epsilon=1e-3
        )

    vectors = (mean, variance, gamma, beta)
    assert torch.autograd.gradcheck(outputs, (inputs, *vectors))


@pytest.mark.parametrize("shape", [(2048, 3), (4, 3, 64)])
def test_autocast_leaves_the_moments_alone(shape):
    inputs = _inputs(2.0, shape).detach()
    moments = kernels.batch_moments(inputs, axis=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = kernels.batch_moments(inputs, axis=1)
    for ours, expected in zip(cast, moments):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(2048, 3), (4, 3, 64)])
class TestTransforms:
    """What PyTorch's transforms and tracers make of the kernels."""

    def functions(self, shape, training):
        gamma, beta = (v.detach() for v in _vectors(channels=3))

        def outputs(inputs, gamma=gamma):
            if training:
                return kernels.normalize_batch(
                    inputs, gamma, beta, axis=1, epsilon=1e-3
                )[0]
            return kernels.normalize_with(
                inputs, beta, gamma, gamma, beta, axis=1, epsilon=1e-3
            )

        inputs = _inputs(2.0, shape).detach()
        return outputs, inputs, gamma

    def test_reverse_mode(self, shape, training):
        outputs, inputs, gamma = self.functions(shape, training)
        inputs.requires_grad_()
        gamma.requires_grad_()
        expected = torch.autograd.grad(
            (outputs(inputs, gamma) ** 3).sum(), (inputs, gamma)
        )
        found = torch.func.grad(
            lambda x, g: (outputs(x, g) ** 3).sum(), argnums=(0, 1)
        )(inputs.detach(), gamma.detach())
        for ours, theirs in zip(found, expected):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)

    def test_forward_mode(self, shape, training):
        outputs, inputs, _ = self.functions(shape, training)
        tangent = _inputs(0.0, shape).detach().flip(0)
        _, found = torch.func.jvp(outputs, (inputs,), (tangent,))
        gradient = _inputs(0.0, shape).detach().flip(-1)
        inputs.requires_grad_()
        (pulled,) = torch.autograd.grad(outputs(inputs), inputs, gradient)
        expected = (pulled * tangent).double().sum()
        found = (found * gradient).double().sum()
        scale = pulled.double().norm() * tangent.double().norm()
        assert abs(found - expected) <= 1e-5 * scale
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(inputs.detach(), tangent)
            again = torch.autograd.forward_ad.unpack_dual(outputs(dual))
        found = (again.tangent * gradient).double().sum()
        assert abs(found - expected) <= 1e-5 * scale

    def test_vmap(self, shape, training):
        outputs, inputs, _ = self.functions(shape, training)
        stack = torch.stack([inputs, inputs.flip(0) + 1.0])
        expected = torch.stack([outputs(x) for x in stack])
        torch.testing.assert_close(torch.func.vmap(outputs)(stack), expected)

    def test_batched_gradients(self, shape, training):
        outputs, inputs, _ = self.functions(shape, training)
        inputs.requires_grad_()
        y = outputs(inputs)
        gradients = _inputs(0.0, (2, *shape)).detach()
        expected = [
            torch.autograd.grad(y, inputs, g, retain_graph=True)[0]
            for g in gradients
        ]
        (found,) = torch.autograd.grad(
            y, inputs, gradients, is_grads_batched=True
        )
        torch.testing.assert_close(found, torch.stack(expected))

    def test_trace(self, shape, training, tmp_path):
        outputs, inputs, _ = self.functions(shape, training)
        with torch.no_grad():
            traced = torch.jit.trace(outputs, inputs)
        torch.jit.save(traced, str(tmp_path / "traced.pt"))
        loaded = torch.jit.load(str(tmp_path / "traced.pt"))
        torch.testing.assert_close(loaded(inputs), outputs(inputs))

    def test_export_with_an_unknown_batch(self, shape, training):
        outputs, inputs, _ = self.functions(shape, training)

        class Module(torch.nn.Module):
            def forward(self, inputs):
                return outputs(inputs)

        batch = torch.export.Dim("batch", min=2, max=10000)
        exported = torch.export.export(
            Module(), (inputs,), dynamic_shapes=({0: batch},)
        ).module()
        for some in (inputs, inputs[:3]):
            torch.testing.assert_close(exported(some), outputs(some))


@pytest.mark.parametrize("momentum", [0.3, None])
def test_moving_statistics_as_in_pytorch(momentum):
    theirs = torch.nn.BatchNorm2d(3, momentum=momentum)
    ours = keras_bn.BatchNormalization(
        axis=1,
        momentum=None if momentum is None else 1 - momentum,
        unbiased_variance=True,
        epsilon=theirs.eps,
    )
    for size in (8, 2, 5):
        batch = 3.0 * _inputs(1.0, (size, 3, 4, 5)).detach()
        torch.testing.assert_close(ours(batch, training=True), theirs(batch))
    for variable, buffer in (
        (ours.moving_mean, theirs.running_mean),
        (ours.moving_variance, theirs.running_var),
    ):
        torch.testing.assert_close(variable.value, buffer)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"momentum": None},
        {"debias": True},
        {"renorm": True, "renorm_clipping": keras_bn.renorm_schedule()},
    ],
)
def test_no_number_is_handed_to_the_device(arguments, monkeypatch):
    """A GPU's whole queue is waited for where `torch.as_tensor` does it."""
    monkeypatch.setattr(kernels, "_is_eager_on_cpu", lambda tensor: False)
    layer = keras_bn.BatchNormalization(**arguments)
    layer.build(SHAPE)
    handed_over = []

    def watched(name):
        function = getattr(torch, name)

        def call(value, *args, **kwargs):
            if not isinstance(value, torch.Tensor):
                handed_over.append(value)
            return function(value, *args, **kwargs)

        monkeypatch.setattr(torch, name, call)

    for name in ("as_tensor", "tensor", "scalar_tensor"):
        watched(name)
    keras.ops.convert_to_tensor(1.0)
    assert handed_over.pop() == 1.0
    layer(_inputs(), training=True).square().sum().backward()
    assert not handed_over
