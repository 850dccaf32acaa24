"""Two linear maps, each the transpose of the other, and told so to JAX.

Transposing plain operations JAX would keep the deviations from the mean, a
tensor of the size of the inputs and of a wider dtype, and sum over them in two
loops. `jax.custom_vjp` has no forward mode; what `linear_call` of
`jax.custom_derivatives` makes can be neither mapped over nor differentiated
twice; and the equations of `jax.lax.custom_linear_solve` lose their transpose
where a part of them is constant. So these are primitives, by the rules that
JAX documents for one's own (docs.jax.dev, "JAX internals: primitives").
"""

import functools

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad
from jax.interpreters import batching
from jax.interpreters import mlir

from keras_bn.kernels.jax.moments import paired_sums
from keras_bn.kernels.jax.views import along
from keras_bn.kernels.jax.views import deviation_from
from keras_bn.kernels.jax.views import reduced_axes


def spread(offset, slope, inputs, mean, mask, *, axis, confined=False):
    """`offset + slope * (inputs - mean)`, linear in `offset` and `slope`.

    Args:
        offset, slope, mean: of shape `(channels,)`. Inside `shard_map` they
            differ along the axes along which `inputs` do.
        inputs: floating tensor of any rank from 2.
        mask: None or boolean, of the rank of `inputs`; a deviation that is
            not finite counts as 0 where it is False.
        axis: the channels' dimension.
        confined: whether the result is 0 where `mask` is False.

    Returns:
        A tensor of the shape of `inputs` and the dtype of `mean`.
    """
    masks = () if mask is None else (mask,)
    return _spread.bind(
        offset, slope, inputs, mean, *masks, **_settings(axis, confined)
    )[0]


def sums(change, inputs, mean, mask, *, axis, confined=False):
    """Per channel, sums of `change` and of `change * (inputs - mean)`.

    Linear in `change`, of the shape of `inputs` and the dtype of `mean`; the
    rest is as in `spread`. `confined`: where `mask` is False nothing counts.

    Returns:
        The two sums, of shape `(channels,)`.
    """
    masks = () if mask is None else (mask,)
    return _sums.bind(
        change, inputs, mean, *masks, **_settings(axis, confined)
    )


def _settings(axis, confined):
    return {"axis": axis, "confined": confined, "mapped": 0}


def _deviation(inputs, mean, mask, axis):
    deviation = deviation_from(inputs, mean, axis)
    if mask is None:
        return deviation
    # A NaN or infinity under the mask would make NaN of a change of 0.
    return jnp.where(mask | jnp.isfinite(deviation), deviation, 0)


def _spread_plainly(offset, slope, inputs, mean, mask=None, *, axis, confined):
    offset, slope = (along(axis, c, inputs.ndim) for c in (offset, slope))
    change = offset + slope * _deviation(inputs, mean, mask, axis)
    if confined and mask is not None:
        change = jnp.where(mask, change, 0)
    return [change]


def _sums_plainly(
    change, inputs, mean, mask=None, *, axis, confined, both=None
):
    if confined and mask is not None:
        change = jnp.where(mask, change, 0)
    product = change * _deviation(inputs, mean, mask, axis)
    if both is not None:
        return both(change, product, axis)
    reduced = reduced_axes(inputs, axis)
    return [jnp.sum(x, reduced) for x in (change, product)]


_sums_in_one_loop = functools.partial(_sums_plainly, both=paired_sums)


def _mapped(function, *, mapped, **settings):
    """`function` with settings, over `mapped` leading dimensions."""
    function = functools.partial(function, **settings)
    for _ in range(mapped):
        function = jax.vmap(function)
    return function


def _primitive(name, linear, function, differentiable):
    """A primitive with all its rules but that of transposition.

    Args:
        name: str.
        linear: how many of the first operands it is linear in.
        function: of the operands and settings; what is computed.
        differentiable: the same in operations that JAX can differentiate.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True

    def compute(*operands, **settings):
        return _mapped(function, **settings)(*operands)

    def types(*operands, **settings):
        compute = _mapped(function, **settings)
        return jax.make_jaxpr(compute)(*operands).out_avals

    def derivative(operands, tangents, **settings):
        results = primitive.bind(*operands, **settings)
        changes = [None] * len(results)
        if any(type(t) is not ad.Zero for t in tangents[:linear]):
            start = map(ad.instantiate_zeros, tangents[:linear])
            changes = primitive.bind(*start, *operands[linear:], **settings)
        moving = slice(linear, linear + 2)
        if any(type(t) is not ad.Zero for t in tangents[moving]):

            def of_inputs_and_mean(*pair):
                return _mapped(differentiable, **settings)(
                    *operands[:linear], *pair, *operands[linear + 2 :]
                )

            _, more = jax.jvp(
                of_inputs_and_mean,
                tuple(operands[moving]),
                tuple(map(ad.instantiate_zeros, tangents[moving])),
            )
            pairs = zip(changes, more)
            changes = [m if c is None else c + m for c, m in pairs]
        return results, changes

    def over_a_dimension(operands, dimensions, *, mapped, **settings):
        size = next(
            x.shape[d] for x, d in zip(operands, dimensions) if d is not None
        )
        operands = [
            jnp.broadcast_to(x, (size, *x.shape))
            if d is None
            else jnp.moveaxis(x, d, 0)
            for x, d in zip(operands, dimensions)
        ]
        results = primitive.bind(*operands, mapped=mapped + 1, **settings)
        return results, [0] * len(results)

    primitive.def_impl(compute)
    primitive.def_abstract_eval(types)
    ad.primitive_jvps[primitive] = derivative
    batching.primitive_batchers[primitive] = over_a_dimension
    lowering = mlir.lower_fun(compute, multiple_results=True)
    mlir.register_lowering(primitive, lowering)
    return primitive


_spread = _primitive("keras_bn_spread", 2, _spread_plainly, _spread_plainly)
_sums = _primitive("keras_bn_sums", 1, _sums_in_one_loop, _sums_plainly)


def _transpose_to(other, linear):
    def rule(cotangents, *operands, **settings):
        start = map(ad.instantiate_zeros, cotangents)
        rest = operands[linear:]
        return [*other.bind(*start, *rest, **settings), *[None] * len(rest)]

    return rule


ad.primitive_transposes[_spread] = _transpose_to(_sums, 2)
ad.primitive_transposes[_sums] = _transpose_to(_spread, 1)
