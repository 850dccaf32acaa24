"""The article's experiment as programs, run from a clone of the repository.

Each program is ``python -m experiments.NAME``; its logic sits in functions
that a test or a notebook can call. Keras is imported by those that need it,
and not by their modules: its backend may be one that does not exist, and a
program says so in one line.
"""

import contextlib
import os
import platform
import signal
import sys
from collections.abc import Callable
from collections.abc import Iterator
from importlib.util import find_spec

from absl import app
from absl import flags
from absl import logging

from keras_bn_command import tensorflow_imported_quietly

# TensorFlow's native start-up lines would bury a program's own one line.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# TensorFlow turns oneDNN on by itself only where the CPU has AVX-512 VNNI. It
# is faster on other x86 CPUs too, and a run depends less on which one it is.
if platform.machine().lower() in ("x86_64", "amd64"):
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
# Processes that share the runs of a grid share a GPU too: none takes all of
# its memory at once, as TensorFlow and JAX do unless they are told.
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

BACKENDS = ("tensorflow", "jax", "torch")

# What asks a program to stop: Ctrl-C, `kill`, a terminal that closes (Windows
# has no signal for it).
SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP")
    if hasattr(signal, name)
)

# The signals that asked this process to stop.
_interruptions = []
# How many blocks that a signal may not cut short are being run.
_deferring = []


class ExperimentError(ValueError):
    """What the user gave cannot be used; the message is one line."""


def launch(
    main: Callable[[list[str]], int | None], takes_arguments: bool = False
) -> None:
    """Runs ``main(argv)`` as a program, and ends the process.

    An `ExperimentError` is printed as one line and gives exit code 1, and so
    is a flag that cannot be used, and a lack of memory. SIGINT (Ctrl-C),
    SIGTERM and SIGHUP raise KeyboardInterrupt, which is printed as one line
    and gives exit code 130, 143 and 129.

    Args:
        main: is given the program's name and what absl's flags left over;
            returns the exit code, None being 0.
        takes_arguments: whether flags may leave anything over.
    """

    def guarded(argv):
        # Libraries' progress notes would bury the program's own lines. absl
        # raises the verbosity to INFO once the flags are read.
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        try:
            if len(argv) > 1 and not takes_arguments:
                raise ExperimentError(
                    f"every setting is a flag. Received: {argv[1]!r}; "
                    "--help lists the flags"
                )
            with tensorflow_imported_quietly():
                return main(argv)
        except ExperimentError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt as interruption:
            how_to_go_on = str(interruption) or "give the same command again"
            print(f"interrupted: {how_to_go_on}", file=sys.stderr)
            return 128 + signal_received()
        except Exception as error:
            if not _lacks_memory(error):
                raise
            print(
                f"error: no memory is left ({type(error).__name__}): end what "
                "else uses the device, or make batches smaller",
                file=sys.stderr,
            )
            return 1

    sys.unraisablehook = _report_unraisable
    for number in SIGNALS:
        # What started this program may have told it to ignore the signal.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    app.run(guarded, flags_parser=_parse_flags)


def signal_received() -> int:
    """Returns the signal that asked this process to stop; SIGINT if none."""
    return (_interruptions or [signal.SIGINT])[0]


class Stopped(KeyboardInterrupt):
    """The program was told to stop, and does so at a place of its choice."""


def raise_if_interrupted() -> None:
    """Raises an interruption that was deferred, or swallowed by a library.

    What a signal raises is lost where Python was called from C, such as in
    JAX's callback for the garbage collector. A long loop calls this.

    Raises:
        Stopped: the program was told to stop.
    """
    if _interruptions:
        raise Stopped


@contextlib.contextmanager
def interruptions_deferred() -> Iterator[None]:
    """Lets a block stop where it can: where it calls `raise_if_interrupted`.

    A second signal raises KeyboardInterrupt at once.
    """
    _deferring.append(True)
    try:
        yield
    finally:
        _deferring.pop()


def require_backend() -> None:
    """Finds out whether Keras has a backend to train on; imports Keras.

    Raises:
        ExperimentError: it has not.
    """
    name = os.environ.get("KERAS_BACKEND")
    if name in BACKENDS and not find_spec(name):
        # Found out before Keras has imported all else.
        raise _no_backend(f"{name} is not installed")
    if name and name not in BACKENDS:
        raise _no_backend(f"{name} cannot train")
    try:
        import keras

        name = keras.backend.backend()
    except (ImportError, ValueError) as error:
        raise _no_backend(str(error).split("\n")[0]) from error
    if name not in BACKENDS:
        raise _no_backend(f"{name} cannot train")


def _no_backend(reason):
    return ExperimentError(
        f"Keras has no backend to train on ({reason}): set KERAS_BACKEND to "
        f"one of {', '.join(BACKENDS)} that is installed"
    )


def _lacks_memory(error):
    # TensorFlow, JAX and PyTorch have a class or a status for it.
    said = f"{type(error).__name__} {error}".lower().replace("_", "")
    signs = ("resourceexhausted", "out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(x in said for x in signs)


def _interrupt(number, frame):
    _interruptions.append(number)
    if not _deferring or len(_interruptions) > 1:
        raise KeyboardInterrupt


def _report_unraisable(unraisable):
    # A swallowed interruption is remembered: it needs no traceback.
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)


def _parse_flags(argv):
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        message = " ".join(str(error).split())
        print(f"error: {message} (--help lists the flags)", file=sys.stderr)
        sys.exit(1)
