"""The small convolutional network that the studies share."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from experiments import article

if TYPE_CHECKING:
    import keras

NORMALIZATIONS = (
    "none",
    "batch",
    "renormalized",
    "group",
    "layer",
    "instance",
    "previous_batch",
)
PLACEMENTS = ("before", "after", "input")
INPUT_SHAPE = (16, 16, 3)
# Of the convolutions; from the second on, the first of a size halves it.
FILTERS = (8, 16, 32)
UNITS = 64
GROUPS = 4
# The studies' runs are short: 0.99 would lag behind in most of them.
MOMENTUM = 0.9
# The batches in which renormalization's bounds loosen.
RENORM_BOUNDS = {"rmax": 3.0, "rmin": 1 / 3, "dmax": 5.0}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a small network is made of.

    Attributes:
        normalization: one of `NORMALIZATIONS`; "previous_batch" normalizes
            with the moments of the batch before.
        layer: whose batch normalization: "keras_bn" or "keras".
        depth: convolutions of each of the three sizes.
        placement: "before" the activation, "after" it, or on the "input" of
            each convolution and dense layer.
        bias: whether what is normalized has a bias.
        center, scale: whether the normalization has beta, gamma.
        virtual_batch_size: of ghost batches; 0: none.
        dropout: rate of the dropout before the logits.
        augment: whether training images are shifted and mirrored at random.
        initial_scale: of all kernels, times that of Glorot and Bengio.
        noise: whether noise of a changing mean and deviation is added after
            each normalization, see `study_layers.ShiftingNoise`.
        penalty: weight of a penalty on the moments of what would be
            normalized, see `study_layers.MomentsPenalty`; 0.0: none.
        frozen: whether batch normalization trains on its moving statistics,
            which stay as they are; gamma and beta train nevertheless, unless
            it is Keras's.
        classes: number of logits.
    """

    normalization: str = "none"
    layer: str = "keras_bn"
    depth: int = 1
    placement: str = "before"
    bias: bool = True
    center: bool = True
    scale: bool = True
    virtual_batch_size: int = 0
    dropout: float = 0.0
    augment: bool = False
    initial_scale: float = 1.0
    noise: bool = False
    penalty: float = 0.0
    frozen: bool = False
    classes: int = 10


def build(
    architecture: Architecture,
    seed: int,
    input_shape: tuple[int, ...] = INPUT_SHAPE,
) -> keras.Model:
    """Builds a small network, not compiled.

    3x3 convolutions of 8, 16 and 32 filters on 16x16, 8x8 and 4x4 positions,
    a dense layer of 64 units, and the logits, with ReLUs between. What is
    normalized is each convolution and the dense layer. The initial kernels
    depend on `seed` alone (and on `initial_scale`).

    Args:
        architecture: what it is made of.
        seed: int of at least 0.
        input_shape: (height, width, channels) of an image.

    Returns:
        A model from float32 (batch, *input_shape) to float32 logits
        (batch, classes). Each normalization is called `normalize_N`, and what
        it normalizes `conv_N` or `dense_N`.
    """
    import keras
    from keras import layers

    a = architecture
    hidden = [
        (filters, 2 if index == 0 and number else 1)
        for number, filters in enumerate(FILTERS)
        for index in range(a.depth)
    ]
    # 31 bits: on PyTorch Keras keeps a seed as int32.
    state = np.random.SeedSequence(seed).generate_state(len(hidden) + 20)
    seeds = [int(word) >> 1 for word in state]
    kernels, others = iter(seeds[20:]), iter(seeds[:20])

    def kernel(seed):
        return keras.initializers.VarianceScaling(
            a.initial_scale**2, "fan_avg", "uniform", seed=seed
        )

    def add(make, number, flat=False):
        if a.placement == "input":
            _normalize(model, a, number, flat, others)
        name = "dense" if flat else "conv"
        model.add(make(use_bias=a.bias, name=f"{name}_{number}"))
        if a.placement == "before":
            _normalize(model, a, number, flat, others)
        model.add(layers.ReLU(name=f"relu_{number}"))
        if a.placement == "after":
            _normalize(model, a, number, flat, others)

    dense_kernel, logits_kernel = (kernel(next(others)) for _ in range(2))
    flip, shift, dropout = (next(others) for _ in range(3))
    model = keras.Sequential(name="small_network")
    model.add(keras.Input(input_shape))
    if a.augment:
        model.add(layers.RandomFlip("horizontal", seed=flip))
        model.add(
            layers.RandomTranslation(0.125, 0.125, "constant", seed=shift)
        )
    for number, (filters, strides) in enumerate(hidden):

        def conv(filters=filters, strides=strides, **rest):
            return layers.Conv2D(
                filters,
                3,
                strides=strides,
                padding="same",
                kernel_initializer=kernel(next(kernels)),
                **rest,
            )

        add(conv, number)
    model.add(layers.Flatten())

    def dense(**rest):
        return layers.Dense(UNITS, kernel_initializer=dense_kernel, **rest)

    add(dense, len(hidden), flat=True)
    if a.dropout:
        model.add(layers.Dropout(a.dropout, seed=dropout))
    model.add(
        layers.Dense(a.classes, kernel_initializer=logits_kernel, name="logits")
    )
    return model


def _normalize(model, a, number, flat, seeds):
    """Adds what an architecture has in place of a normalization."""
    if a.penalty:
        from experiments.studies.study_layers import MomentsPenalty

        model.add(MomentsPenalty(a.penalty, name=f"penalty_{number}"))
    layer = normalization(a, flat, f"normalize_{number}")
    if layer is not None:
        model.add(layer)
    if a.noise:
        from experiments.studies.study_layers import ShiftingNoise

        model.add(ShiftingNoise(next(seeds), name=f"noise_{number}"))


def normalization(
    architecture: Architecture, flat: bool, name: str
) -> keras.layers.Layer | None:
    """Returns a normalization layer of an architecture, or None.

    Args:
        architecture: whose `normalization` it is.
        flat: whether its inputs have no positions. Instance normalization has
            nothing to normalize by there, and there is none.
        name: of the layer.
    """
    from keras import layers

    a, kind = architecture, architecture.normalization
    rest = {
        "epsilon": article.BATCH_NORM_EPSILON,
        "center": a.center,
        "scale": a.scale,
        "name": name,
    }
    if kind == "layer":
        axes = -1 if flat else (1, 2, 3)
        return layers.LayerNormalization(axes, **rest)
    if kind == "group":
        return layers.GroupNormalization(GROUPS, **rest)
    if kind == "instance" and not flat:
        return layers.GroupNormalization(-1, **rest)
    if kind in ("none", "instance"):
        return None
    if a.layer == "keras":
        return layers.BatchNormalization(
            momentum=MOMENTUM, trainable=not a.frozen, **rest
        )
    import keras_bn

    options = {
        "batch": {"virtual_batch_size": a.virtual_batch_size or None},
        "renormalized": {
            "renorm": True,
            "renorm_clipping": RENORM_BOUNDS,
            "renorm_momentum": MOMENTUM,
        },
        "previous_batch": {"momentum": 0.0, "use_moving_statistics": True},
    }[kind]
    if a.frozen:
        options |= {
            "use_moving_statistics": True,
            "update_moving_statistics": False,
        }
    return keras_bn.BatchNormalization(
        **{"momentum": MOMENTUM, **options, **rest}
    )
