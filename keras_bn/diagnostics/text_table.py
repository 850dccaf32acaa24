"""A table in plain text."""


def text_table(header, rows):
    """Columns as wide as they need to be; numbers are to be text already."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(f"{x:<{w}}" for x, w in zip(line, widths)).rstrip()
        for line in lines
    )
