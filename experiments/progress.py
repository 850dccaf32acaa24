"""How far a program is: a bar on a terminal, elsewhere a line now and then."""

import sys
import threading

import tqdm

SECONDS = 30.0  # between lines where there is no terminal
_FORMAT = "{desc}: {n_fmt} of {total_fmt}{unit} ({percentage:.0f}%){postfix}"
_LEFT = ", {remaining} left"
# Bars that stand for lines; an outer one before those in it.
_open = []


def bar(desc: str, total: int, unit: str, **options) -> tqdm.tqdm:
    """Returns a bar of tqdm's, to be closed.

    Where stderr is no terminal, a line on it says every `SECONDS` how far all
    open bars are.

    Args:
        desc: what is done.
        total: how many there are to do.
        unit: what is counted, as " steps".
        **options: of tqdm.
    """
    shown = not options.get("disable")
    kind = _Lines if shown and not sys.stderr.isatty() else tqdm.tqdm
    return kind(desc=desc, total=total, unit=unit, **options)


class _Lines(tqdm.tqdm):
    def __init__(self, **options):
        # "gui" is tqdm's word for a bar that displays itself.
        self._closed = threading.Event()
        super().__init__(gui=True, bar_format=_FORMAT, **options)
        _open.append(self)
        if self is _open[0]:
            threading.Thread(target=self._say, daemon=True).start()

    def display(self, msg=None, pos=None):
        """Says nothing: the thread does."""

    def close(self):
        with self.get_lock():
            # By identity: tqdm's bars are equal where their places are.
            _open[:] = [bar for bar in _open if bar is not self]
            self._closed.set()
        super().close()

    def _say(self):
        while not self._closed.wait(SECONDS):
            with self.get_lock():
                if not self._closed.is_set():
                    text = "; ".join(map(str, reversed(_open)))
                    print(text, file=sys.stderr, flush=True)

    def __str__(self):
        begun = self.n > self.initial
        self.bar_format = _FORMAT + (_LEFT if begun else "")
        return super().__str__()
