"""Do the inputs of layers shift, and is it their stillness that helps?"""

import dataclasses

import numpy as np

from experiments import checkpoint
from experiments import data
from experiments import evaluation
from experiments import report_plots
from experiments.controls import Arm
from experiments.studies.small_networks import FILTERS
from experiments.studies.small_networks import Architecture
from experiments.studies.study import QUICK
from experiments.studies.study import REAL
from experiments.studies.study import Study
from experiments.studies.study import curves
from experiments.studies.verdict import Question

_DEPTHS = {1: "three convolutions", 3: "nine convolutions"}
# Training steps over which a shift is taken.
_STEPS = 5
_PROBE_IMAGES = 256
# How far along the gradient the next gradient is taken, of the weights' norm.
_MOVE = 0.02
_RECALIBRATED = "recalibrated_test_accuracy"
# A factor of 1.4, as a power of 2.
_LEAST = 0.5


class CovariateShift(Study):
    name = "covariate_shift"
    title = "Internal covariate shift"
    claim = (
        "Layers see shifting inputs, the more the deeper; batch normalization "
        "holds them still, which is why it helps."
    )
    source = "article 001"
    against = (
        "Santurkar et al. (2018) find that noise after batch normalization, "
        "which makes the inputs shift more than without any, leaves its gain; "
        "they explain the gain by gradients that are more predictable."
    )
    arms = (
        *(
            Arm(
                f"{kind}_{depth}",
                f"{depth_words}, {words}",
                {"architecture": Architecture(kind, depth=depth)},
            )
            for depth, depth_words in _DEPTHS.items()
            for kind, words in (
                ("none", "without"),
                ("batch", "batch normalization"),
            )
        ),
        Arm(
            "noisy_3",
            "nine convolutions, batch normalization and noise",
            {"architecture": Architecture("batch", depth=3, noise=True)},
        ),
    )
    questions = (
        *(
            Question(
                "Shift of the last hidden layer's inputs without batch "
                f"normalization over that with it, {words}",
                (f"shift, none_{depth}",),
                (f"shift, batch_{depth}",),
                _LEAST,
                (f"none_{depth}",),
                f"for holding still, {words}",
                "doublings",
                1.0,
            )
            for depth, words in _DEPTHS.items()
        ),
        Question(
            "Shift of the last hidden layer's inputs in nine convolutions over "
            "that in three, without batch normalization",
            ("shift, none_3",),
            ("shift, none_1",),
            _LEAST,
            ("none_1", "none_3"),
            "for the more the deeper",
            "doublings",
            1.0,
        ),
        Question(
            "When the last hidden layer has done half of its way over when "
            "the first has, nine convolutions without batch normalization",
            ("late, none_3",),
            (),
            _LEAST,
            ("none_3",),
            "for late layers learning late",
            "doublings",
            1.0,
        ),
        Question(
            "What noise after batch normalization costs, less half of what "
            "batch normalization gains, nine convolutions",
            ("lost to noise",),
            (),
            1.0,
            ("none_3", "batch_3"),
            "for stillness being what helps",
        ),
    )
    axis = "what is asked"
    would_change = (
        "Another measure of shift: of the whole distribution, or of the "
        "gradient that a layer gets when those below it have moved."
    )
    # The loss of nine convolutions takes that long to flatten.
    real = dataclasses.replace(REAL, steps=1_440, eval_every=90)
    quick = dataclasses.replace(QUICK, arms=("none_1", "batch_1"))

    def __init__(self):
        self._probes = {}

    def observe(self, settings, model, dataset):
        if settings not in self._probes:
            self._probes = {settings: _Probe(settings, dataset)}
        return self._probes[settings].look(model)

    def measure(self, settings, model, dataset):
        """Test accuracy with statistics of inference, where no noise is.

        The moving ones are of inputs with it, and would cost the network what
        is not the doing of the shift.
        """
        import keras_bn

        if settings.architecture.depth == 1:
            return {}
        prepare = data.inputs(dataset, settings.input)
        if settings.architecture.normalization == "batch":
            keras_bn.recalibrate(
                model, prepare(dataset.train_images), verbose=0
            )
        found = evaluation.evaluate(
            model, prepare(dataset.test_images), dataset.test_labels
        )
        return {_RECALIBRATED: found["accuracy"]}

    def quantities(self, runs):
        found = super().quantities(runs)
        for arm, own in runs.items():
            found[f"shift, {arm}"] = {
                seed: float(np.log2(record.last("shift_last")))
                for seed, record in own.items()
            }
            found[f"late, {arm}"] = {
                seed: float(
                    np.log2(_half(record, "last") / _half(record, "first"))
                )
                for seed, record in own.items()
            }
        arms = [runs.get(f"{x}_3") for x in ("none", "batch", "noisy")]
        if all(arms):
            none, batch, noisy = map(_recalibrated, arms)
            found["lost to noise"] = {
                seed: batch[seed]
                - noisy[seed]
                - 0.5 * (batch[seed] - none[seed])
                for seed in sorted(set(none) & set(batch) & set(noisy))
            }
        return found

    def figure(self, results):
        lines = [
            (self.words(arm), *curves(results.runs[arm], "shift_last"))
            for arm in results.arms
        ]
        return report_plots.draw_lines(
            f"study_{self.name}",
            lines,
            "training steps",
            "shift of the last hidden layer's inputs",
            log="y",
        )

    def caption(self, results):
        changes = "; ".join(
            f"{self.words(arm)} "
            + f"{_mean(results.runs[arm], 'gradient_change'):.2g}"
            for arm in results.arms
        )
        accuracies = "; ".join(
            f"{self.words(arm)} {np.mean(list(of_seeds.values())):.3f}"
            for arm in results.arms
            if (of_seeds := _recalibrated(results.runs[arm]))
        )
        return (
            f"How far, in {_STEPS} training steps, the mean and the deviation "
            "of what the last hidden layer is given move, in deviations, the "
            "median of the channels. Bands are a standard deviation over the "
            "seeds. Test accuracy in the end, with recalibrated statistics: "
            f"{accuracies}. Change of the gradient, of its norm, when the "
            "weights move along it by "
            f"{100 * _MOVE:g}% of theirs (what Santurkar et al. call gradient "
            f"predictiveness; less is more predictable): {changes}."
        )


class _Probe:
    """Looks at a network in training, and leaves it as it was."""

    def __init__(self, settings, dataset):
        import keras

        self._batches = data.Batches(
            dataset,
            min(_PROBE_IMAGES, len(dataset.train_images)),
            settings.input,
        )
        self._twin = settings.network()
        self._twin.compile(
            keras.optimizers.SGD(1.0),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        self._initial = _kernels(self._twin)

    def look(self, model):
        kernels = _kernels(model)
        moved = [
            float(np.linalg.norm(now - then))
            for now, then in zip(kernels, self._initial)
        ]
        return {
            "shift_last": self._shift(model),
            # Before the logits.
            "moved_last": moved[-2],
            "moved_first": moved[0],
            "gradient_change": self._gradient_change(model),
        }

    def _shift(self, model):
        state = checkpoint.state(model)
        kept = [_numpy(x) for x in state]
        before = self._moments(model)
        for step in range(_STEPS):
            model.train_on_batch(*self._batches[step])
        # The model's losses and metrics so far are not those of the run.
        model.reset_metrics()
        after = self._moments(model)
        for variable, value in zip(state, kept):
            variable.assign(value)
        alive = before[1] > 1e-6
        mean = (after[0] - before[0])[alive] / before[1][alive]
        deviation = (after[1] - before[1])[alive] / before[1][alive]
        # The median: a channel that is nearly dead moves by many of its own.
        return float(np.median(np.hypot(mean, deviation)))

    def _moments(self, model):
        """Means and deviations of what the last hidden layer is given."""
        import keras

        last = [x for x in model.layers if x.name.startswith("dense_")][-1]
        below = keras.Model(model.inputs[0], last.input)
        outputs = _numpy(below(self._batches[0][0], training=True))
        channels = outputs.reshape(-1, FILTERS[-1])
        return channels.mean(axis=0), channels.std(axis=0)

    def _gradient_change(self, model):
        images, labels = self._batches[0]
        self._twin.set_weights(model.get_weights())
        weights = self._trainable()
        first = self._gradient(images, labels)
        norm = np.sqrt(sum(np.sum(w**2) for w in weights))
        length = np.sqrt(sum(np.sum(g**2) for g in first))
        self._twin.set_weights(model.get_weights())
        for variable, weight, gradient in zip(
            self._twin.trainable_variables, weights, first
        ):
            variable.assign(weight - _MOVE * norm / length * gradient)
        second = self._gradient(images, labels)
        change = sum(np.sum((a - b) ** 2) for a, b in zip(first, second))
        return float(np.sqrt(change) / length)

    def _gradient(self, images, labels):
        """The gradient: what a step of SGD at a rate of 1 takes away."""
        before = self._trainable()
        self._twin.train_on_batch(images, labels)
        return [a - b for a, b in zip(before, self._trainable())]

    def _trainable(self):
        return [_numpy(x) for x in self._twin.trainable_variables]


def _kernels(model):
    return [
        _numpy(x) for x in model.trainable_variables if x.name == "kernel"
    ]


def _numpy(value):
    import keras

    return np.array(keras.ops.convert_to_numpy(value))


def _half(record, which):
    """The step at which a layer has done half of its way."""
    moved = record.lines[f"moved_{which}"]
    steps = np.concatenate([[0.0], record.lines["step"]])
    moved = np.concatenate([[0.0], moved])
    reached = int(np.flatnonzero(moved >= moved[-1] / 2)[0])
    share = (moved[-1] / 2 - moved[reached - 1]) / (
        moved[reached] - moved[reached - 1]
    )
    return steps[reached - 1] + share * (steps[reached] - steps[reached - 1])


def _recalibrated(runs):
    """From seeds to test accuracies, where they were measured."""
    return {
        seed: record.measures[_RECALIBRATED]
        for seed, record in runs.items()
        if _RECALIBRATED in record.measures
    }


def _mean(runs, name):
    return np.mean([record.last(name) for record in runs.values()])


STUDY = CovariateShift()
