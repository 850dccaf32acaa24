"""The facts of the article whose experiment this package repeats.

Source: "Deep LearningにおけるBatch Normalizationの理解メモと、実際に
その効果を見てみる" (notes on understanding batch normalization in deep
learning, and a look at its effect), Qiita, 2018-06-10, with the measurements
behind its figures. The author used TensorFlow 1.8, whose defaults are the
hyperparameters below that the article does not name.
"""

import dataclasses

from experiments import ExperimentError

REFERENCE = (
    "a Japanese note on Qiita, 2018-06-10, on understanding batch "
    "normalization in deep learning, with a look at its effect"
)

BATCH_SIZE = 128
BATCHES_PER_EPOCH = 50_000 // BATCH_SIZE  # 390 full ones; the rest is dropped
STEPS = 400 * BATCHES_PER_EPOCH  # 156,000
LEARNING_RATE = 1e-3
ADAM_EPSILON = 1e-8  # TensorFlow 1's default; Keras's is 1e-7
MOMENTUM = 0.99
BATCH_NORM_EPSILON = 1e-3

# The article's figures: test accuracy over steps, averaged over 10 points.
SMOOTHING_POINTS = 10
ACCURACY_AXIS = (0.4, 0.8)
STEP_AXIS = (0, 150_000)
FIGURES = {
    "dropout_only": (0, 1, 2),
    "best": (2, 11),
    "batch_norm": (3, 6, 9),
    "batch_norm_dropout_2": (4, 7, 10),
    "batch_norm_dropout_4": (5, 8, 11),
    "batch_norm_both": (9, 10, 11),  # in the author's repository alone
}
FIGURE_TITLES = {
    "dropout_only": "dropout without batch normalization",
    "best": "the best without and with batch normalization",
    "batch_norm": "batch normalization without dropout",
    "batch_norm_dropout_2": "batch normalization with dropout 0.2",
    "batch_norm_dropout_4": "batch normalization with dropout 0.4",
    "batch_norm_both": "batch normalization of all layers",
}


@dataclasses.dataclass(frozen=True)
class Condition:
    """One of the article's 12 networks.

    Attributes:
        number: the article's ID, 0 to 11.
        batch_norm: where batch normalization is: "none", "conv" (after both
            convolutions), "dense" (after the 1024-unit layer) or "both".
        dropout: rate of the dropout after the 1024-unit layer; 0.0 is none.
    """

    number: int
    batch_norm: str
    dropout: float


CONDITIONS = tuple(
    Condition(3 * row + column, batch_norm, dropout)
    for row, batch_norm in enumerate(("none", "conv", "dense", "both"))
    for column, dropout in enumerate((0.0, 0.2, 0.4))
)


def condition(number: int) -> Condition:
    """Returns the `Condition` of a number.

    Raises:
        ExperimentError: there is no such condition.
    """
    if number not in range(len(CONDITIONS)):
        raise ExperimentError(
            "a condition is a number from 0 to 11, as in the article's "
            f"table. Received: condition={number}"
        )
    return CONDITIONS[number]


@dataclasses.dataclass(frozen=True)
class Published:
    """Test accuracies (0 to 1) that the article measured for a condition.

    Attributes:
        at_step: training steps -> mean of the 11 points around that step, at
            the end of the last 10; the first and last of them stand at
            `PUBLISHED_SPANS`.
        deviation_at_step: training steps -> standard deviation (n - 1) of
            those points.
        last: the last point, at about `STEPS` steps.
    """

    at_step: dict[int, float]
    deviation_at_step: dict[int, float]
    last: float


# Around these steps, the steps of the first and the last of those points.
PUBLISHED_SPANS = {
    2_000: (540, 2_590),
    5_000: (3_560, 6_150),
    10_000: (9_070, 10_880),
    20_000: (18_480, 20_970),
    39_000: (38_570, 39_440),
    78_000: (76_930, 78_640),
    STEPS: (154_880, 155_960),
}
PUBLISHED_STEPS = tuple(PUBLISHED_SPANS)

# One row a condition: its accuracies at PUBLISHED_STEPS, and the last point.
_ROWS = (
    (0.469, 0.483, 0.498, 0.515, 0.535, 0.543, 0.568, 0.5578),
    (0.510, 0.519, 0.527, 0.526, 0.545, 0.554, 0.567, 0.5591),
    (0.510, 0.561, 0.571, 0.581, 0.590, 0.588, 0.589, 0.5814),
    (0.606, 0.663, 0.676, 0.696, 0.711, 0.738, 0.724, 0.7275),
    (0.628, 0.674, 0.696, 0.718, 0.727, 0.722, 0.738, 0.7460),
    (0.626, 0.680, 0.711, 0.732, 0.733, 0.752, 0.746, 0.7471),
    (0.549, 0.607, 0.648, 0.673, 0.696, 0.599, 0.722, 0.7223),
    (0.637, 0.667, 0.697, 0.714, 0.717, 0.730, 0.734, 0.7343),
    (0.579, 0.577, 0.708, 0.723, 0.725, 0.734, 0.736, 0.7354),
    (0.631, 0.673, 0.746, 0.757, 0.739, 0.744, 0.733, 0.7343),
    (0.642, 0.677, 0.709, 0.731, 0.728, 0.745, 0.749, 0.7547),
    (0.622, 0.686, 0.702, 0.742, 0.742, 0.749, 0.754, 0.7612),
)

# The standard deviations of the points at PUBLISHED_STEPS.
_DEVIATIONS = (
    (0.0548, 0.0097, 0.0093, 0.0055, 0.0078, 0.0055, 0.0058),
    (0.0234, 0.0106, 0.0060, 0.0199, 0.0093, 0.0062, 0.0057),
    (0.0422, 0.0116, 0.0069, 0.0094, 0.0062, 0.0091, 0.0082),
    (0.0342, 0.0310, 0.0222, 0.0169, 0.0099, 0.0005, 0.0022),
    (0.0605, 0.0197, 0.0182, 0.0088, 0.0076, 0.0158, 0.0073),
    (0.0510, 0.0356, 0.0139, 0.0074, 0.0194, 0.0090, 0.0073),
    (0.0639, 0.0351, 0.0204, 0.0487, 0.0463, 0.1754, 0.0008),
    (0.0299, 0.0260, 0.0136, 0.0148, 0.0110, 0.0057, 0.0049),
    (0.1137, 0.1325, 0.0117, 0.0054, 0.0048, 0.0033, 0.0028),
    (0.0519, 0.0289, 0.0093, 0.0013, 0.0008, 0.0007, 0.0005),
    (0.0391, 0.0285, 0.0254, 0.0169, 0.0113, 0.0087, 0.0071),
    (0.0413, 0.0396, 0.0280, 0.0085, 0.0092, 0.0059, 0.0159),
)

PUBLISHED = {
    number: Published(
        at_step=dict(zip(PUBLISHED_STEPS, row[:-1], strict=True)),
        deviation_at_step=dict(
            zip(PUBLISHED_STEPS, _DEVIATIONS[number], strict=True)
        ),
        last=row[-1],
    )
    for number, row in enumerate(_ROWS)
}
