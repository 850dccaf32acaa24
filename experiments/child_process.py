"""A process of its own for what one Python process cannot have twice.

Keras runs on one backend per process. A program starts a module of this
package as a child, gives it a request, and hears its answers as they come.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


class ChildError(Exception):
    """A child process failed; the message is one line."""


def ask(
    module: str,
    request: object,
    environment: dict[str, str],
    on_answer: Callable[[dict], None],
) -> None:
    """Runs a module in a fresh process until it ends.

    Args:
        module: name of the module; it calls `answering` first.
        request: what JSON can hold; the child reads it on standard input.
        environment: added to this process's.
        on_answer: called with each answer.

    Raises:
        ChildError: the process failed; the last line it wrote says how.
    """
    with tempfile.TemporaryFile("w+") as stderr:
        child = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=os.environ | environment,
            cwd=Path(__file__).parents[1],
        )
        try:
            # A child that died at once is told of below, by its last line.
            with contextlib.suppress(BrokenPipeError), child.stdin:
                child.stdin.write(json.dumps(request))
            for line in child.stdout:
                on_answer(json.loads(line))
            child.wait()
        finally:
            # An interruption must not leave it behind, going on.
            child.kill()
            child.wait()
        if child.returncode:
            stderr.seek(0)
            lines = stderr.read().strip().splitlines() or ["no message"]
            raise ChildError(f"exit code {child.returncode}: {lines[-1]}")


def answering() -> Callable[..., None]:
    """Returns, in a child, the function `answer(**line)`.

    From now on standard output goes to standard error: what a framework
    prints must not land among the answers.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(**line) -> None:
        print(json.dumps(line), file=answers, flush=True)

    return answer
