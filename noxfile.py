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


@nox.session
@nox.parametrize("backend", list(ENVIRONMENTS))
def tests(session, backend):
    """Runs the test suite on one backend."""
    session.install(*VERSIONS, *ENVIRONMENTS[backend])
    session.run(
        "python",
        "-m",
        "pytest",
        "--numprocesses=2",
        # What the tests of a file share is made once.
        "--dist=loadfile",
        *session.posargs,
        env={"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )


@nox.session
def lint(session):
    """Checks style and import order."""
    session.install(*VERSIONS, "ruff")
    session.run("ruff", "check", ".")
