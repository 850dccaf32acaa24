"""The chapters of the report about the studies, and the table of claims."""

from collections.abc import Sequence
from pathlib import Path

from experiments import report_figures
from experiments import studies
from experiments.report_html import commands
from experiments.report_html import items
from experiments.report_html import paragraphs
from experiments.report_html import section
from experiments.report_html import table
from experiments.studies import records
from experiments.studies.study import FOLDER
from experiments.studies.study import Results
from experiments.studies.verdict import NOT_ASSESSED
from experiments.studies.verdict import NOT_SUPPORTED

# Where the studies are, below a folder of results.
FILES = f"{FOLDER}/*/{records.FILE}"
HEADINGS = ("study", "claim", "verdict", "effect")


def read(results_dir: Path | str) -> list[Results]:
    """Reads the studies below a folder of results, in their order.

    Raises:
        ExperimentError: a file is damaged.
    """
    found = (studies.find(name).read(results_dir) for name in studies.NAMES)
    return [results for results in found if results is not None]


def summary_rows(found: Sequence[Results]) -> list[tuple[str, ...]]:
    """Returns the rows of the table of claims, as `HEADINGS` says."""
    rows = []
    for results in found:
        study = results.study
        rows.append((study.name, study.claim, results.verdict, _main(results)))
    return rows


def markdown_rows(found: Sequence[Results]) -> list[str]:
    """Returns the rows of the table of claims as the README has them."""
    return [
        f"| `{name}` | {claim} | {verdict} | {effect} |"
        for name, claim, verdict, effect in summary_rows(found)
    ]


def summary(found: Sequence[Results]) -> str:
    """The table of all claims; nothing if there are no studies."""
    if not found:
        return ""
    return section(
        "The articles' claims, measured",
        table(
            f"Measured on {_data(found[0])}, in small networks. A verdict "
            "needs a 95% interval over the seeds that excludes zero, at least "
            "the effect that the study declares beforehand, and a reference "
            "whose loss has flattened; not supported also means that the "
            "interval excludes that effect.",
            HEADINGS,
            summary_rows(found),
            "words",
        ),
    )


def chapters(found: Sequence[Results]) -> tuple[str, dict[str, str]]:
    """A chapter for each study, and name -> SVG of its figure."""
    parts, files = [], {}
    for results in found:
        name = f"study_{results.study.name}"
        files[name] = results.study.figure(results)
        parts.append(_chapter(results, files[name]))
    return "\n".join(parts), files


def _main(results):
    """The effect of the first answer that is assessed, if one is."""
    answers = results.answers
    assessed = [x for x in answers if x.outcome != NOT_ASSESSED]
    one = (assessed or answers)[0]
    return f"{one.question.words}: {one.effect}"


def _chapter(results, svg):
    study, caption = results.study, results.study.caption(results)
    return section(
        f"Study: {study.title}",
        paragraphs(
            [
                f"Claim ({study.source}): {study.claim}",
                f"Verdict: {results.verdict}.",
            ]
        ),
        items(x.sentence for x in results.answers),
        report_figures.figure(
            f"the study of {study.name.replace('_', ' ')}",
            svg,
            caption,
            f"{study.title}. {caption}",
        ),
        _contradiction(results),
        paragraphs(
            [
                f"What would change it: {study.would_change}",
                f"{_runs(results)} on {_data(results)}.",
            ]
        ),
        commands(
            f"python -m experiments.studies {study.name}",
            f"Command of the study {study.name}",
        ),
    )


def _contradiction(results):
    """Says what the verdict is against, and what Keras's layer says."""
    study, sentences = results.study, [results.study.against]
    refuted = [
        x.question for x in results.answers if x.outcome == NOT_SUPPORTED
    ]
    if refuted:
        sentences.append(
            f"This contradicts the claim of {study.source}: it does not hold "
            f"{'; '.join(x.when for x in refuted)}."
        )
    theirs = results.answers_of_keras
    if refuted and not theirs:
        sentences.append(
            "Whether it is the doing of our layer is asked by python -m "
            f"experiments.studies {study.name} --layer=keras."
        )
    text = paragraphs(sentences)
    if theirs:
        text += paragraphs(
            ["With keras.layers.BatchNormalization in place of ours:"]
        ) + items(x.sentence for x in theirs)
    return text


def _runs(results):
    records = [x for own in results.runs.values() for x in own.values()]
    facts = results.facts
    seconds = sum(
        x.lines["train_seconds"].sum()
        for x in records
        if "train_seconds" in x.lines
    )
    text = f"{len(records)} runs"
    if seconds:
        text += f", {seconds / 60:.1f} minutes of training"
    return f"{text}, with {facts['backend']}"


def _data(results):
    facts = results.facts
    name = "CIFAR-10" if facts["dataset"] == "cifar10" else facts["dataset"]
    return f"{name} {facts['dataset_version']} ({facts['dataset_copy']})"
