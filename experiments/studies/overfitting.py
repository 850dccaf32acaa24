"""Does batch normalization regularize, and make dropout needless?"""

import dataclasses

from experiments import data
from experiments import evaluation
from experiments import report_plots
from experiments.controls import Arm
from experiments.studies.small_networks import Architecture
from experiments.studies.study import QUICK
from experiments.studies.study import REAL
from experiments.studies.study import Study
from experiments.studies.verdict import Question

_IMAGES = (1_000, 10_000)
_DROPOUT = 0.4
_LARGER = 256
_LEAST_GAP = 3.0
_LEAST = 1.5


def _name(kind, images):
    return f"{kind}_{images}"


def _arms(images):
    kinds = {
        "none": ("without", Architecture()),
        "dropout": ("dropout", Architecture(dropout=_DROPOUT)),
        "batch": ("batch normalization", Architecture("batch")),
        "both": ("both", Architecture("batch", dropout=_DROPOUT)),
        "augmented": (
            "batch normalization, augmentation",
            Architecture("batch", augment=True),
        ),
    }
    return tuple(
        Arm(
            _name(kind, images),
            f"{images:,} images, {words}",
            {"architecture": architecture, "train_images": images},
        )
        for kind, (words, architecture) in kinds.items()
    )


def _questions(images):
    """What is asked for a number of training images."""
    reference, size = (_name("none", images),), f"with {images:,} images"
    return (
        Question(
            "The gap between training and test accuracy without batch "
            f"normalization, less that with it, {size}",
            (f"gap, {_name('none', images)}",),
            (f"gap, {_name('batch', images)}",),
            _LEAST_GAP,
            reference,
            f"for the gap {size}",
            "points of accuracy",
        ),
        Question(
            f"What batch normalization gains in the test {size}",
            (_name("batch", images),),
            (_name("none", images),),
            _LEAST,
            reference,
            f"for the test accuracy {size}",
        ),
        Question(
            "Batch normalization alone less the same with dropout "
            f"{_DROPOUT:g}, {size}",
            (_name("batch", images),),
            (_name("both", images),),
            -_LEAST,
            (_name("batch", images),),
            f"for dropout being needless {size}",
        ),
    )


class Overfitting(Study):
    name = "overfitting"
    title = "Overfitting"
    claim = (
        "Batch normalization regularizes; with it dropout may be needless, and "
        "augmentation helps as a larger batch does."
    )
    source = "article 000, 3, 4.4 and 5; article 001"
    arms = (
        *_arms(_IMAGES[0]),
        *_arms(_IMAGES[1]),
        Arm(
            "larger",
            f"{_IMAGES[1]:,} images, batch normalization, batch {_LARGER}",
            {
                "architecture": Architecture("batch"),
                "train_images": _IMAGES[1],
                "batch_size": _LARGER,
            },
        ),
    )
    questions = (
        *_questions(_IMAGES[0]),
        *_questions(_IMAGES[1]),
        Question(
            f"What augmentation gains, less what a batch of {_LARGER} gains, "
            f"with {_IMAGES[1]:,} images",
            (_name("augmented", _IMAGES[1]),),
            ("larger",),
            _LEAST,
            ("larger",),
            "for augmentation being like a larger batch",
            same=True,
        ),
    )
    axis = "what is asked, and on the number of images"
    would_change = (
        "More training images than the network can learn by heart: there is "
        "no gap to close."
    )
    real = dataclasses.replace(REAL, seeds=8)
    quick = dataclasses.replace(
        QUICK, arms=("none_1000", "both_1000")
    )

    def adjusted(self, settings):
        """As many images for every size of the batch."""
        scale = settings.batch_size / self.real.batch_size
        return dataclasses.replace(
            settings,
            steps=max(1, round(settings.steps / scale)),
            eval_every=max(1, round(settings.eval_every / scale)),
        )

    def measure(self, settings, model, dataset):
        prepare = data.inputs(dataset, settings.input)
        count = len(dataset.test_labels)
        found = evaluation.evaluate(
            model,
            prepare(dataset.train_images[:count]),
            dataset.train_labels[:count],
        )
        return {"training_accuracy_in_inference": found["accuracy"]}

    def quantities(self, runs):
        accuracies = super().quantities(runs)
        gaps = {
            f"gap, {arm}": {
                seed: record.measures["training_accuracy_in_inference"]
                - float(record.lines["test_accuracy"][-1])
                for seed, record in own.items()
            }
            for arm, own in runs.items()
        }
        return {**accuracies, **gaps}

    def figure(self, results):
        quantities = results.quantities
        groups = [
            (words, quantities[name])
            for arm in results.arms
            for words, name in (
                (self.words(arm), arm),
                (f"{self.words(arm)}: the gap", f"gap, {arm}"),
            )
        ]
        return report_plots.draw_dots(
            f"study_{self.name}", groups, "accuracy"
        )

    def caption(self, results):
        return (
            "Each dot is a seed, the bar their mean: test accuracy, the mean "
            "of the last quarter of the evaluations, and the gap, training "
            "less test accuracy of the trained network, both in inference."
        )


STUDY = Overfitting()
