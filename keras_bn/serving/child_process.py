"""Processes of their own, for what this one must not or cannot hold."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

from keras_bn.serving.errors import ExportError
from keras_bn.serving.errors import one_line

_START = Path(__file__).with_name("child_start.py")
# A line of a child that begins so is its answer.
ERROR = "error: "


def run(what, program, request, environment, modules=()):
    """Runs a program of this package in a process of its own until it ends.

    It finds the modules that this process finds, and those of `modules` in the
    same files. Python looks for none in the current folder unless this process
    does, and there last.

    Args:
        what: What it does, for the message: "checking the export".
        program: Path of the program.
        request: What JSON can hold; the program reads it on standard input.
        environment: Dictionary, added to this process's.
        modules: Names of modules that were imported here.

    Raises:
        ExportError: The child failed, for the reason in its last line.
    """
    start = {
        "program": str(program),
        "path": _without_current_folder_first(sys.path),
        "files": _files_of(modules),
    }
    child = subprocess.Popen(
        [sys.executable, *_flags(), str(_START)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=os.environ
        | {
            # Python reads them before the program can set `sys.path`.
            "PYTHONPATH": os.pathsep.join(
                x
                for x in os.environ.get("PYTHONPATH", "").split(os.pathsep)
                if os.path.isabs(x)
            ),
            "PYTHONSAFEPATH": "1",
            # What this process holds of an accelerator is not there twice.
            "CUDA_VISIBLE_DEVICES": "-1",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        | environment,
    )
    try:
        _, stderr = child.communicate(
            f"{json.dumps(start)}\n{json.dumps(request)}"
        )
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


def _flags():
    """Python's flags: this process's that are about where it finds modules."""
    flags = ["-P"]
    if sys.flags.ignore_environment:
        flags.append("-E")
    if sys.flags.no_user_site:
        flags.append("-s")
    return flags


def _without_current_folder_first(path):
    """`sys.path` with what depends on the current folder at its end.

    This process may have been in another folder when it imported.
    """
    relative = [os.path.abspath(x) for x in path if not os.path.isabs(x)]
    return [x for x in path if os.path.isabs(x)] + relative


def _files_of(modules):
    """The files of top-level modules and packages; those that have one."""
    found = {}
    for name in {name.partition(".")[0] for name in modules}:
        spec = getattr(sys.modules.get(name), "__spec__", None)
        if spec is not None and os.path.isfile(spec.origin or ""):
            folders = spec.submodule_search_locations
            found[name] = (
                os.path.abspath(spec.origin),
                folders and [os.path.abspath(x) for x in folders],
            )
    return found


def fail(error):
    """Ends a child with a message that `run` finds."""
    print(f"{ERROR}{one_line(error)}", file=sys.stderr, flush=True)
    sys.exit(1)
