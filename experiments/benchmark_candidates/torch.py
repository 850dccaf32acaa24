"""The layers on PyTorch."""

import torch

from experiments.benchmark_candidates import EPSILON
from experiments.benchmark_candidates import MOMENTUM
from experiments.benchmark_candidates import OPERATIONS
from experiments.benchmark_candidates import Candidate
from experiments.benchmark_candidates import keras_setups


def candidates(inputs, gradient, dtype) -> list[Candidate]:
    channels_last = torch.from_numpy(inputs).to(getattr(torch, dtype))
    dy_channels_last = torch.from_numpy(gradient).to(channels_last.dtype)

    def operations(call, x, dy, gamma, beta, names=OPERATIONS) -> dict:
        x = x.detach().requires_grad_()

        def inference():
            with torch.no_grad():
                return call(x, False)

        def forward_backward():
            y = call(x, True)
            return y, torch.autograd.grad(y, [x, gamma, beta], dy)

        calls = {
            "inference": inference,
            "forward": lambda: call(x, True),
            "forward_backward": forward_backward,
        }
        return {name: calls[name] for name in names}

    def keras_operations(layer, names, mask) -> dict:
        layer.build(tuple(inputs.shape))
        masks = {} if mask is None else {"mask": torch.from_numpy(mask)}
        return operations(
            lambda x, training: layer(x, training=training, **masks),
            channels_last,
            dy_channels_last,
            layer.gamma.value,
            layer.beta.value,
            names,
        )

    def torch_operations() -> dict:
        # Channels second in the shape, last in memory: PyTorch's
        # channels-last format, a view of the same tensor.
        rank = inputs.ndim
        layer_class = {
            2: torch.nn.BatchNorm1d,
            3: torch.nn.BatchNorm1d,
            4: torch.nn.BatchNorm2d,
            5: torch.nn.BatchNorm3d,
        }[rank]
        layer = layer_class(
            inputs.shape[-1], eps=EPSILON, momentum=1 - MOMENTUM
        )

        def call(x, training):
            return layer.train(training)(x)

        return operations(
            call,
            channels_last.movedim(-1, 1),
            dy_channels_last.movedim(-1, 1),
            layer.weight,
            layer.bias,
        )

    found = [
        Candidate(name, keras_operations(*setup))
        for name, setup in keras_setups(dtype, inputs.shape).items()
    ]
    found.append(Candidate("torch", torch_operations()))
    return found
