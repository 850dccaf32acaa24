"""Does batch normalization allow higher learning rates?"""

import dataclasses

import numpy as np

from experiments import report_plots
from experiments.controls import Arm
from experiments.studies.small_networks import Architecture
from experiments.studies.study import QUICK
from experiments.studies.study import REAL
from experiments.studies.study import Study
from experiments.studies.verdict import Question

# The second is the one whose loss must have flattened without normalization.
_RATES = {
    "sgd": (0.1, 0.3, 1.0, 3.0, 10.0),
    "adam": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "rmsprop": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
}
_WORDS = {"sgd": "SGD", "adam": "Adam", "rmsprop": "RMSprop"}
_NORMALIZATIONS = {"none": "without", "batch": "with"}
# A rate is stable where the accuracy is at most so far below that of the best
# rate of the same optimizer and normalization.
_STABLE = 0.1
# Of the rates: one and a half times as high, as a power of 10.
_LEAST = 0.18


def _name(normalization, optimizer, rate):
    return f"{normalization}_{optimizer}_{rate:g}"


def _question(optimizer):
    return Question(
        "Largest stable learning rate with batch normalization over that "
        f"without, {_WORDS[optimizer]}",
        (f"{optimizer}, batch",),
        (f"{optimizer}, none",),
        _LEAST,
        (_name("none", optimizer, _RATES[optimizer][1]),),
        f"with {_WORDS[optimizer]}",
        "powers of 10",
        1.0,
    )


class LearningRate(Study):
    name = "learning_rate"
    title = "Higher learning rates"
    claim = "Batch normalization allows higher learning rates."
    source = "article 000, 3 and 4.3"
    arms = tuple(
        Arm(
            _name(normalization, optimizer, rate),
            f"{_WORDS[optimizer]} {rate:g}, {words}",
            {
                "architecture": Architecture(normalization),
                "optimizer": optimizer,
                "learning_rate": rate,
            },
        )
        for optimizer, rates in _RATES.items()
        for rate in rates
        for normalization, words in _NORMALIZATIONS.items()
    )
    questions = tuple(map(_question, _RATES))
    axis = "the optimizer"
    would_change = (
        "A schedule that begins with small rates, or clipped gradients: both "
        "let a network without batch normalization stand higher rates."
    )
    # Fewer images, so that as many epochs take fewer steps.
    real = dataclasses.replace(
        REAL, seeds=3, steps=800, eval_every=50, train_images=5_000
    )
    quick = dataclasses.replace(
        QUICK,
        arms=tuple(
            _name(normalization, "sgd", rate)
            for rate in (0.1, 10.0)
            for normalization in _NORMALIZATIONS
        ),
    )

    def quantities(self, runs):
        """Powers of 10 of the largest stable rates."""
        found = {}
        for optimizer in _RATES:
            for normalization in _NORMALIZATIONS:
                accuracies = self._accuracies(runs, normalization, optimizer)
                if len(accuracies) > 1:
                    seeds = set.intersection(*map(set, accuracies.values()))
                    found[f"{optimizer}, {normalization}"] = {
                        seed: largest_stable(
                            list(accuracies),
                            [x[seed] for x in accuracies.values()],
                        )
                        for seed in sorted(seeds)
                    }
        return found

    def _accuracies(self, runs, normalization, optimizer):
        """From each rate that was run to the accuracy of each seed."""
        accuracies = super().quantities(runs)
        names = {
            rate: _name(normalization, optimizer, rate)
            for rate in _RATES[optimizer]
        }
        return {
            rate: accuracies[name]
            for rate, name in names.items()
            if name in accuracies
        }

    def figure(self, results):
        lines = []
        # A colour for each optimizer.
        for normalization, state in _NORMALIZATIONS.items():
            for optimizer, words in _WORDS.items():
                accuracies = self._accuracies(
                    results.runs, normalization, optimizer
                )
                if accuracies:
                    seeds = set.intersection(*map(set, accuracies.values()))
                    values = [
                        [of[seed] for of in accuracies.values()]
                        for seed in sorted(seeds)
                    ]
                    lines.append(
                        (
                            f"{words}, {state}",
                            np.array(list(accuracies)),
                            np.array(values),
                        )
                    )
        return report_plots.draw_lines(
            f"study_{self.name}", lines, "learning rate", self.unit, log="x"
        )

    def caption(self, results):
        rates = "; ".join(
            f"{name} {10 ** np.mean(list(of.values())):.2g}"
            for name, of in results.quantities.items()
        )
        return (
            "Test accuracy, the mean of the last quarter of the evaluations; "
            "bands are a standard deviation over the seeds. Largest stable "
            f"rates, where the accuracy is {100 * _STABLE:g} points below that "
            f"of the best rate: {rates}. The highest rate that was run stands "
            "for itself and all beyond it."
        )


def largest_stable(rates, accuracies):
    """The power of 10 of the largest rate that is stable.

    Between the last rate that is and the first beyond it that is not, it is
    where a straight line crosses the bound. The best rate is stable.

    Args:
        rates: ascending.
        accuracies: of each.
    """
    powers, bound = np.log10(rates), max(accuracies) - _STABLE
    last = int(np.flatnonzero(np.array(accuracies) >= bound)[-1])
    if last == len(rates) - 1:
        return float(powers[-1])
    above, below = accuracies[last], accuracies[last + 1]
    share = (above - bound) / (above - below)
    return float(powers[last] + share * (powers[last + 1] - powers[last]))


STUDY = LearningRate()
