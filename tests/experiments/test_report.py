"""The report says what the result files say, and refuses what it must."""

import html
import html.parser
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import ExperimentError
from experiments import article
from experiments import report
from experiments import report_figures
from experiments import report_plots
from experiments import report_summaries
from tests.experiments.run_files import write_run

ROOT = Path(report.__file__).parents[1]


class _Page(html.parser.HTMLParser):
    """Collects a page's table rows, attributes, styles and images."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.attributes, self.tags = [], [], []
        self.captions, self._in = [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self._in = tag

    def handle_endtag(self, tag):
        self._in = None

    def handle_data(self, text):
        if self._in in ("td", "th"):
            self.tables[-1][-1][-1] += text
        elif self._in == "caption":
            self.captions.append(text)


def accuracy_rows(page):
    """Rows of the table of final accuracies: ID -> heading -> cell."""
    headings, *rows = _Page(page).tables[0]
    return {int(row[0]): dict(zip(headings, row)) for row in rows}


def run_program(*flags):
    return subprocess.run(
        [sys.executable, "-m", "experiments.report", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_mean_and_spread_over_seeds(tmp_path):
    ends = [0.512, 0.547, 0.596]
    for seed, end in enumerate(ends):
        write_run(tmp_path, 9, seed, [0.1, 0.2, 0.3, end])
    write_run(tmp_path, 0, 0, [0.1, 0.2, 0.3, 0.4321])
    path = report.write_report(tmp_path)
    assert path == tmp_path / "report.html"
    rows = accuracy_rows(path.read_text())
    assert list(rows) == [0, 9]
    assert rows[9]["test accuracy"] == f"{statistics.mean(ends):.4f}"
    assert rows[9]["spread"] == f"{statistics.stdev(ends):.4f}"
    assert rows[9]["seeds"] == "3"
    assert rows[9]["at step"] == "400"
    assert rows[9]["batch norm"] == "both"
    assert rows[0]["test accuracy"] == "0.4321"
    assert rows[0]["spread"] == "–"


def test_long_runs_end_with_the_mean_of_ten_points(tmp_path):
    accuracies = [0.5 + 0.001 * (count % 7) for count in range(120)]
    write_run(tmp_path, 2, 0, accuracies, steps=12_000)
    rows = accuracy_rows(report.write_report(tmp_path).read_text())
    expected = statistics.mean(accuracies[-10:])
    assert rows[2]["test accuracy"] == f"{expected:.4f}"
    # 12,000 steps: a fifth of the way from 10,000 to 20,000.
    published = 0.571 + (0.581 - 0.571) / 5
    assert rows[2]["article"] == f"{published:.4f}"
    assert rows[2]["difference"] == f"{expected - published:+.4f}"


def test_published_values_before_the_first_step_give_their_step(tmp_path):
    write_run(tmp_path, 11, 0, [0.2, 0.3, 0.4, 0.5])
    rows = accuracy_rows(report.write_report(tmp_path).read_text())
    assert rows[11]["article"] == "0.6220 at step 2,000"
    assert "difference" not in rows[11]


def test_one_evaluation_has_no_difference_from_a_mean(tmp_path):
    """It would be what the moving average happens to be."""
    write_run(tmp_path, 11, 0, [0.5] * 20, steps=2_000)
    write_run(tmp_path, 9, 0, [0.5] * 100, steps=10_000)
    rows = accuracy_rows(report.write_report(tmp_path).read_text())
    assert rows[11]["article"] == "0.6220"
    assert rows[11]["difference"] == "–"
    assert rows[9]["difference"] == f"{0.5 - 0.746:+.4f}"


def test_published_curves_are_averaged_around_our_step(tmp_path):
    curve = tmp_path / "curves.csv"
    points = [(100 * k, 0.4 + 0.01 * (k % 5)) for k in range(1, 41)]
    curve.write_text(
        "condition,batch_norm,dropout,step,test_accuracy\n"
        + "".join(f"0,none,0.0,{s},{a}\n" for s, a in points)
    )
    results = tmp_path / "results"
    write_run(results, 0, 0, [0.5] * 20, steps=2_000)
    page = report.write_report(results, curve).read_text()
    around = [a for s, a in points if 1_500 <= s <= 2_500]
    assert len(around) == 11
    expected = f"{statistics.mean(around):.4f}"
    assert accuracy_rows(page)[0]["article"] == expected


def test_seeds_are_averaged_where_all_were_evaluated(tmp_path):
    write_run(tmp_path, 3, 0, [0.41, 0.42, 0.43])
    write_run(tmp_path, 3, 1, [0.51, 0.52])
    row = accuracy_rows(report.write_report(tmp_path).read_text())[3]
    assert row["at step"] == "200"
    assert row["test accuracy"] == f"{(0.42 + 0.52) / 2:.4f}"
    assert row["seeds"] == "2, unfinished"


def test_unfinished_runs_do_not_blur_finished_ones(tmp_path):
    write_run(tmp_path, 3, 0, [0.41, 0.42, 0.43, 0.44])
    write_run(tmp_path, 3, 1, [0.91, 0.92])
    write_run(tmp_path, 4, 0, [])
    page = report.write_report(tmp_path).read_text()
    rows = accuracy_rows(page)
    assert rows[3]["test accuracy"] == "0.4400"
    assert rows[3]["seeds"] == "1 (1 more unfinished)"
    assert 4 not in rows
    states = [row[4] for row in _Page(page).tables[1][1:]]
    assert states == ["finished"] + ["unfinished, of 400"] * 2


def test_shorter_runs_do_not_cut_longer_ones(tmp_path):
    """Finished and unfinished ones; and the command has both lengths."""
    write_run(tmp_path, 3, 0, [0.41, 0.42, 0.43, 0.44])
    write_run(tmp_path, 3, 1, [0.91, 0.92], steps=200)
    write_run(tmp_path, 4, 0, [0.1, 0.2, 0.3])
    write_run(tmp_path, 4, 1, [0.9])
    page = report.write_report(tmp_path).read_text()
    rows = accuracy_rows(page)
    assert rows[3]["test accuracy"] == "0.4400"
    assert rows[3]["seeds"] == "1 (1 more of fewer steps)"
    assert (rows[4]["test accuracy"], rows[4]["at step"]) == ("0.3000", "300")
    assert rows[4]["seeds"] == "1, unfinished"
    assert "--steps=STEPS" in page
    assert "STEPS is the run&#x27;s own: 200 or 400." in page


def test_what_departs_from_the_article_is_said(tmp_path):
    """In the introduction, and where a difference is explained."""
    facts = {"steps": 3_000, "placement": "before", "eval_every": 500}
    for seed, accuracy in enumerate((0.91, 0.92)):
        own = {**facts, "dataset_copy": "PNG of TFDS"}
        write_run(tmp_path, 3, seed, [accuracy] * 6, every=500, **own)
        own = {**facts, "dataset_copy": "JPEG re-encoded"}
        write_run(tmp_path / "jpeg", 3, seed, [accuracy] * 6, every=500, **own)
    page = report.write_report(tmp_path).read_text()
    assert page.count("placement before (the article: after)") == 2
    assert "Condition 3 at 2,000: +0.309" in page
    assert "JPEG" not in page
    assert "of images not JPEG re-encoded" in (
        report.write_report(tmp_path / "jpeg").read_text()
    )


@pytest.mark.parametrize(
    ("recalibrated", "more", "said"),
    # With 6 more, 5,000 steps are compared too, and are the late ones.
    [(0.7, 0, 1), (0.7, 6, 1), (0.6, 0, 0), (None, 0, 0)],
)
def test_a_difference_is_laid_to_the_moving_average_where_it_is(
    tmp_path, recalibrated, more, said
):
    """Condition 7 has 0.637 in the article around step 2,000."""
    facts = {"steps": 3_000 + 500 * more, "eval_every": 500, "every": 500}
    for seed in range(2):
        accuracies = [0.1, 0.5, 0.4, 0.45, 0.5]
        accuracies += (more + 1) * [0.49 + seed / 100]
        folder = write_run(tmp_path, 7, seed, accuracies, **facts)
        if recalibrated:
            (folder / "recalibrated.json").write_text(
                json.dumps({"test_accuracy": recalibrated})
            )
    page = report.write_report(tmp_path).read_text()
    assert "evaluations there lie between 0.400 and 0.500" in page
    assert page.count("weights reach what the article has here") == said
    if recalibrated:
        assert (
            f"end at 0.495 with moving and at {recalibrated:.3f} with "
            "recalibrated statistics" in page
        )


def test_one_seed_and_several_are_told_apart(tmp_path):
    facts = {"steps": 3_000, "eval_every": 500, "every": 500}
    write_run(tmp_path, 0, 0, [0.1, 0.2, 0.3, 0.4, 0.5, 0.5], **facts)
    for seed, accuracy in enumerate((0.91, 0.92)):
        write_run(tmp_path, 3, seed, [accuracy] * 6, **facts)
    page = report.write_report(tmp_path).read_text()
    assert "0 of 1 values of several seeds lie within the spread" in page
    assert "1 of 1 values of one seed, whose spread is wide" in page


def test_numbers_in_figures_keep_their_digits():
    svg = report_plots.draw_dots(
        "name", [("weight 0.001", {0: 0.5123, 1: 0.5178})]
    )
    assert ">weight 0.001<" in svg
    ticks = re.findall(r">(0\.\d+)</text>", svg)
    steps = np.diff([float(tick) for tick in ticks])
    assert len(ticks) > 2
    np.testing.assert_allclose(steps, steps[0])
    # Coordinates are short.
    assert not re.search(r"<path[^>]*\d\.\d{3}", svg)


def test_what_scrolls_can_be_scrolled_by_keyboard(tmp_path):
    for number in range(12):
        for seed in range(2):
            accuracies = np.linspace(0.1, 0.5 + seed / 100, 30).tolist()
            write_run(tmp_path, number, seed, accuracies, steps=3_000)
    page = _Page(report.write_report(tmp_path).read_text())
    scrolled = page.tags.count("table") + page.tags.count("pre")
    assert scrolled == 7
    found = {
        name: [
            v
            for tag, n, v in page.attributes
            if n == name and tag not in ("svg", "nav")
        ]
        for name in ("tabindex", "aria-label")
    }
    assert found["tabindex"] == ["0"] * scrolled
    assert len(set(found["aria-label"])) == scrolled


def test_digits_are_never_compared_with_the_article(tmp_path):
    digits = {"dataset": "digits", "dataset_version": "1.7"}
    for name, facts in (("cifar10", {}), ("digits", digits)):
        write_run(tmp_path / name, 2, 0, [0.5] * 30, steps=3_000, **facts)
    curve = tmp_path / "curves.csv"
    curve.write_text(
        "condition,step,test_accuracy\n"
        + "".join(f"2,{100 * k},0.5\n" for k in range(10))
    )
    compared = report.write_report(tmp_path / "cifar10").read_text()
    alone = report.write_report(tmp_path / "digits", curve).read_text()
    assert "the article, in the same colours and open marks" in compared
    assert "article" in accuracy_rows(compared)[2]
    assert "the article, in the same colours" not in alone
    assert "article" not in accuracy_rows(alone)[2]
    assert "They are not compared with the article" in alone
    figure = (tmp_path / "digits/figures/dropout_only.svg").read_text()
    assert "the article" not in figure


def test_dataset_and_copy_are_in_every_title(tmp_path):
    write_run(tmp_path, 2, 0, [0.5] * 4)
    page = report.write_report(tmp_path).read_text()
    page = re.sub("<circle.*?</circle>", "", page)  # those have titles, too
    titles = re.findall(r"<(title|h1|strong|caption)>(.*?)</\1>", page)
    assert len(titles) >= 6
    for tag, title in titles:
        if not title.startswith("Settings"):
            assert "CIFAR-10 3.0.2 (a test&#x27;s copy)" in title, (tag, title)


def test_page_loads_nothing_and_describes_its_figures(tmp_path):
    for number in range(12):
        write_run(tmp_path, number, 0, [0.2, 0.3, 0.4, 0.5])
    text = report.write_report(tmp_path).read_text()
    page = _Page(text)
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "data"):
            assert value.startswith("#"), (tag, name, value)
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert "http:" not in text and "https:" not in text
    labels = [
        value
        for tag, name, value in page.attributes
        if (tag, name) == ("svg", "aria-label")
    ]
    assert len(labels) == len(article.FIGURES) == page.tags.count("svg")
    assert all("Test accuracy" in label for label in labels)
    assert page.tags.count("caption") == page.tags.count("table") == 3
    assert "prefers-color-scheme: dark" in text
    assert page.tags.count("main") == 1
    targets = [v for tag, name, v in page.attributes if name == "id"]
    links = [v for tag, name, v in page.attributes if name == "href"]
    assert links == [f"#{x}" for x in targets if x in _sections(text)]
    assert len(set(targets)) == len(targets)


def _sections(text):
    return re.findall('<h2 id="(.*?)">', text)


def test_what_hovering_tells_can_be_read_without_a_pointer(tmp_path):
    for seed in range(2):
        write_run(tmp_path, 2, seed, [0.2, 0.3, 0.4, 0.5])
    text = report.write_report(tmp_path).read_text()
    # Condition 2 is in two figures.
    hovered = re.findall("<circle[^>]*><title>(.*?)</title>", text)
    listed = re.findall("<li>(condition .*?)</li>", text)
    assert listed == hovered
    assert len(listed) == 8
    assert listed[0] == "condition 2, step 100: 0.2000, deviation 0.0000"
    summaries = re.findall("<summary>(.*?)</summary>", text)
    assert len(set(summaries)) == len(summaries) == 2


def _write_curves(folder, condition, points):
    """The article's curves as --published_curves takes them; its path."""
    path = folder / "curves.csv"
    lines = [f"{condition},{step},{accuracy}" for step, accuracy in points]
    path.write_text("\n".join(["condition,step,test_accuracy", *lines, ""]))
    return path


def test_the_articles_values_can_be_hovered_over(tmp_path):
    facts = {"steps": 8_000, "eval_every": 2_000, "every": 2_000}
    write_run(tmp_path, 2, 0, [0.2, 0.3, 0.4, 0.5], **facts)
    text = report.write_report(tmp_path).read_text()
    assert (
        "<li>condition 2, the article, around step 2,000: 0.5100</li>" in text
    )
    # Each where it is drawn: the further right, the later.
    curves = _write_curves(
        tmp_path, 2, [(100 * k, 0.4 + k / 1000) for k in range(1, 100)]
    )
    text = report.write_report(tmp_path, curves).read_text()
    found = re.findall(
        '<circle cx="(.*?)" cy="(.*?)"[^>]*><title>condition 2, the article, '
        "step (.*?): (.*?)</title>",
        text,
    )
    # Two figures, up to our last step, not smoothed, as ours is not.
    half = found[: len(found) // 2]
    assert [(x[2], x[3]) for x in half] == [
        (f"{100 * k:,}", f"{0.4 + k / 1000:.4f}") for k in range(1, 82)
    ]
    right, down = np.array([x[:2] for x in half], float).T
    assert (np.diff(right) > 0).all() and (np.diff(down) < 0).all()


def test_the_articles_remark_on_stability(tmp_path):
    generator = np.random.default_rng(0)
    jumps = {n: 0.1 if 6 <= n <= 8 else 0.01 for n in range(12)}
    for number, size in jumps.items():
        accuracies = 0.5 + size * generator.uniform(-1, 1, 40)
        write_run(tmp_path, number, 0, accuracies.tolist(), steps=4_000)
    curves = _write_curves(
        tmp_path, 9, [(100 * k, 0.5 + 0.2 * (k != 35)) for k in range(1, 60)]
    )
    text = report.write_report(tmp_path, curves).read_text()
    said = re.search(
        "deviation here: in the dense layer alone (.*?), in the convolutions "
        "or in all layers (.*?); and .*? left out, without dropout (.*?), with "
        "dropout 0.4 (.*?)\\. So it",
        text,
    )
    dense, others, bare, dropped = map(float, said.groups())
    # The root mean square of a uniform distribution, of 11 in a window.
    assert dense == pytest.approx(0.1 / 3**0.5, rel=0.2)
    for value in (others, bare, dropped):
        assert value == pytest.approx(0.01 / 3**0.5, abs=0.002)
    (table,) = (
        x for x in _Page(text).tables if "article's collapses" in x[0]
    )
    # Only the points up to our last step, 4,000, where one has fallen.
    rows = {row[0]: row[-3:] for row in table}
    assert rows["9"][1:] == ["1", "15"]
    assert rows["8"] == ["–", "–", "–"]
    verdict = "is more in the dense layer alone, and "
    verdict += ("not " if bare <= dropped else "") + "more without dropout."
    assert verdict in text


def test_figures_of_conditions_without_results_are_named(tmp_path):
    write_run(tmp_path, 9, 0, [0.2, 0.3, 0.4, 0.5])
    page = report.write_report(tmp_path).read_text()
    assert page.count("<svg") == 2  # batch_norm and batch_norm_both
    assert "figure 1, dropout without batch normalization (0, 1, 2);" in page


def test_axes_are_the_articles_where_the_data_fills_them():
    def summary(steps, accuracies):
        return report_summaries.Summary(
            condition=article.CONDITIONS[0],
            runs=(),
            unfinished=(),
            shorter=(),
            steps=steps,
            accuracies=accuracies,
        )

    steps = np.arange(156, 156_001, 156)
    long = summary(steps, np.full((1, len(steps)), 0.6))
    assert report_figures.shared_axes([long]) == (150_000, 0.4, 0.8)
    short = summary(np.arange(100, 900, 100), np.full((1, 8), 0.23))
    axes = report_figures.shared_axes([short])
    assert 800 <= axes.last_step < 900
    assert axes.low < 0.23 and axes.high == 0.8


def test_points_out_of_view_are_told(tmp_path):
    accuracies = [0.1] * 40 + [0.7] * 960
    write_run(tmp_path, 1, 0, accuracies, 156, steps=156_000, eval_every=156)
    page = report.write_report(tmp_path).read_text()
    # Means of ten are below 0.4 with more than five low ones among them: from
    # the first ten to the 35th to 44th.
    assert "condition 1, 35 of 991 points (0.100 to 0.340," in page


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("dataset", "digits", "cifar10"),
        ("input", "standardized", "raw"),
        ("shuffle", True, "no"),
        ("optimizer", "sgd", "adam"),
        ("learning_rate", 0.01, "0.001"),
        ("batch_size", 64, "128"),
        ("layer", "keras", "keras_bn"),
        ("backend", "jax", "tensorflow"),
        ("dataset_copy", "PNG", "a test's copy"),
        # Files from before there was a choice are of one device.
        ("distribution", "ddp", "none"),
        ("replicas", 2, "1"),
        ("synchronized", True, "no"),
    ],
)
def test_different_settings_are_refused(tmp_path, name, value, shown):
    write_run(tmp_path, 0, 0, [0.5] * 4)
    write_run(tmp_path, 9, 1, [0.5] * 4, **{name: value})
    with pytest.raises(ExperimentError) as caught:
        report.write_report(tmp_path)
    message = str(caught.value)
    other = "yes" if value is True else str(value)
    assert f"differ in {name}: {shown} in 0/0, {other} in 9/1" in message
    assert "\n" not in message
    assert not (tmp_path / "report.html").exists()


def test_other_packages_are_noted(tmp_path):
    write_run(tmp_path, 0, 0, [0.5] * 4)
    write_run(tmp_path, 9, 0, [0.5] * 4, packages={"keras": "3.14"})
    page = report.write_report(tmp_path).read_text()
    versions = "python 3.12, keras 3.15; keras 3.14"
    assert f"The runs differ in packages: {versions}" in page
    assert "differ in device" not in page


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ('{"step": 200, "test_acc', "not JSON"),
        ('{"step": 200}', "test_accuracy is missing"),
        ('{"step": 200, "test_accuracy": NaN}', "not a number"),
        ('{"step": 200, "test_accuracy": 50}', "a number from 0 to 1: 50"),
        ('{"step": 1e30, "test_accuracy": 0.5}', "one of the steps 1 to 400"),
        ('{"step": 1.5, "test_accuracy": 0.5}', "one of the steps 1 to 400"),
        ('{"step": 401, "test_accuracy": 0.5}', "one of the steps 1 to 400"),
        ('{"step": "2", "test_accuracy": 0.5}', "step is not one of the steps"),
        ('{"step": 50, "test_accuracy": 0.5}', "step 50 after 100"),
        ("[1]", "not a JSON object"),
    ],
)
def test_damaged_lines_are_named(tmp_path, bad, reason):
    good = '{"step": 100, "test_accuracy": 0.5}'
    write_run(tmp_path, 0, 0, [], lines=[good, bad])
    with pytest.raises(ExperimentError, match=reason) as caught:
        report.write_report(tmp_path)
    assert "metrics.jsonl, line 2: " in str(caught.value)


def test_a_line_cut_short_says_how_to_go_on(tmp_path):
    folder = write_run(tmp_path, 0, 0, [0.5])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 200, "test_acc')
    with pytest.raises(ExperimentError, match="line 2: cut short") as caught:
        report.write_report(tmp_path)
    assert "give the same command again" in str(caught.value)


def test_a_finished_run_without_its_last_line_is_refused(tmp_path):
    folder = write_run(tmp_path, 0, 0, [0.5] * 3)
    (folder / "final.weights.h5").write_text("")
    with pytest.raises(ExperimentError, match="ends at step 300, but the run"):
        report.write_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("condition", 12),
        ("steps", "20"),
        ("steps", None),
        ("steps", float("inf")),
        ("dataset", 5),
        ("dataset_version", 3),
        ("continued_by", 5),
        ("continued_by", [1]),
        ("continued_by", None),
    ],
)
def test_facts_of_a_wrong_kind_are_named(tmp_path, name, value):
    path = write_run(tmp_path, 0, 0, [0.5] * 4) / "run.json"
    facts = json.loads(path.read_text()) | {name: value}
    path.write_text(json.dumps(facts))
    with pytest.raises(ExperimentError, match=f"run.json: {name} is not "):
        report.write_report(tmp_path)


def test_a_failed_report_leaves_the_earlier_one(tmp_path, monkeypatch):
    write_run(tmp_path, 0, 0, [0.5] * 4)
    path = report.write_report(tmp_path)
    before = path.read_bytes()
    write_run(tmp_path, 1, 0, [0.5] * 4)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(ExperimentError, match="No space left"):
        report.write_report(tmp_path)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob("**/.*"))


def test_program_reports_and_fails_in_one_line(tmp_path):
    results = tmp_path / "results"
    write_run(results, 0, 0, [0.5] * 4)
    done = run_program(f"--results={results}")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"wrote {results / 'report.html'}\n"
    (results / "0/0/run.json").write_text("{\n  half")
    for flags, words in (
        ([f"--results={results}"], "run.json, line 2: not JSON"),
        ([f"--results={tmp_path / 'absent'}"], "does not exist"),
        ([f"--results={'x' * 300}"], "does not exist"),
        (
            [f"--results={results / '0'}"],
            f"{results / '0'} is no folder of results, but {results} is",
        ),
        ([f"--results={tmp_path}"], f"give --results={results}"),
    ):
        failed = run_program(*flags)
        assert failed.returncode == 1
        assert words in failed.stderr
        assert failed.stderr.count("\n") == 1


def test_unwritable_output_is_one_error(tmp_path):
    write_run(tmp_path, 0, 0, [0.5] * 4)
    (tmp_path / "report.html").mkdir()
    with pytest.raises(ExperimentError, match="cannot write"):
        report.write_report(tmp_path)


def test_curves_that_are_none_are_refused(tmp_path):
    write_run(tmp_path / "results", 2, 0, [0.5] * 4)
    curve = tmp_path / "curves.csv"
    for text, words in (
        ("a,b\n1,2\n", "line 2: not a row"),
        ("condition,step,test_accuracy\n0,x,0.5\n", "line 2: not a row"),
        ("condition,step,test_accuracy\n0,1,nan\n", "line 2: not a row"),
        ("condition,step,test_accuracy\n0,-1,0.5\n", "line 2: not a row"),
        (
            "condition,step,test_accuracy\n0,1,0.5\n",
            "has 1 of the 10 rows or more",
        ),
        ("condition,step\n" + "x" * 200_000, "cannot read"),
        ("", "has no rows"),
    ):
        curve.write_text(text)
        with pytest.raises(ExperimentError, match=words):
            report.write_report(tmp_path / "results", curve)
    with pytest.raises(ExperimentError, match="cannot read"):
        report.write_report(tmp_path / "results", tmp_path / "absent.csv")


@pytest.mark.parametrize(
    "facts, before, after",
    [
        ({"distribution": "none", "replicas": 1}, "python", ""),
        (
            {"distribution": "mirrored", "replicas": 2},
            "python",
            " --cpu_devices=2",
        ),
        (
            {"distribution": "mirrored", "replicas": 2, "device": "GPU:0"},
            "python",
            "",
        ),
        (
            {"distribution": "data_parallel", "replicas": 4, "backend": "jax"},
            "python",
            " --cpu_devices=4",
        ),
        (
            {"distribution": "ddp", "replicas": 3, "backend": "torch"},
            "torchrun --nproc_per_node=3",
            "",
        ),
        (
            {"distribution": "multiworker", "replicas": 2},
            'TF_CONFIG=\'{"cluster": {"worker": ["127.0.0.1:2222", '
            '"127.0.0.1:2223"]}, "task": {"type": "worker", "index": 0}}\' '
            "python",
            "",
        ),
    ],
)
def test_the_command_that_repeats_a_run(tmp_path, facts, before, after):
    write_run(tmp_path, 0, 0, [0.1, 0.2], synchronized=False, **facts)
    page = report.write_report(tmp_path).read_text()
    (commands,) = re.findall("<pre.*?>(.*?)</pre>", page, flags=re.DOTALL)
    command = html.unescape(commands).splitlines()[0]
    backend = facts.get("backend", "tensorflow")
    assert command == (
        f"KERAS_BACKEND={backend} {before} -m experiments.train "
        "--condition=N --seed=N --output=RESULTS --dataset=cifar10 "
        "--steps=400 --eval_every=100 --batch_size=128 --optimizer=adam "
        "--learning_rate=0.001 --input=raw --layer=keras_bn "
        f"--placement=after --distribution={facts['distribution']}{after}"
    )
    several = facts["distribution"] == "multiworker"
    assert ("start one worker for each" in page) == several
