"""The article's experiment as programs, run from a clone of the repository.

Each program is ``python -m experiments.NAME``; its logic sits in functions
that a test or a notebook can call.
"""

import os
import sys
from collections.abc import Callable

from absl import app
from absl import flags
from absl import logging

# TensorFlow's native start-up lines would bury a program's own one line.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


class ExperimentError(ValueError):
    """What the user gave cannot be used; the message is one line."""


def launch(main: Callable[[list[str]], int | None]) -> None:
    """Runs ``main(argv)`` as a program, and ends the process.

    An `ExperimentError` is printed as one line and gives exit code 1; an
    interruption is printed as one line and gives exit code 130.

    Args:
        main: is given the program's name and what absl's flags left over;
            returns the exit code, None being 0.
    """

    def guarded(argv):
        # Libraries' progress notes would bury the program's own lines. absl
        # raises the verbosity to INFO once the flags are read.
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        try:
            if len(argv) > 1:
                raise ExperimentError(
                    f"every setting is a flag. Received: {argv[1]!r}; "
                    "--help lists the flags"
                )
            return main(argv)
        except ExperimentError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt as interruption:
            print(f"interrupted: {interruption}", file=sys.stderr)
            return 130

    app.run(guarded)
