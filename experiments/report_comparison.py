"""The chapters of the report that compare conditions with the article."""

import numpy as np

from experiments import article
from experiments import comparison
from experiments import same_settings
from experiments.comparison import AtStep
from experiments.report_html import items
from experiments.report_html import paragraphs
from experiments.report_html import section
from experiments.report_html import table
from experiments.report_summaries import Contents

# Settings in which a run can depart from the article, and the article's.
_ARTICLE_SETTINGS = {
    "input": "raw",
    "shuffle": False,
    "optimizer": "adam",
    "optimizer_epsilon": article.ADAM_EPSILON,
    "learning_rate": article.LEARNING_RATE,
    "batch_size": article.BATCH_SIZE,
    "placement": "after",
    "replicas": 1,
}


def chapters(contents: Contents) -> str:
    """The chapters beside the article's values; none where it has no such."""
    if not contents.compared:
        return ""
    parts = _published(contents), _rank_order(contents)
    return "\n".join(part for part in parts if part)


def _published(contents) -> str:
    found = [
        one
        for summary in contents.summaries.values()
        for one in comparison.at_published_steps(summary)
    ]
    if not found:
        return ""
    rows = [
        [
            f"{one.number} at {one.step:,}",
            f"{one.published:.3f}",
            f"{one.published_deviation:.3f}",
            f"{one.mean:.3f}",
            f"{one.deviation:.3f}",
            f"{one.difference:+.3f}",
            f"{one.allowed:.3f}",
            "no, flagged" if one.flagged else "yes",
            one.seeds,
            f"{one.points}{'' if one.complete else ', not to the end'}",
        ]
        for one in found
    ]
    return section(
        "At the article's steps",
        paragraphs([*_share_within(found), *_common_difference(found)]),
        table(
            f"At the article's steps on {contents.data}. "
            "Condition and step. The article's value is the mean of 11 points "
            "of one run (at the end of 10), its deviation theirs; ours the "
            "mean of the evaluations within the steps that those points span, "
            "its deviation that over the seeds (of one seed, over its "
            "evaluations). Within: the difference is at most twice the root "
            "of the sum of both squared deviations, which is allowed. The "
            "deviation of two or three seeds is often too small by chance, and "
            "then flags what more seeds would not; that of the article's "
            "points has in it how much the run learned between the first and "
            "the last of them, and then lets pass what repeated runs of the "
            "article's would not.",
            (
                "condition",
                "article",
                "deviation",
                "ours",
                "deviation",
                "difference",
                "allowed",
                "within",
                "seeds",
                "evaluations",
            ),
            rows,
        ),
        items(_explanation(x, contents) for x in found if x.flagged),
    )


def _share_within(found: list[AtStep]) -> list[str]:
    sentences = []
    for words, own in (
        ("of several seeds", [one for one in found if one.seeds > 1]),
        (
            "of one seed, whose spread is wide where it still learned,",
            [one for one in found if one.seeds == 1],
        ),
    ):
        if own:
            within = sum(not one.flagged for one in own)
            largest = max(own, key=lambda one: abs(one.difference))
            sentences.append(
                f"{within} of {len(own)} values {words} lie within the "
                f"spread. The largest difference is {largest.difference:+.3f},"
                f" condition {largest.number} at {largest.step:,} steps."
            )
    return sentences


def _common_difference(found: list[AtStep]) -> list[str]:
    """What the conditions with batch normalization have in common."""
    sentences = []
    for step in sorted({one.step for one in found}):
        off = [
            one.difference
            for one in found
            if one.step == step
            and article.condition(one.number).batch_norm != "none"
        ]
        if len(off) > 1:
            below = sum(x < 0 for x in off)
            sentences.append(
                f"At {step:,} the {len(off)} conditions with batch "
                f"normalization are {np.mean(off):+.3f} off the article's on "
                f"average, {below} of them below it."
            )
    return sentences


def departures(contents: Contents) -> list[str]:
    """The settings that are not the article's, in words."""
    return [
        f"{name.replace('_', ' ')} {same_settings.describe(own)} (the "
        f"article: {same_settings.describe(published)})"
        for name, published in _ARTICLE_SETTINGS.items()
        if (own := contents.runs[0].facts.get(name, published)) != published
    ]


def _explanation(one: AtStep, contents) -> str:
    seeds = "one seed" if one.seeds == 1 else f"{one.seeds} seeds"
    copy = contents.runs[0].facts.get("dataset_copy") or ""
    # TFDS's own copy has the images as they were published.
    copy = f", of images not {copy}" if "re-encoded" in copy else ""
    said = (
        f"Condition {one.number} at {one.step:,}: {one.difference:+.3f}. What "
        f"differs: the article's is a single run{copy}, in an order that it "
        f"does not give; ours are {seeds}"
    )
    own = departures(contents)
    said += f"; and {', '.join(own)}. " if own else ". "
    said += (
        "Which of them it is these runs cannot tell. Their evaluations there "
        f"lie between {one.low:.3f} and {one.high:.3f}."
    )
    summary = contents.summaries[one.number]
    pairs = summary.moving_and_recalibrated()
    if not pairs:
        return said
    moving, recalibrated = np.mean(pairs, axis=0)
    said += (
        f" They end at {moving:.3f} with moving and at {recalibrated:.3f} with "
        "recalibrated statistics."
    )
    # Weights of the end say nothing of steps long before it.
    _, last = article.PUBLISHED_SPANS[one.step]
    late = last > summary.steps[-1] / 2
    if late and one.mean < one.published < recalibrated:
        said += (
            " So their weights reach what the article has here; the moving "
            "average falls short of it."
        )
    return said


def _rank_order(contents) -> str:
    steps = {
        one.step
        for summary in contents.summaries.values()
        for one in comparison.at_published_steps(summary)
    }
    rows = []
    for step in sorted(steps):
        first, last = article.PUBLISHED_SPANS[step]
        ours, published, normalized = [], [], []
        for number, summary in contents.summaries.items():
            within = (summary.steps >= first) & (summary.steps <= last)
            if not within.any() or summary.steps[-1] < step:
                continue
            means = summary.accuracies[:, within].mean(axis=1)
            ours.append(dict(zip([r.seed for r in summary.runs], means)))
            published.append(article.PUBLISHED[number].at_step[step])
            normalized.append(summary.condition.batch_norm != "none")
        if len(ours) < 3:
            continue
        rank = comparison.rank_order(
            [list(of_seeds.values()) for of_seeds in ours], published
        )
        between = comparison.taus_between_seeds(ours)
        fewest, *_, most = sorted(map(len, ours))
        rows.append(
            [
                f"{step:,}",
                rank.conditions,
                "–".join(str(x) for x in sorted({fewest, most})),
                f"{rank.tau:.2f}",
                "–"
                if rank.low is None
                else f"{rank.low:.2f} to {rank.high:.2f}",
                _mean_and_count(comparison.taus_of_seeds(ours, published)),
                _mean_and_count(between),
                _tau_where(normalized, ours, published),
                *_below(normalized, ours),
            ]
        )
    if not rows:
        return ""
    return section(
        "Rank order of the conditions",
        table(
            f"Rank order on {contents.data}. "
            "Kendall's tau of our order against the published one, by the "
            "means at the same steps as above: 1 is the same order, 0 none. "
            "Its interval is a 95% bootstrap over our seeds, coarse and too "
            "low where they are few; the article's own chance is not in it. "
            "Beside it like by like: the mean tau of one seed against the "
            "article, which has one run, and between two of our seeds, each "
            "with how many there are. Interval and pairs cannot be had while a "
            "condition has one seed. With batch normalization: the tau of "
            "those conditions alone. The article's order at 5,000 steps "
            "against its order at the end has "
            f"{comparison.published_tau(5_000):.2f}. Last: whether all "
            "conditions without batch normalization rank below all with it, "
            "by the means, and in how many seeds.",
            (
                "step",
                "conditions",
                "seeds of each",
                "tau",
                "interval",
                "one seed",
                "between our seeds",
                "with batch normalization",
                "without it all below",
                "in seeds",
            ),
            rows,
        ),
    )


def _tau_where(wanted, ours, published) -> str:
    """Tau of the means of some conditions."""
    means = [np.mean(list(x.values())) for x in ours]
    pairs = [x for x in zip(wanted, means, published) if x[0]]
    if len(pairs) < 3:
        return "–"
    _, means, published = zip(*pairs)
    rank = comparison.rank_order([[x] for x in means], published)
    return f"{rank.tau:.2f}"


def _below(normalized, ours) -> list[str]:
    """Whether those that are not normalized are below, and in which seeds."""
    if all(normalized) or not any(normalized):
        return ["–", "–"]

    def below(values):
        pairs = list(zip(normalized, values))
        return max(x for n, x in pairs if not n) < min(x for n, x in pairs if n)

    seeds = set.intersection(*map(set, ours))
    held = [below([x[seed] for x in ours]) for seed in seeds]
    by_means = below([np.mean(list(x.values())) for x in ours])
    return [
        "yes" if by_means else "no",
        f"{sum(held)} of {len(held)}" if held else "–",
    ]


def _mean_and_count(taus) -> str:
    if not taus:
        return "–"
    return f"{np.mean(taus):.2f} ({len(taus)})"
