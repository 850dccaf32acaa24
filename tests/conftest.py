"""What all tests share.

The suite runs once for each backend, named by KERAS_BACKEND, in an environment
where the other two frameworks may be absent. A test file named after a
backend, or after a peer of its, is collected on that backend alone.
"""

import os
import signal
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# As the programs do; else it would depend on the CPU, and on which tests are
# collected before TensorFlow is imported.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
# Two logical devices, for what is sharded.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=2 "
    + os.environ.get("XLA_FLAGS", "")
)
# JAX compiles in most of a test's time; processes, and later runs, share it.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(Path(__file__).parents[1] / ".pytest_cache" / "jax"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis
import keras
import pytest

# A shell makes what it starts in the background deaf to Ctrl-C, and so would
# be the programs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# So does nohup with SIGHUP. What has a handler here, and not what is ignored,
# is as usual in a program that is started.
if hasattr(signal, "SIGHUP") and (
    signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
):
    signal.signal(signal.SIGHUP, lambda number, frame: None)

# From each backend to the peer that its environment holds.
_PEERS = {"tensorflow": "tf_keras", "jax": "flax", "torch": "torch"}

collect_ignore = [
    path
    for backend, peer in _PEERS.items()
    for path in (
        f"keras_bn/kernels/test_{backend}.py",
        f"keras_bn/test_coming_from_{peer}.py",
        f"keras_bn/surgery/test_convert_{peer}.py",
    )
    if backend != keras.backend.backend()
]
if keras.backend.backend() != "tensorflow":
    # They run on files and numbers, and on no backend.
    collect_ignore += [
        "experiments/studies/test_results.py",
        "experiments/studies/test_verdict.py",
        "experiments/test_article.py",
        "experiments/test_article_results.py",
        "experiments/test_comparison.py",
        "experiments/test_control_results.py",
        "experiments/test_download.py",
        "experiments/test_progress.py",
        "experiments/test_report.py",
    ]
    # What is exported is run by TensorFlow, and by what reads its files.
    collect_ignore += [
        "experiments/test_export.py",
        "keras_bn/serving/test_command.py",
        "keras_bn/serving/test_other_backends.py",
        "keras_bn/serving/test_runtimes.py",
        "keras_bn/serving/test_saved_model.py",
    ]
if keras.backend.backend() == "torch":
    # Its replicas are in processes of their own, out of the audit's sight.
    collect_ignore.append("keras_bn/diagnostics/test_audit_replicas.py")
else:
    collect_ignore.append("keras_bn/test_torch_module.py")
if keras.backend.backend() != "jax":
    # Ray is in one environment alone.
    collect_ignore.append("experiments/test_ray_grid.py")

# The same cases in every run, whatever the machine's speed. JAX compiles each
# of them anew, which takes a hundred times as long as running it.
hypothesis.settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=14 if keras.backend.backend() == "jax" else 60,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _settings_restored():
    """Seeds Keras, and undoes what a test changed in its global settings."""
    policy = keras.config.dtype_policy()
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy(policy)
    # Collecting garbage would take longer than most tests.
    keras.backend.clear_session(free_memory=False)
