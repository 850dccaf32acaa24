"""A table in plain text."""

from keras_bn_checks import printable


def text_table(header, rows):
    """Columns as wide as they need to be; numbers are to be text already."""
    # The names in it are those of a file that may be anybody's.
    lines = [
        [printable(x).replace("\n", "\\n") for x in line]
        for line in (header, *rows)
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(f"{x:<{w}}" for x, w in zip(line, widths)).rstrip()
        for line in lines
    )
