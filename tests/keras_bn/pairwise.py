"""Few combinations in which every few options meet in every way."""

import itertools
import random


def covering(options, strength, allowed=lambda combination: True, tries=40):
    """A greedy covering array.

    Args:
        options: Dictionary, from each option's name to its values.
        strength: Int: every so many options take every combination of values
            that is allowed in at least one row; 2 is pairwise.
        allowed: Whether a dictionary of some of the options may occur.
        tries: How many random rows are looked at for each that is taken.

    Returns:
        List of dictionaries with a value for every option; always the same.
    """
    generator = random.Random(0)
    missing = {
        tuple(zip(names, indices))
        for names in itertools.combinations(options, strength)
        for indices in itertools.product(
            *(range(len(options[name])) for name in names)
        )
        if allowed(_values(options, zip(names, indices)))
    }
    rows = []
    while missing:
        wanted = min(missing)
        candidates = [
            _random_row(options, wanted, allowed, generator)
            for _ in range(tries)
        ]
        covered = [
            missing & set(itertools.combinations(row.items(), strength))
            for row in candidates
        ]
        best = max(range(tries), key=lambda i: len(covered[i]))
        rows.append(_values(options, candidates[best].items()))
        missing -= covered[best]
    return rows


def _random_row(options, wanted, allowed, generator):
    for _ in range(1000):
        row = {
            name: generator.randrange(len(options[name])) for name in options
        }
        row.update(wanted)
        if allowed(_values(options, row.items())):
            return row
    raise ValueError(
        "What is not allowed must exclude every combination without a row. "
        f"Received: {_values(options, wanted)}."
    )


def _values(options, indices):
    return {name: options[name][i] for name, i in indices}
