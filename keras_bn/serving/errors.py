"""What goes wrong in an export after its arguments were found good."""


class ExportError(RuntimeError):
    """Nothing was published; the message is the sentence that says why."""


def one_line(error):
    """The message of an exception, or a text, as one line."""
    return " ".join(str(error).split())[:600].rstrip(".")
