"""Does batch normalization fail with small batches, and what does not?"""

import dataclasses

import numpy as np

from experiments import data
from experiments import evaluation
from experiments import report_plots
from experiments.controls import Arm
from experiments.studies.small_networks import Architecture
from experiments.studies.study import QUICK
from experiments.studies.study import REAL
from experiments.studies.study import Study
from experiments.studies.verdict import Question

SIZES = (1, 4, 16, 64, 256)
_LARGE = 64
# Words, and the batches that are run; single images take longest by far.
_KINDS = {
    "batch": ("batch normalization", SIZES),
    "renormalized": ("batch renormalization", (4, 16, 64)),
    "group": ("group normalization", SIZES),
    "layer": ("layer normalization", (4, 64)),
    "instance": ("instance normalization", (4, 64)),
}
# Micro-batches of 4 and of 16 whose gradients are accumulated to a step of 64:
# ghost batches are just that. Synchronized they are the batch of 64.
_GHOSTS = (4, 16)
# Of SGD, at a batch of 64; in proportion to the batch (Goyal et al., 2017,
# arXiv 1706.02677).
_RATE = 0.2
_LEAST = 2.0


def _name(kind, size):
    return f"{kind}_{size}"


def _lost(kind, size, words):
    """Points that batch normalization loses more than another does."""
    return Question(
        f"What batch normalization loses from a batch of {_LARGE} to one of "
        f"{size}, less what {words} loses",
        (_name("batch", _LARGE), _name(kind, size)),
        (_name("batch", size), _name(kind, _LARGE)),
        _LEAST,
        (_name("batch", _LARGE), _name(kind, _LARGE)),
        f"beside {words} at a batch of {size}",
    )


class BatchSize(Study):
    name = "batch_size"
    title = "Small batches"
    claim = (
        "Batch normalization fails with small batches, where other "
        "normalizations do not."
    )
    source = "article 000, 3 and 5 (problem 1); Wu and He, 2018"
    arms = (
        *(
            Arm(
                _name(kind, size),
                f"{words}, batch {size}",
                {"architecture": Architecture(kind), "batch_size": size},
            )
            for kind, (words, sizes) in _KINDS.items()
            for size in sizes
        ),
        *(
            Arm(
                f"ghost_{part}",
                f"ghost batches of {part} in a batch of {_LARGE}",
                {
                    "architecture": Architecture(
                        "batch", virtual_batch_size=part
                    ),
                    "batch_size": _LARGE,
                },
            )
            for part in _GHOSTS
        ),
    )
    questions = (
        *(
            _lost("group", size, "group normalization")
            for size in (1, 4, 16)
        ),
        Question(
            "What batch renormalization gains on batch normalization at a "
            "batch of 4",
            (_name("renormalized", 4),),
            (_name("batch", 4),),
            _LEAST,
            (_name("batch", _LARGE),),
            "beside batch renormalization at a batch of 4",
        ),
        Question(
            f"What ghost batches of 4 cost in a batch of {_LARGE}",
            (_name("batch", _LARGE),),
            ("ghost_4",),
            _LEAST,
            (_name("batch", _LARGE),),
            f"of statistics alone, 4 images of {_LARGE}",
        ),
    )
    axis = "the size of the batch"
    against = (
        "Hoffer et al. (2017) find that ghost batches help to generalize; "
        "theirs are of 128 images, in batches of thousands."
    )
    would_change = (
        "Moving statistics in training (renormalization with tight bounds), or "
        "images so large that a few of them have moments enough."
    )
    real = dataclasses.replace(
        REAL, seeds=4, steps=720, eval_every=45, train_images=5_000
    )
    quick = dataclasses.replace(QUICK, arms=("batch_4", "batch_64", "group_64"))

    def adjusted(self, settings):
        """As many images for every size of the batch."""
        scale = settings.batch_size / _LARGE
        steps = max(1, round(settings.steps / scale))
        return dataclasses.replace(
            settings,
            optimizer="sgd",
            learning_rate=_RATE * scale,
            steps=steps,
            eval_every=max(1, round(settings.eval_every / scale)),
        )

    def measure(self, settings, model, dataset):
        """Accuracy with moving statistics, and with those of test batches."""
        if settings.architecture.normalization != "batch":
            return {}
        import keras_bn

        prepare = data.inputs(dataset, settings.input)
        images = prepare(dataset.test_images)
        for layer in model.layers:
            if isinstance(layer, keras_bn.BatchNormalization):
                layer.use_moving_statistics = False
        size = min(settings.batch_size, evaluation.EVALUATION_BATCH)
        right = []
        for start in range(0, len(images), size):
            logits = model.predict_on_batch(images[start : start + size])
            labels = dataset.test_labels[start : start + size]
            right.append(np.argmax(logits, axis=-1) == labels)
        return {
            "accuracy_with_batch_statistics": float(
                np.mean(np.concatenate(right))
            )
        }

    def figure(self, results):
        quantities, lines = results.quantities, []
        for kind, (words, _) in _KINDS.items():
            sizes = [x for x in SIZES if _name(kind, x) in quantities]
            lines += _line(
                words, sizes, [quantities[_name(kind, x)] for x in sizes]
            )
        parts = [x for x in _GHOSTS if f"ghost_{x}" in quantities]
        lines += _line(
            f"ghost batches in a batch of {_LARGE}",
            parts,
            [quantities[f"ghost_{x}"] for x in parts],
        )
        sizes = [x for x in SIZES if _name("batch", x) in results.runs]
        measured = [
            {
                seed: record.measures["accuracy_with_batch_statistics"]
                for seed, record in results.runs[_name("batch", x)].items()
            }
            for x in sizes
        ]
        lines += _line(
            "batch normalization, tested with the batch's statistics",
            sizes,
            measured,
        )
        return report_plots.draw_lines(
            f"study_{self.name}",
            lines,
            "images that have statistics in common",
            self.unit,
            log="x",
        )

    def caption(self, results):
        return (
            "Test accuracy, the mean of the last quarter of the evaluations "
            "(with the batch's statistics: at the end); bands are a standard "
            "deviation over the seeds. Every run sees as many images; the rate "
            "of SGD is in proportion to the batch. Ghost batches are what "
            "micro-batches are whose gradients are accumulated; synchronized, "
            f"they are the batch of {_LARGE}."
        )


def _line(words, places, of_seeds):
    """A line of the figure, in a list; none if nothing was run."""
    if not places:
        return []
    seeds = sorted(set.intersection(*map(set, of_seeds)))
    values = [[of[seed] for of in of_seeds] for seed in seeds]
    return [(words, np.array(places), np.array(values))]


STUDY = BatchSize()
