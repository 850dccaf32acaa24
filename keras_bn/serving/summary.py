"""What an export came to, in words: size, layers, check and speed."""

import os
import tempfile
import warnings

from keras_bn.diagnostics.text_table import text_table
from keras_bn.serving import served
from keras_bn.serving.export import export


def published(exported):
    """The line that says what was published, and the one about its check.

    Args:
        exported: `keras_bn.serving.export.Export`.
    """
    samples = len(next(iter(exported.inputs.values())))
    lines = [f"published {exported.path}: {megabytes(exported.path)}"]
    for what, (difference, allowed) in exported.differences.items():
        lines.append(
            f"checked on {samples} samples: {what} off by {difference:.2g} "
            f"(rounding: at most {allowed:.2g})"
        )
    return "\n".join(lines)


def folding(exported, model, **options):
    """What was folded, and what it makes of size and latency.

    Args:
        exported: `keras_bn.serving.export.Export`.
        model: What was exported.
        **options: `preprocessing` and `class_names` that it was exported with.

    Returns:
        Text of several lines.

    Raises:
        ExportError: The exported model cannot be run.
        OSError: There is no room for another copy.
    """
    report = exported.fold_report
    if report is None:
        (alone,) = served.latencies([exported.path], exported.inputs)
        return "\n".join(
            ["no batch normalization to fold", "", latencies([alone])]
        )
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # What it has to say was said of the other one.
        warnings.simplefilter("ignore")
        plain = export(
            model,
            os.path.join(folder, "plain"),
            fold=False,
            verify_on=exported.inputs,
            **options,
        ).path
        found = served.latencies([plain, exported.path], exported.inputs)
        size = megabytes(plain)
    return "\n".join(
        [
            f"folded {len(report.folded)} of {len(report)} batch "
            f"normalizations (not folded it is {size})",
            "",
            str(report),
            "",
            latencies(found),
        ]
    )


def latencies(models):
    """A table of the latencies of a model, or of it before and after.

    Args:
        models: List of one or two dictionaries from batch size to
            `keras_bn.serving.served.Latency`.
    """
    names = ["before", "after"] if len(models) == 2 else [""]
    header = ["batch"]
    for name in names:
        header += [f"{name} p50".strip(), f"{name} p99".strip()]
    if len(models) == 2:
        header.append("times as fast")
    rows = []
    for size in models[0]:
        found = [model[size] for model in models]
        row = [str(size)]
        for one in found:
            row += [f"{1e3 * x:.3f}" for x in (one.p50, one.p99)]
        if len(found) == 2:
            row.append(f"{found[0].p50 / found[1].p50:.2f}")
        rows.append(row)
    return "\n".join(
        ["latency of a batch, milliseconds, in turn:", text_table(header, rows)]
    )


def megabytes(path):
    """The size of a file, or of all files in a folder, as text."""
    total = os.path.getsize(path) if os.path.isfile(path) else 0
    for folder, _, files in os.walk(path):
        total += sum(os.path.getsize(os.path.join(folder, x)) for x in files)
    return f"{total / 1e6:.2f} MB"
