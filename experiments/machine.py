"""What a program is and runs on: revision, processor, cores, device."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path


def revision() -> str:
    """Returns git's name of this code, with "-dirty" if it was changed."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# What the kernels of a processor depend on, the newest first, as Linux names
# it. Clouds call many generations by one name.
_VECTOR_EXTENSIONS = {
    "amx_tile": "AMX",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
}


def processor() -> str:
    """Returns the processor's name and its newest vector extension."""
    name, flags = platform.processor() or platform.machine(), []
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                flags = value.split()
                break
    except OSError:
        pass  # Not Linux; what the platform module says must do.
    for flag, extension in _VECTOR_EXTENSIONS.items():
        if flag in flags:
            return f"{name}, {extension}"
    return name


def onednn() -> bool | None:
    """Returns whether TensorFlow computes with oneDNN.

    None: another backend runs, or this TensorFlow does not say.
    """
    import keras

    if keras.backend.backend() != "tensorflow":
        return None
    try:
        # TensorFlow 2.21 has no public name for it.
        from tensorflow.python.util import _pywrap_util_port

        return _pywrap_util_port.IsMklEnabled()
    except (ImportError, AttributeError):
        return None


def usable_cores() -> int:
    """Returns how many cores this process may run on, as `taskset` set it."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def device() -> str:
    """Returns Keras's device, as CPU:0, and what it is if that is known."""
    import keras

    # Every backend's tensors know their device; TensorFlow's name is a path.
    name = str(keras.ops.zeros(()).device).rsplit("device:", 1)[-1]
    if "cpu" in name.lower():
        return name
    return ", ".join(filter(None, (name, _kind(keras.backend.backend()))))


def _kind(backend):
    if backend == "jax":
        import jax

        return jax.devices()[0].device_kind
    if backend == "torch":
        import torch

        # Elsewhere than on CUDA the name of the device says it.
        return torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    import tensorflow as tf

    for found in tf.config.list_physical_devices("GPU"):
        details = tf.config.experimental.get_device_details(found)
        return details.get("device_name", "")
    return ""
