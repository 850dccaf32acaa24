"""Do gamma and beta restore what normalizing takes away?"""

import dataclasses

import numpy as np

from experiments import data
from experiments import evaluation
from experiments.controls import Arm
from experiments.studies.small_networks import Architecture
from experiments.studies.study import QUICK
from experiments.studies.study import REAL
from experiments.studies.study import Study
from experiments.studies.verdict import Question

_LEAST = 1.0
# Of the mean of what a layer gives, in its standard deviations.
_LEAST_SHIFT = 0.1
# Standard deviation of what is added to the kernels below, in theirs.
_DISTURBANCE = 0.3


class ScaleAndShift(Study):
    name = "scale_and_shift"
    title = "Scale and shift"
    claim = (
        "Gamma and beta restore what normalizing takes away, and the mean of "
        "what a layer gives then depends on beta alone."
    )
    source = "articles 000, 1 and 2, and 001"
    arms = (
        Arm("none", "without", {"architecture": Architecture()}),
        *(
            Arm(
                name,
                words,
                {
                    "architecture": Architecture(
                        "batch", center=center, scale=scale
                    )
                },
            )
            for name, words, center, scale in (
                ("both", "gamma and beta", True, True),
                ("no_gamma", "beta alone", True, False),
                ("no_beta", "gamma alone", False, True),
                ("neither", "neither", False, False),
            )
        ),
    )
    questions = (
        *(
            Question(
                f"Gamma and beta instead of {words}",
                ("both",),
                (name,),
                _LEAST,
                (name, "both"),
                f"beside {words}",
            )
            for name, words in (
                ("neither", "neither"),
                ("no_gamma", "beta alone"),
                ("no_beta", "gamma alone"),
            )
        ),
        Question(
            "How far the mean of a layer's outputs moves when the kernels "
            "below it are disturbed, without normalization less with it",
            ("shift, none",),
            ("shift, both",),
            _LEAST_SHIFT,
            ("none",),
            "for the mean, which depends on beta alone",
            "standard deviations",
            1.0,
        ),
    )
    axis = "what is left out"
    would_change = (
        "A network whose activations saturate, or that ends in a "
        "normalization: it cannot do without a scale and a shift."
    )
    real = dataclasses.replace(REAL, seeds=5)
    quick = dataclasses.replace(QUICK, arms=("none", "both", "neither"))

    def measure(self, settings, model, dataset):
        """How far a layer's mean moves with the kernels below it."""
        import keras

        images = data.inputs(dataset, settings.input)(
            dataset.test_images[: evaluation.EVALUATION_BATCH]
        )
        before = _outputs(model, images)
        generator = np.random.default_rng(settings.seed)
        for variable in model.trainable_variables:
            if variable.name == "kernel":
                value = keras.ops.convert_to_numpy(variable)
                noise = generator.standard_normal(value.shape)
                variable.assign(value + _DISTURBANCE * value.std() * noise)
        after = _outputs(model, images)
        axes = (0, 1, 2)
        moved = np.abs(after.mean(axes) - before.mean(axes))
        deviation = before.std(axes)
        alive = deviation > 1e-6
        return {"shift": float(np.mean(moved[alive] / deviation[alive]))}

    def quantities(self, runs):
        shifts = {
            f"shift, {arm}": {
                seed: record.measures["shift"] for seed, record in own.items()
            }
            for arm, own in runs.items()
        }
        return {**super().quantities(runs), **shifts}

    def caption(self, results):
        shifts = "; ".join(
            f"{name.removeprefix('shift, ')} {np.mean(list(of.values())):.2g}"
            for name, of in results.quantities.items()
            if name.startswith("shift, ")
        )
        return (
            f"{super().caption(results)} How far the mean before the last "
            "convolution's activation moves when noise is added to all "
            f"kernels, in standard deviations: {shifts}."
        )


def _outputs(model, images):
    """What the last convolution hands to its activation, in training."""
    import keras

    names = [layer.name for layer in model.layers]
    last = max(x for x in names if x.startswith("conv_"))
    normalized = last.replace("conv", "normalize")
    name = normalized if normalized in names else last
    below = keras.Model(model.inputs[0], model.get_layer(name).output)
    return keras.ops.convert_to_numpy(below(images, training=True))


STUDY = ScaleAndShift()
