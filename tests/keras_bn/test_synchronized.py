"""Replicas, synchronized, against one device that has the whole batch."""

import numpy as np
import pytest

from tests.keras_bn import replicas
from tests.keras_bn.replicas import BACKEND
from tests.keras_bn.replicas import Case

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
    "two": (2, 1, _cases_for_two()),
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
    [(group, name) for group in GROUPS for name in GROUPS[group][2]],
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
