"""TensorFlow: `tf.distribute`, with a training loop of our own.

Keras 3.15's `fit` fails under MultiWorkerMirroredStrategy, and its
`train_on_batch` weighs uneven shares of a batch alike.
"""

import contextlib
import faulthandler
import json
import os
import socket
import subprocess
import sys
import time

import keras
import numpy as np
import tensorflow as tf

from experiments import ExperimentError
from experiments.distribution.workers import Replicas
from experiments.distribution.workers import dropout_state
from experiments.distribution.workers import dropout_states
from experiments.distribution.workers import no_answer

_TASKS = ("chief", "worker")
# Says a line when the time is over, unless its input was closed before.
_SAY_LATER = """
import select, sys
if not select.select([sys.stdin], [], [], float(sys.argv[1]))[0]:
    print(sys.argv[2], file=sys.stderr)
"""


def mirrored(cpu_devices):
    """Replicas on all GPUs of this process, or on its logical CPUs."""
    if cpu_devices:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * cpu_devices
        )
    gpus = [] if cpu_devices else tf.config.list_logical_devices("GPU")
    devices = gpus or tf.config.list_logical_devices("CPU")
    return _Strategy(tf.distribute.MirroredStrategy([x.name for x in devices]))


def multiworker(time_limit):
    """Replicas on the devices of all processes that TF_CONFIG names."""
    process, addresses = _cluster()
    workers = _Strategy(None, process, len(addresses), time_limit)
    options = tf.distribute.experimental.CommunicationOptions(
        timeout_seconds=2 * time_limit
    )
    doing = "waiting for the workers of TF_CONFIG"
    with workers.together(doing, joining=True):
        if workers.processes > 1:
            _meet(process, addresses)
        with _limited(doing, time_limit):
            workers.use(
                tf.distribute.MultiWorkerMirroredStrategy(
                    communication_options=options
                )
            )
            # Has the workers' servers find one another.
            workers.sum(np.zeros(1))
    return workers


def _meet(process, addresses):
    """Waits until all processes listen, each at its own address.

    TensorFlow waits for them as well, but deaf to signals.
    """
    addresses = [x.rpartition(":") for x in addresses]
    addresses = [(host.strip("[]"), int(port)) for host, _, port in addresses]
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    own = ("", addresses[process][1])
    with socket.create_server(own, family=family, dualstack_ipv6=both):
        for address in addresses:
            while True:
                try:
                    socket.create_connection(address, timeout=1.0).close()
                    break
                except OSError:
                    time.sleep(0.1)


@contextlib.contextmanager
def _limited(doing, seconds):
    """Limits the time of what holds Python's lock while it waits.

    TensorFlow does so where it joins the cluster, so that no thread of ours
    could say anything.
    """
    speaker = subprocess.Popen(
        [
            sys.executable,
            "-c",
            _SAY_LATER,
            str(seconds),
            no_answer(doing, seconds),
        ],
        stdin=subprocess.PIPE,
        # Ctrl-C is for this process alone.
        start_new_session=True,
    )
    with open(os.devnull, "w") as nowhere:
        faulthandler.dump_traceback_later(
            seconds + 0.5, exit=True, file=nowhere
        )
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            speaker.communicate()


def _cluster():
    """Returns this process's number and all addresses, by TF_CONFIG."""
    text = os.environ.get("TF_CONFIG", "")
    try:
        config = json.loads(text)
        cluster, task = config["cluster"], config["task"]
        kind, index = task["type"], task["index"]
        addresses = [x for name in _TASKS for x in cluster.get(name, [])]
        if (
            kind not in _TASKS
            or set(cluster) - {*_TASKS}
            or not all(map(_is_address, addresses))
            or index not in range(len(cluster[kind]))
        ):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExperimentError(
            "multiworker needs TF_CONFIG to name the workers and this one, "
            'as {"cluster": {"worker": ["10.0.0.1:2222", "10.0.0.2:2222"]}, '
            '"task": {"type": "worker", "index": 0}}. Received: '
            f"TF_CONFIG={' '.join(text.split())!r}"
        ) from error
    before = len(cluster.get("chief", [])) if kind == "worker" else 0
    return before + index, addresses


def _is_address(text):
    host, _, port = text.rpartition(":")
    return bool(host) and int(port) in range(1, 2**16)


class _Strategy(Replicas):
    def __init__(self, strategy, process=0, processes=1, time_limit=None):
        super().__init__(time_limit)
        self.process, self.processes = process, processes
        if strategy:
            self.use(strategy)

    def use(self, strategy):
        self._strategy = strategy
        self.replicas = strategy.num_replicas_in_sync
        self._own = self.replicas // self.processes
        self._first = self.process * self._own

    def train_on_batch(self, inputs, labels):
        with self.together("a training step"):
            loss, accuracy = self._step(
                self._shares(inputs),
                self._shares(labels),
                tf.constant(len(labels), tf.float32),
            )
            return {"loss": float(loss), "accuracy": float(accuracy)}

    def _shares(self, batch):
        return self._strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(
                self.share(batch, context.replica_id_in_sync_group)
            )
        )

    def _scope(self):
        return self._strategy.scope()

    def _start(self):
        for variable in dropout_states(self._replicated):
            own = self._strategy.experimental_local_results(variable.value)
            for replica, copy in enumerate(own, start=self._first):
                copy.assign(dropout_state(copy.numpy(), replica))
        # Of this model, in which no earlier one's variables may be.
        self._step = tf.function(self._step_of_all)

    def _step_of_all(self, inputs, labels, images):
        means = self._strategy.run(
            self._step_of_one, args=(inputs, labels, images)
        )
        return self._strategy.reduce("SUM", means, axis=None)

    def _step_of_one(self, inputs, labels, images):
        model = self._replicated
        with tf.GradientTape() as tape:
            logits = model(inputs, training=True)
            losses = keras.losses.sparse_categorical_crossentropy(
                labels, logits, from_logits=True
            )
            loss = tf.reduce_sum(losses) / images
        variables = model.trainable_variables
        # The optimizer adds the replicas' gradients up.
        model.optimizer.apply(
            tape.gradient(loss, [x.value for x in variables]), variables
        )
        found = tf.argmax(logits, axis=-1, output_type=labels.dtype)
        right = tf.reduce_sum(tf.cast(found == labels, tf.float32))
        return tf.stack([loss, right / images])

    def _sum(self, values):
        # Integers as int64: collectives have no unsigned ones.
        kind = np.float64 if values.dtype.kind == "f" else np.int64
        wide = values.astype(kind)
        shares = self._strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(
                wide
                if context.replica_id_in_sync_group == self._first
                else np.zeros_like(wide)
            )
        )
        total = self._strategy.reduce("SUM", shares, axis=None)
        return total.numpy().astype(values.dtype)
