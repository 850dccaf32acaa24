"""The benchmark's measurements as tables."""

from rich import box
from rich.console import Console
from rich.table import Table


def print_tables(report: dict, console: Console) -> None:
    """Prints what `benchmark.run` gathered, in milliseconds per call."""
    groups = {}
    for row in report["measurements"]:
        groups.setdefault((row["backend"], tuple(row["shape"])), []).append(row)
    for (backend, shape), rows in groups.items():
        table = Table(
            title=f"{backend}, {'x'.join(map(str, shape))} "
            f"{report['dtype']}, milliseconds",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        table.add_column("operation", no_wrap=True)
        table.add_column("layer", no_wrap=True)
        for heading in ("CPU", "x Keras", "x floor", "wall", "x Keras"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(
                row["operation"],
                row["name"],
                f"{1e3 * row['cpu_seconds']['median']:.3f}",
                f"{row['cpu_to_keras']:.2f}",
                f"{row['cpu_to_floor']:.2f}",
                f"{1e3 * row['wall_seconds']['median']:.3f}",
                f"{row['wall_to_keras']:.2f}",
            )
        console.print(table)
    for name, step in report["training_step"].items():
        console.print(
            f"training step, {name}: "
            f"{1e3 * step['cpu_seconds']['median']:.1f} ms CPU "
            f"({step['cpu_added_percent']:+.1f}%), "
            f"{1e3 * step['wall_seconds']['median']:.1f} ms wall",
            highlight=False,
        )
    for left_out in report["left_out"]:
        console.print(f"left out: {left_out}", highlight=False)
    settings = " ".join(f"{k}={v}" for k, v in report["environment"].items())
    console.print(f"measured with {settings}", highlight=False)
