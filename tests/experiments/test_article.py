"""The article's facts."""

import pytest

from experiments import ExperimentError
from experiments import article


def test_conditions_are_the_articles_table():
    table = [(c.number, c.dropout, c.batch_norm) for c in article.CONDITIONS]
    assert table == [
        (0, 0.0, "none"),
        (1, 0.2, "none"),
        (2, 0.4, "none"),
        (3, 0.0, "conv"),
        (4, 0.2, "conv"),
        (5, 0.4, "conv"),
        (6, 0.0, "dense"),
        (7, 0.2, "dense"),
        (8, 0.4, "dense"),
        (9, 0.0, "both"),
        (10, 0.2, "both"),
        (11, 0.4, "both"),
    ]


def test_condition_by_number():
    assert article.condition(7) is article.CONDITIONS[7]


@pytest.mark.parametrize("number", [-1, 12])
def test_condition_that_does_not_exist(number):
    with pytest.raises(ExperimentError, match=f"condition={number}$"):
        article.condition(number)


def test_steps_are_400_epochs_of_390_batches():
    assert article.BATCHES_PER_EPOCH == 390
    assert article.STEPS == 400 * article.BATCHES_PER_EPOCH == 156_000


@pytest.mark.parametrize(
    ("number", "step", "accuracy"),
    [
        (0, 2_000, 0.469),
        (2, 2_000, 0.510),
        (3, 5_000, 0.663),
        (6, 78_000, 0.599),
        (8, 10_000, 0.708),
        (9, 20_000, 0.757),
        (11, 2_000, 0.622),
        (11, 39_000, 0.742),
    ],
)
def test_published_accuracy_at_a_step(number, step, accuracy):
    assert article.PUBLISHED[number].at_step[step] == accuracy


def test_every_condition_has_every_published_value():
    assert list(article.PUBLISHED) == list(range(12))
    for published in article.PUBLISHED.values():
        assert tuple(published.at_step) == article.PUBLISHED_STEPS


def test_published_values_say_what_the_article_says():
    last = {n: x.last for n, x in article.PUBLISHED.items()}
    assert max(last, key=last.get) == 11
    # "Without batch normalization under 0.6, with it up to 0.75."
    for number in (0, 1, 2):
        assert max(article.PUBLISHED[number].at_step.values()) < 0.6
    assert article.PUBLISHED[11].at_step[article.STEPS] == 0.754
    assert last[11] == 0.7612


def test_figures_compare_what_the_article_compares():
    for name, dropout in (
        ("batch_norm", 0.0),
        ("batch_norm_dropout_2", 0.2),
        ("batch_norm_dropout_4", 0.4),
    ):
        group = [article.CONDITIONS[n] for n in article.FIGURES[name]]
        assert [c.batch_norm for c in group] == ["conv", "dense", "both"]
        assert {c.dropout for c in group} == {dropout}
    assert article.FIGURES["dropout_only"] == (0, 1, 2)
    assert article.FIGURES["best"] == (2, 11)
    assert article.FIGURES["batch_norm_both"] == (9, 10, 11)
