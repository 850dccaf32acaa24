"""PyTorch's batch normalization, and the settings that mean the same."""

import numpy as np
import pytest
import torch

from tests.keras_bn import coming_from
from tests.keras_bn import frameworks
from tests.keras_bn import replicas

BASIC = "BatchNormalization(axis=1, momentum=0.9, epsilon=1e-5, "
CASES = [
    ("torch.nn.BatchNorm2d(C)", BASIC + "unbiased_variance=True)"),
    (
        "torch.nn.BatchNorm2d(C, affine=False)",
        BASIC + "unbiased_variance=True, center=False, scale=False)",
    ),
    (
        "torch.nn.BatchNorm2d(C, momentum=None)",
        "BatchNormalization(axis=1, momentum=None, epsilon=1e-5, "
        "unbiased_variance=True)",
    ),
]
UNTRACKED = (
    "torch.nn.BatchNorm2d(C, track_running_stats=False)",
    "BatchNormalization(axis=1, epsilon=1e-5, use_moving_statistics=False)",
)
SYNCHRONIZED = (
    "torch.nn.SyncBatchNorm(C)",
    BASIC + "unbiased_variance=True, synchronized=True)",
)
SHAPES = {1: (4, 3, 5), 2: (4, 3, 5, 2), 3: (2, 3, 2, 5, 2)}


class PyTorch:
    def __init__(self, module):
        self.module = module

    def step(
        self,
        batch,
        output_gradient,
        mask=None,
        learning_rate=coming_from.LEARNING_RATE,
    ):
        batch = torch.tensor(batch).requires_grad_()
        weights = list(self.module.parameters())
        self.module.train()
        outputs = self.module(batch)
        of_batch, *of_weights = torch.autograd.grad(
            outputs, [batch, *weights], torch.tensor(output_gradient)
        )
        with torch.no_grad():
            for weight, gradient in zip(weights, of_weights):
                weight -= learning_rate * gradient
        return outputs.detach(), of_batch, of_weights

    def infer(self, batch):
        self.module.eval()
        return self.module(torch.tensor(batch)).detach()

    def weights(self):
        module = self.module
        weights = [module.running_mean, module.running_var]
        if module.affine:
            weights = [module.weight, module.bias, *weights]
        weights = [w.detach().numpy() for w in weights]
        if module.momentum is None:
            seen = int(module.num_batches_tracked)
            weights.append(np.full(module.num_features, seen))
        return weights


def test_the_table_has_these_rows_and_no_others():
    assert coming_from.rows("torch.") == {*CASES, UNTRACKED, SYNCHRONIZED}


@pytest.mark.parametrize("rank", SHAPES)
@pytest.mark.parametrize("there, here", CASES)
def test_the_settings_of_the_table(there, here, rank):
    there = there.replace("BatchNorm2d", f"BatchNorm{rank}d")
    module = eval(there, {"torch": torch, "C": 3})
    coming_from.check(PyTorch(module), coming_from.ours(here), SHAPES[rank])


def test_rows_of_channels():
    """`BatchNorm1d` takes rank 2 as well."""
    module = torch.nn.BatchNorm1d(3)
    coming_from.check(PyTorch(module), coming_from.ours(CASES[0][1]), (6, 3))


def test_no_running_statistics():
    """The batch's moments, in evaluation too."""
    there, here = UNTRACKED
    theirs = PyTorch(eval(there, {"torch": torch, "C": 3}))
    ours = coming_from.ours(here)
    ours.build(SHAPES[2])
    for seed in (0, 2):
        batch, gradient = (
            coming_from.values(SHAPES[2], i) for i in (seed, seed + 1)
        )
        coming_from.step_beside(theirs, ours, batch, gradient)
    coming_from.check_inference(theirs, ours, coming_from.values(SHAPES[2], 4))


def test_synchronized(tmp_path):
    """Theirs runs on GPUs alone; `BatchNorm1d` of all is what it computes."""
    arguments = eval(SYNCHRONIZED[1], {"BatchNormalization": dict})
    on_replicas = {"synchronized": arguments.pop("synchronized")}
    case = replicas.Case(arguments, sizes=(4, 3))
    ((_, of_replicas),) = replicas.train([(case, on_replicas)], 2, tmp_path)
    layer = case.layer()
    module = torch.nn.BatchNorm1d(case.shape[0])
    with torch.no_grad():
        module.weight.copy_(layer.gamma.value)
        module.bias.copy_(layer.beta.value)
    theirs = PyTorch(module)
    for step, (batch, gradient, _) in enumerate(zip(*case.batch())):
        outputs, of_batch, _ = theirs.step(
            batch, gradient, learning_rate=replicas.LEARNING_RATE
        )
        for field, expected in (
            ("outputs", outputs),
            ("input_gradients", of_batch),
        ):
            shards = [getattr(replica, field)[step] for replica in of_replicas]
            coming_from.close(np.concatenate(shards), expected, field)
    for replica in of_replicas:
        for found, right in zip(replica.weights, theirs.weights(), strict=True):
            coming_from.close(found, right, "weights", 1e-5)


def test_one_value_for_each_channel():
    """PyTorch refuses; here the variance is 0, as in Keras."""
    batch = np.ones((1, 3), "float32")
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        PyTorch(torch.nn.BatchNorm1d(3)).step(batch, batch)
    ours = coming_from.ours(CASES[0][1])
    step = frameworks.training_step(ours, frameworks.tensor(batch))
    np.testing.assert_array_equal(step.outputs, 0.0)
    np.testing.assert_allclose(step.statistics["moving_variance"], 0.9)
