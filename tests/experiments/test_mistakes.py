"""A user's mistake is one line, said before anything large is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.experiments.run_files import write_run

_ROOT = Path(__file__).parents[2]
# Any of them takes longer than all else that a program does until then.
_LARGE = (
    "flax",
    "jax",
    "keras",
    "keras_bn",
    "matplotlib",
    "ray",
    "scipy",
    "sklearn",
    "tensorflow",
    "tensorflow_datasets",
    "torch",
)
_PROGRAM = f"""
import json, runpy, sys

try:
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
finally:
    print(json.dumps([x for x in {_LARGE} if x in sys.modules]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a file, an empty folder, and one of results."""
    folder = tmp_path_factory.mktemp("folder")
    (folder / "file").write_text("")
    (folder / "empty").mkdir()
    write_run(folder / "results", 9, 0, [0.5] * 4)
    (folder / "studies" / "studies" / "cost").mkdir(parents=True)
    (folder / "studies" / "studies" / "cost" / "runs.jsonl").write_text("")
    return folder


def _lines(folder, module, *flags, **environment):
    """Returns what a program says, where {} stands for the folder."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            _PROGRAM,
            f"experiments.{module}",
            *(flag.replace("{}", str(folder)) for flag in flags),
        ],
        cwd=_ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
    (line,) = done.stderr.splitlines()
    return line.replace(str(folder), "{}")


_NO_FOLDER = "error: cannot write to the folder {}/file"


@pytest.mark.parametrize(
    ("module", "flags", "said"),
    [
        ("train", [], "give a condition"),
        ("train", ["--condition=12"], "Received: condition=12"),
        ("train", ["--condition=x"], "--condition=x"),
        ("train", ["--conditoin=9"], "flag 'conditoin'"),
        ("train", ["--condition=9", "--steps=0"], "Received: steps=0"),
        ("train", ["--condition=9", "--output={}/file/x"], _NO_FOLDER),
        ("train", ["--condition=9", "--output="], "an empty one"),
        (
            "train",
            ["--condition=9", "--output={}/results"],
            "steps=400 there, 600 now",
        ),
        (
            "train",
            ["--condition=9", "--output={}/out", "--data_dir={}/no"],
            "Received: data_dir={}/no",
        ),
        (
            "train",
            ["--condition=9", "--output={}/out", "--time_limit=0"],
            "time_limit=0",
        ),
        (
            "train",
            ["--condition=9", "--output={}/out", "--cpu_devices=2"],
            "distribution=none",
        ),
        ("train", ["--preset=gpu_check", "--condition=9"], "leave out"),
        ("reproduce", ["--preset=quickly"], "--preset=quickly"),
        ("reproduce", ["--conditions=2,12"], "Received: condition=12"),
        ("reproduce", ["--conditions=a"], "Received: conditions=a"),
        ("reproduce", ["--seeds=0"], "Received: seeds=0"),
        ("reproduce", ["--output={}/file"], _NO_FOLDER),
        (
            "reproduce",
            ["--output={}/out", "--data_dir={}/no"],
            "Received: data_dir={}/no",
        ),
        ("report", ["--results={}/no"], "Received: results={}/no"),
        ("report", ["--results={}/file"], "Received: results={}/file"),
        (
            "report",
            ["--results={}"],
            "{} is no folder of results, but {}/results is: give "
            "--results={}/results",
        ),
        (
            "report",
            ["--results={}/studies/studies"],
            "but {}/studies is: give --results={}/studies",
        ),
        (
            "report",
            ["--results={}/studies/studies/cost"],
            "but {}/studies is: give --results={}/studies",
        ),
        ("report", ["--results={}/results/9/0"], "but {}/results is"),
        (
            "report",
            ["--results={}/results", "--published_curves={}/no"],
            "cannot read published_curves={}/no",
        ),
        ("benchmark", ["--shapes=1x1"], "Received: '1x1'"),
        ("benchmark", ["--backends=abacus"], "Received: 'abacus'"),
        ("benchmark", ["--output={}/file/x"], "cannot write {}/file/x: "),
        ("update_ops_pitfall", ["--forms=z"], "Received: 'z'"),
        ("update_ops_pitfall", ["--steps=0"], "Received: steps=0"),
        (
            "update_ops_pitfall",
            ["--forms=e", "--output={}/file"],
            _NO_FOLDER,
        ),
        ("studies", [], "Received: none"),
        ("studies", ["alchemy"], "Received: alchemy"),
        ("studies", ["all", "--output={}/file"], _NO_FOLDER),
        (
            "studies",
            ["all", "--output={}/out", "--data_dir={}/no"],
            "Received: data_dir={}/no",
        ),
        ("export", [], "give --model"),
        (
            "export",
            ["--model={}/empty", "--output={}/out"],
            "{}/empty, which has no run.json",
        ),
        (
            "export",
            ["--model={}/no.keras", "--output={}/out", "--input=raw"],
            "Received: model={}/no.keras",
        ),
        ("export", ["--model={}/empty", "--output={}/file"], _NO_FOLDER),
        (
            "export",
            ["--model={}/empty", "--output={}/studies"],
            "something else than numbered versions",
        ),
        ("two_workers", [], "give a condition"),
        ("two_workers", ["--condition=12"], "Received: condition=12"),
        (
            "two_workers",
            ["--condition=9", "--output={}/file"],
            _NO_FOLDER,
        ),
    ],
)
def test_a_mistake_is_said_at_once(module, flags, said, folder):
    if module == "studies":
        module = "studies.__main__"
    assert said in _lines(folder, module, *flags, TFDS_DATA_DIR="")


@pytest.mark.parametrize(
    ("backend", "flags", "said"),
    [
        ("abacus", ["--condition=9"], "(abacus cannot train)"),
        ("numpy", ["--condition=9"], "(numpy cannot train)"),
        ("jax", ["--preset=gpu_check"], "gpu_check is TensorFlow's"),
        (
            "jax",
            ["--condition=9", "--distribution=mirrored"],
            "set KERAS_BACKEND=tensorflow",
        ),
    ],
)
def test_a_backend_that_cannot_be_meant(backend, flags, said, folder):
    line = _lines(
        folder,
        "train",
        "--dataset=digits",
        "--output={}/out",
        *flags,
        KERAS_BACKEND=backend,
    )
    assert said in line


def test_where_there_are_no_results_at_all(tmp_path):
    (line,) = [_lines(tmp_path, "report", "--results={}")]
    assert line == (
        "error: no results in {}: train a condition (python -m "
        "experiments.train) or run a study (python -m experiments.studies) "
        "first, or give another folder"
    )
