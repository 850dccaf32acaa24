"""What `audit` found, as a table, as HTML and as JSON."""

import dataclasses
import html
import json
import math
import textwrap

from keras_bn.diagnostics import thresholds
from keras_bn.diagnostics.text_table import text_table
from keras_bn_checks import printable

_COLUMNS = 100
_NAME = 34
_WORST = 8


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        layer: Name of the layer; None: it is of the whole model.
        what: What was found, a few words.
        measured: Float.
        threshold: Float, above which it is a finding.
        cause: The likely cause, a sentence.
        remedy: What to do, as a call to type.
    """

    layer: str | None
    what: str
    measured: float
    threshold: float
    cause: str
    remedy: str


@dataclasses.dataclass(frozen=True)
class LayerDistance:
    """How far the moving statistics of a layer are from those of the data.

    Attributes:
        layer: Name of the layer.
        positions: Float, how many positions of a channel the data had.
        mean_distance: Float: the root mean square over channels of the
            difference of the means, in standard deviations
            `sqrt(variance + epsilon)` of the data.
        variance_log_ratio: Float, the same of `log((moving variance +
            epsilon) / (variance + epsilon))`.
    """

    layer: str
    positions: float
    mean_distance: float
    variance_log_ratio: float


@dataclasses.dataclass(frozen=True)
class Scores:
    """How the two modes compare.

    Attributes:
        name: "accuracy" or "loss".
        in_inference, with_batch: Floats, with the moving statistics and with
            those of the batch.
        lost_with_batch: Float, by how much the batch's statistics do worse,
            negative where they do better; of a loss in its logarithm, of one
            that may be negative as a share of its mean size.
        standard_error: Float, of `lost_with_batch`.
        threshold: Float, above which the worse mode is a finding.
    """

    name: str
    in_inference: float
    with_batch: float
    lost_with_batch: float
    standard_error: float
    threshold: float


@dataclasses.dataclass(frozen=True)
class AuditReport:
    """What `audit` found; printed as a table, shown by notebooks as HTML.

    Attributes:
        status: "healthy", "findings" or "not trained".
        findings: List of `Finding`; of the whole model first.
        layers: List of `LayerDistance`, in order; empty without data.
        output_gap: Float or None: the root mean square of the difference
            between the outputs in both modes, in standard deviations of the
            outputs. None without data.
        scores: `Scores`, or None without labels.
        samples: Int, how many samples were read; 0 without data.
        recalibrated: Whether the statistics are those that `recalibrate` set
            in this process.
    """

    status: str
    findings: list
    layers: list
    output_gap: float | None
    scores: Scores | None
    samples: int
    recalibrated: bool = False

    @property
    def ok(self):
        """Whether the status is "healthy"."""
        return self.status == "healthy"

    def to_json(self):
        """The report as strict JSON; what is not finite becomes null."""
        content = {"ok": self.ok, **dataclasses.asdict(self)}
        return json.dumps(_finite(content), indent=2, allow_nan=False)

    def __str__(self):
        parts = ["\n".join(self._lines())]
        groups = _grouped(self.findings)
        if groups:
            parts.append(text_table(_HEADER, [_row(x) for x in groups]))
        parts += [
            "\n".join([_wrapped(cause), _wrapped(f"-> {remedy}", "   ")])
            for cause, remedy in _explained(groups)
        ]
        if self.layers:
            parts.append(text_table(_HEADER_OF_LAYERS, self._worst()))
        return printable("\n\n".join(parts))

    def _repr_html_(self):
        parts = [f"<p>{html.escape(line)}</p>" for line in self._lines()]
        groups = _grouped(self.findings)
        if groups:
            parts.append(_html_table(_HEADER, [_row(x) for x in groups]))
        parts += [
            f"<p>{html.escape(cause)}<br><code>{html.escape(remedy)}</code></p>"
            for cause, remedy in _explained(groups)
        ]
        if self.layers:
            parts.append(_html_table(_HEADER_OF_LAYERS, self._worst()))
        return "\n".join(parts)

    def _lines(self):
        yield f"Batch normalization: {self.status}."
        if self.output_gap is not None:
            yield (
                f"Outputs in inference and with the batch's statistics: "
                f"{self.output_gap:.3g} standard deviations apart "
                f"({self.samples:,} samples)."
            )
        if self.scores is not None:
            digits = ".3f" if self.scores.name == "accuracy" else ".3g"
            yield (
                f"{self.scores.name.capitalize()}: "
                f"{self.scores.in_inference:{digits}} in inference, "
                f"{self.scores.with_batch:{digits}} with the batch's "
                "statistics."
            )
        if self.ok and self._lags() and not self.recalibrated:
            yield (
                "The moving average lags behind: keras_bn.recalibrate(model, "
                "data) brings what it costs."
            )

    def _lags(self):
        """Whether what is lost in inference is real, if no illness."""
        scores = self.scores
        return scores is not None and (
            -scores.lost_with_batch
            > thresholds.SCORE_LOST
            + thresholds.STANDARD_ERRORS * scores.standard_error
        )

    def _worst(self):
        def size(layer):
            return -max(layer.mean_distance, layer.variance_log_ratio)

        worst = sorted(self.layers, key=size)[:_WORST]
        return [
            [
                _short(one.layer),
                f"{one.mean_distance:.3g}",
                f"{one.variance_log_ratio:.3g}",
            ]
            for one in worst
        ]


_HEADER = ["layer", "found", "measured", "threshold"]
_HEADER_OF_LAYERS = [
    "layer, the farthest first",
    "means off by",
    "log variance off by",
]


def _grouped(findings):
    """Lists of findings that differ in the layer alone, the worst first."""
    groups = {}
    for one in findings:
        key = one.what, one.threshold, one.cause, one.remedy, one.layer is None
        groups.setdefault(key, []).append(one)
    return [sorted(x, key=lambda f: -f.measured) for x in groups.values()]


def _row(group):
    worst = group[0]
    name = "(model)" if worst.layer is None else _short(worst.layer)
    if len(group) > 1:
        name += f" and {len(group) - 1} more"
    return [name, worst.what, f"{worst.measured:.3g}", f"{worst.threshold:.3g}"]


def _explained(groups):
    """Cause and remedy of the groups, each pair once."""
    return dict.fromkeys((x[0].cause, x[0].remedy) for x in groups)


def _short(name):
    if len(name) <= _NAME:
        return name
    # The end is what differs.
    return f"{name[:10]}...{name[13 - _NAME :]}"


def _wrapped(text, indent=""):
    return textwrap.fill(
        text,
        _COLUMNS,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _html_table(header, rows):
    def line(cells, tag):
        cells = "".join(f"<{tag}>{html.escape(x)}</{tag}>" for x in cells)
        return f"<tr>{cells}</tr>"

    lines = [line(header, "th"), *(line(row, "td") for row in rows)]
    return f"<table>{''.join(lines)}</table>"


def _finite(content):
    if isinstance(content, dict):
        return {k: _finite(v) for k, v in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(x) for x in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content
