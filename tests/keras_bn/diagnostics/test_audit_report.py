"""The report of `audit`: as a table, as HTML, as JSON."""

import dataclasses
import json

from keras_bn.diagnostics.audit_report import AuditReport
from keras_bn.diagnostics.audit_report import Finding
from keras_bn.diagnostics.audit_report import LayerDistance
from keras_bn.diagnostics.audit_report import Scores

LONG = "a_backbone_of_a_hundred_layers_and_a_name_that_is_as_long_as_they_are"
FINDINGS = [
    Finding(None, "accuracy lost", 0.31, 0.1, "Stale <1>.", "mend(model)"),
    *(
        Finding(f"{LONG}_{i}", "means off by", 1.5 + i, 0.5, "Why.", "do()")
        for i in range(100)
    ),
]
LAYERS = [
    LayerDistance(f"{LONG}_{i}", 10.0, float(i), float("inf"))
    for i in range(100)
]
SCORES = Scores("accuracy", 0.2, 0.51, -0.31, 0.01, 0.1)
REPORT = AuditReport("findings", FINDINGS, LAYERS, float("nan"), SCORES, 512)


def test_text_fits_into_a_hundred_columns():
    lines = str(REPORT).splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) < 40
    text = str(REPORT)
    for part in ("findings", "0.200 in inference", " 100 ", "and 99 more"):
        assert part in text, text
    # Said once, not for each layer.
    assert text.count("do()") == 1 and text.count("mend(model)") == 1


def test_html():
    text = REPORT._repr_html_()
    assert "<table>" in text and "Stale &lt;1&gt;." in text
    assert "<code>mend(model)</code>" in text


def test_json_is_strict():
    def refuse(constant):
        raise AssertionError(constant)

    content = json.loads(REPORT.to_json(), parse_constant=refuse)
    assert content["ok"] is False and content["status"] == "findings"
    assert content["output_gap"] is None
    assert content["findings"][0] == dataclasses.asdict(FINDINGS[0])
    assert content["layers"][0]["variance_log_ratio"] is None
    assert content["scores"] == dataclasses.asdict(SCORES)


def test_what_a_lagging_average_costs_is_said():
    healthy = AuditReport("healthy", [], [], 0.5, SCORES, 512)
    assert healthy.ok and "recalibrate" in str(healthy)
    level = dataclasses.replace(SCORES, lost_with_batch=0.31)
    healthy = dataclasses.replace(healthy, scores=level)
    assert "recalibrate" not in str(healthy)
