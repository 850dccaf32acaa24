"""Processes of their own, for what this one must not or cannot hold."""

import contextlib
import json
import os
import subprocess
import sys

from keras_bn.serving.errors import ExportError
from keras_bn.serving.errors import one_line

# A line of a child that begins so is its answer.
ERROR = "error: "


def run(what, arguments, request, environment):
    """Runs Python in a process of its own until it ends.

    Args:
        what: What it does, for the message: "checking the export".
        arguments: List of str, of Python.
        request: What JSON can hold; the child reads it on standard input.
        environment: Dictionary, added to this process's.

    Raises:
        ExportError: The child failed, for the reason in its last line.
    """
    paths = [os.path.abspath(path) for path in sys.path]
    child = subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=os.environ
        | {
            # It finds the modules that this process finds.
            "PYTHONPATH": os.pathsep.join(paths),
            # What this process holds of an accelerator is not there twice.
            "CUDA_VISIBLE_DEVICES": "-1",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        | environment,
    )
    try:
        _, stderr = child.communicate(json.dumps(request))
    finally:
        # An interruption must not leave it behind, going on.
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        child.wait()
    if child.returncode:
        lines = stderr.strip().splitlines() or ["no message"]
        said = [x[len(ERROR) :] for x in lines if x.startswith(ERROR)]
        reason = said[-1] if said else lines[-1]
        raise ExportError(
            f"{what}, a process of its own failed with exit code "
            f"{child.returncode}: {one_line(reason)}. Nothing was published."
        )


def fail(error):
    """Ends a child with a message that `run` finds."""
    print(f"{ERROR}{one_line(error)}", file=sys.stderr, flush=True)
    sys.exit(1)
