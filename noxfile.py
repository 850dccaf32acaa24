"""The test matrix: one fresh environment per backend, and the linter.

`nox` runs all of it; `nox -s "tests(backend='jax')"` one part.
"""

import nox

nox.options.error_on_missing_interpreters = True

VERSIONS = ("--constraint", ".ci/constraints.txt")

# What each backend's environment holds beside the package and its `test`
# extra. The programs are tested on JAX and PyTorch without TensorFlow, so
# their environments name the rest of the `experiments` extra.
PROGRAMS = [
    "array-record",
    "importlib-resources",
    "matplotlib",
    "pillow",
    "rich",
    "scikit-learn",
    "scipy",
    "tensorboard",
    "tensorflow-datasets",
    "tqdm",
]
# What reads an exported model, or converts it.
RUNTIMES = ["ai-edge-litert", "onnx", "onnxruntime", "openvino", "tf2onnx"]
ENVIRONMENTS = {
    # Models are exported from JAX and PyTorch by way of TensorFlow.
    "tensorflow": [
        ".[experiments,jax,serving,tensorflow,test,torch]",
        "tf-keras",
        *RUNTIMES,
    ],
    "jax": [".[jax,ray,test]", "flax", *PROGRAMS],
    "torch": [".[torch,test]", *PROGRAMS],
}

# What stands in for other CPUs. How a sum is ordered, and so its rounding, is
# for the vector instructions to say, and for oneDNN, which TensorFlow turns on
# by itself only where there is AVX-512 VNNI. PyTorch takes its setting's word
# even where the CPU cannot do that, so the highest is left to the main run.
CPU_SETTINGS = {
    # The main run has it on, whatever the CPU (`tests/conftest.py`).
    "tensorflow": [{"TF_ENABLE_ONEDNN_OPTS": "0"}],
    "jax": [{"XLA_FLAGS": "--xla_cpu_max_isa=AVX2"}],
    "torch": [
        {"ATEN_CPU_CAPABILITY": "default"},
        {"ATEN_CPU_CAPABILITY": "avx2"},
    ],
}
OF_THE_CPU = ["tests/keras_bn/test_accuracy.py", "tests/keras_bn/kernels"]


@nox.session
@nox.parametrize("backend", list(ENVIRONMENTS))
def tests(session, backend):
    """Runs the test suite on one backend, its core as on other CPUs too."""
    session.install(*VERSIONS, *ENVIRONMENTS[backend])
    _pytest(session, backend, *session.posargs)
    if session.posargs:
        return
    for setting in CPU_SETTINGS[backend]:
        if not _is_had_already(session, setting):
            _pytest(session, backend, *OF_THE_CPU, env=setting)


def _pytest(session, backend, *arguments, env={}):
    session.run(
        "python",
        "-m",
        "pytest",
        "--numprocesses=2",
        # What the tests of a file share is made once.
        "--dist=loadfile",
        *arguments,
        env={"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", **env},
    )


def _is_had_already(session, setting):
    """Whether PyTorch chooses this or less by itself, as in the main run."""
    if setting.get("ATEN_CPU_CAPABILITY") != "avx2":
        return False
    ask = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    return "AVX512" not in session.run("python", "-c", ask, silent=True)


@nox.session
def lint(session):
    """Checks style and import order."""
    session.install(*VERSIONS, "ruff")
    session.run("ruff", "check", ".")
