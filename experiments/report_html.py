"""The few kinds of HTML that the report is made of."""

import html
import re
from collections.abc import Iterable
from collections.abc import Sequence


def escape(text: object) -> str:
    """Text that stands for itself in HTML."""
    return html.escape(str(text))


def paragraphs(sentences: Iterable[str], style: str = "") -> str:
    """A paragraph for each sentence that is not empty."""
    style = f' class="{style}"' if style else ""
    return "\n".join(f"<p{style}>{escape(s)}</p>" for s in sentences if s)


def items(sentences: Iterable[str]) -> str:
    """A list."""
    lines = "\n".join(f"<li>{escape(s)}</li>" for s in sentences)
    return f"<ul>\n{lines}\n</ul>"


def table(
    caption: str,
    headings: Sequence[str],
    rows: Iterable[Sequence[object]],
    style: str = "",
) -> str:
    """A table whose first column names its rows.

    Args:
        caption: above it.
        headings: of the columns.
        rows: what is in the cells.
        style: a class of the page; "words" is for cells that are sentences.
    """
    style = f' class="{style}"' if style else ""
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in headings)
    body = "\n".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        '<div class="wide" tabindex="0" role="region" '
        f'aria-label="{escape(caption.split(". ")[0])}">'
        f"<table{style}><caption>{escape(caption)}</caption>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>"
        "</table></div>"
    )


def commands(text: str, label: str) -> str:
    """Lines to be copied; the keyboard scrolls those that are too long."""
    return (
        f'<pre tabindex="0" role="region" aria-label="{escape(label)}">'
        f"{escape(text)}</pre>"
    )


def section(title: str, *parts: str) -> str:
    """A heading and what is below it; nothing if nothing is."""
    parts = [part for part in parts if part]
    if not parts:
        return ""
    name = re.sub("[^a-z0-9]+", "-", title.lower()).strip("-")
    return "\n".join([f'<h2 id="{name}">{escape(title)}</h2>', *parts])


def contents(chapters: str) -> str:
    """Links to the sections that there are, in a region of their own."""
    links = "\n".join(
        f'<li><a href="#{name}">{title}</a></li>'
        for name, title in re.findall('<h2 id="(.*?)">(.*?)</h2>', chapters)
    )
    return f'<nav aria-label="Contents"><ul>\n{links}\n</ul></nav>'
