"""Imports Keras on its backend, or says what is wrong with that.

The first import of the package. It raises an ImportError of one sentence where
Keras or its backend is not installed, the backend's import fails, or this
package does not run on it.
"""

import importlib.util
import json
import os
import sys
import traceback

SUPPORTED = ("tensorflow", "jax", "torch")


def is_installed(module):
    """Whether a module is there to be imported; it is not imported."""
    try:
        # None stands there for a module that may not be imported.
        return (
            sys.modules.get(module, module) is not None
            and importlib.util.find_spec(module) is not None
        )
    except (ImportError, ValueError):
        return False


def _explain(error):
    """Raises what a failed import of Keras means, unless that is unknown."""
    if not is_installed("keras"):
        raise ImportError(
            "keras_bn needs Keras 3 and a backend. Run "
            '`pip install "keras-bn[tensorflow]"`, or with [jax] or [torch].'
        ) from None
    name = _chosen()[0]
    if name not in SUPPORTED:
        raise _unsupported(name) from None
    if not is_installed(name):
        raise _missing(name) from None
    modules = (
        frame.f_globals.get("__name__", "")
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )
    if any(module.partition(".")[0] == name for module in modules):
        reason = " ".join(str(error).split())[:400].rstrip(".")
        raise ImportError(
            f"Keras runs on {name} ({_chosen()[1]}), which is installed but "
            f"cannot be imported: {type(error).__name__}: {reason}. Install "
            "it again, or set KERAS_BACKEND to another one."
        ) from error


def _missing(name):
    others = [x for x in SUPPORTED if x != name and is_installed(x)]
    if others:
        way_out = f"set KERAS_BACKEND to {' or '.join(others)}"
    else:
        extras = [f"[{x}]" for x in SUPPORTED if x != name]
        way_out = f"with {' or '.join(extras)} and set KERAS_BACKEND to that"
    return ImportError(
        f"Keras runs on {name} ({_chosen()[1]}), which is not installed. Run "
        f'`pip install "keras-bn[{name}]"`, or {way_out}.'
    )


def _unsupported(name):
    return ImportError(
        "keras_bn runs on the Keras backends tensorflow, jax and torch. "
        f"Received: {name!r} ({_chosen()[1]}). Set KERAS_BACKEND to one of the "
        "three before Keras is imported."
    )


def _chosen():
    """The backend that Keras takes, and what tells it to."""
    name = os.environ.get("KERAS_BACKEND")
    if name:
        return name, "by KERAS_BACKEND"
    folder = os.environ.get("KERAS_HOME", os.path.join("~", ".keras"))
    path = os.path.expanduser(os.path.join(folder, "keras.json"))
    try:
        with open(path, encoding="utf-8") as file:
            return str(json.load(file)["backend"]), f"by {path}"
    except (OSError, ValueError, KeyError, TypeError):
        return "tensorflow", "by default"


try:
    import keras

    NAME = keras.backend.backend()
except Exception as error:
    # A backend that is broken fails in many ways.
    _explain(error)
    raise
if NAME not in SUPPORTED:
    raise _unsupported(NAME)
