"""TensorBoard's event files, written without TensorFlow."""

import os
import time

import keras

from keras_bn.argument_checks import shown


class EventFiles:
    """Curves of several runs, each in a folder of its own.

    Args:
        log_dir: Path of the folder that holds those of the runs.

    Raises:
        ValueError: `log_dir` is no path, or a file is there.
        ImportError: the package `tensorboard` is not installed.
    """

    def __init__(self, log_dir):
        if not isinstance(log_dir, (str, os.PathLike)) or not str(log_dir):
            raise ValueError(
                "`log_dir` must be the path of a folder, or None. "
                f"Received: log_dir={shown(log_dir)}."
            )
        if os.path.exists(log_dir) and not os.path.isdir(log_dir):
            raise ValueError(
                "`log_dir` must be a folder, and a file is there. "
                f"Received: log_dir={shown(log_dir)}."
            )
        try:
            from tensorboard.compat.proto import event_pb2
            from tensorboard.plugins.scalar.summary import scalar_pb
            from tensorboard.summary.writer.event_file_writer import (
                EventFileWriter,
            )
        except ImportError as error:
            raise ImportError(
                "Curves need the package tensorboard, which cannot be "
                f"imported. Received: log_dir={shown(log_dir)}. Run "
                "`pip install tensorboard`."
            ) from error
        self._log_dir = log_dir
        self._event = event_pb2.Event
        self._scalar = scalar_pb
        self._writer = EventFileWriter
        self._writers = {}

    def write(self, run, step, values):
        """Adds a point to each curve.

        Args:
            run: Name of the folder.
            step: Int, the point's place.
            values: Dictionary from tags to floats.
        """
        if run not in self._writers:
            path = os.path.join(self._log_dir, run)
            self._writers[run] = self._writer(path)
        event = self._event(step=step, wall_time=time.time())
        for tag, value in values.items():
            event.summary.MergeFrom(self._scalar(tag, value))
        self._writers[run].add_event(event)

    def flush(self):
        for writer in self._writers.values():
            writer.flush()

    def close(self):
        for writer in self._writers.values():
            writer.close()
        self._writers = {}


def is_chief(model):
    """Whether this process writes for all that train a model together."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        return model.distribute_strategy.extended.should_save_summary
    if backend == "jax":
        import jax

        return jax.process_index() == 0
    from torch import distributed

    is_alone = not (distributed.is_available() and distributed.is_initialized())
    return is_alone or distributed.get_rank() == 0
