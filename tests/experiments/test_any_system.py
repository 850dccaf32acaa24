"""Where POSIX is not, the programs import, train in one process and say what
cannot be done."""

import json
import math
import sys
import types

import keras

from experiments.studies import cost
from tests import without_posix

_BACKEND = keras.backend.backend()
# Modules of another backend, and what needs a package of another environment.
_LEFT_OUT = [
    f"experiments.{folder}.{name}"
    for folder in (
        "benchmark_candidates",
        "device_loop",
        "distribution",
        "pitfall_loops",
    )
    for name in ("tensorflow", "jax", "torch")
    if name != _BACKEND
]


def test_all_modules_are_imported():
    said = without_posix.run(
        """
        import sys

        found = without_posix.walk("experiments", sys.argv[1:])
        print(len(found))
        """,
        *_LEFT_OUT,
    )
    assert int(said.splitlines()[-1]) > 70


def test_a_run_is_trained_gone_on_with_and_reported(tmp_path):
    said = without_posix.run(
        """
        import dataclasses
        import json
        import sys
        from pathlib import Path

        import experiments
        from experiments import data
        from experiments import distribution
        from experiments import machine
        from experiments import report
        from experiments import train
        from experiments.run_settings import Settings

        output, digits = Path(sys.argv[1]), data.load("digits")
        few = dataclasses.replace(
            digits,
            train_images=digits.train_images[:8],
            train_labels=digits.train_labels[:8],
            test_images=digits.test_images[:4],
            test_labels=digits.test_labels[:4],
        )
        settings = Settings(9, steps=3, eval_every=1, batch_size=4)
        done = []

        def stop(steps):
            done.append(steps)
            if sum(done) == 2:
                experiments._interruptions.append(15)

        train.check_output(settings, output)
        with distribution.join(settings, 60.0) as workers:
            try:
                train.run(settings, few, output, stop, workers)
            except KeyboardInterrupt as error:
                stopped = str(error)
            experiments._interruptions.clear()
            train.run(settings, few, output, workers=workers)
        names = [x.name for x in settings.folder(output).iterdir()]
        print(json.dumps([stopped, names, report.write_report(output).name]))
        """,
        tmp_path,
    )
    stopped, names, report = json.loads(said.splitlines()[-1])
    assert stopped.endswith("goes on from step 2")
    for name in ("metrics.jsonl", "final.weights.h5", "recalibrated.json"):
        assert name in names
    # The lock's file goes with the lock: filelock's part on Windows.
    assert "checkpoint.npz" not in names
    assert report == "report.html"


def test_several_processes_are_refused():
    said = without_posix.run(
        """
        import os

        from experiments import ExperimentError
        from experiments import distribution
        from experiments import two_workers
        from experiments.run_settings import Settings

        def said(function, *arguments):
            try:
                function(*arguments)
            except ExperimentError as error:
                print(error)

        os.environ["KERAS_DISTRIBUTION_NUM_PROCESSES"] = "2"
        for name in ("multiworker", "ddp", "data_parallel"):
            settings = Settings(9, distribution=name)
            said(distribution.check, settings, 60.0, None, None)
        said(two_workers.main, ["two_workers"])
        """
    )
    assert said.splitlines()[-4:] == [
        "several processes train together on Linux and macOS alone: train in "
        "one, with --distribution=none. Received: platform=win32"
    ] * 4


def test_the_peak_of_memory_is_known_where_it_can_be(tmp_path, monkeypatch):
    assert cost._peak() > 10
    monkeypatch.setattr(cost, "Path", lambda path: tmp_path / "missing")
    # As on macOS, whose unit is the byte; and as on Windows.
    usage = types.SimpleNamespace(ru_maxrss=300 * 2**20)
    resource = types.SimpleNamespace(
        RUSAGE_SELF=0, getrusage=lambda who: usage
    )
    monkeypatch.setitem(sys.modules, "resource", resource)
    assert cost._peak() == 300
    monkeypatch.setitem(sys.modules, "resource", None)
    assert math.isnan(cost._peak())
