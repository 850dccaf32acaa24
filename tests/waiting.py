"""Waiting for other processes, however slow the machine is."""

import time
from collections.abc import Callable

# Seconds; no test takes as long, and one that does will never end.
LIMIT = 20 * 60.0


def wait_until(happened: Callable[[], object], process=None) -> None:
    """Waits for something to happen, and fails where it will not.

    Args:
        happened: whether it has.
        process: `subprocess.Popen` of what makes it happen; where it ends
            before, there is nothing to wait for.
    """
    began = time.monotonic()
    while not happened():
        ended = process is not None and process.poll() is not None
        if ended and not happened():
            raise AssertionError(f"ended: {process.communicate()}")
        assert time.monotonic() - began < LIMIT
        time.sleep(0.01)
