"""The benchmark times every layer, and its arithmetic is right."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from experiments import ExperimentError
from experiments import benchmark
from experiments import benchmark_candidates
from experiments import benchmark_child

ROOT = Path(benchmark.__file__).parents[1]
BACKEND = keras.backend.backend()


def run_program(*flags):
    return subprocess.run(
        [sys.executable, "-m", "experiments.benchmark", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "new" / "benchmark.json"
    done = run_program(
        f"--backends={BACKEND}",
        "--shapes=4x3x3x2,8x5",
        "--repetitions=2",
        f"--output={path}",
    )
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


def test_every_layer_and_operation_is_measured(report):
    written, _ = report
    names = {"keras_bn", "keras"}
    if benchmark_candidates.has_peer(BACKEND):
        names.add(benchmark_candidates.PEERS[BACKEND][0])
    variants = {"keras_bn_ghost"} | {
        f"{name}_{variant}"
        for name in ("keras_bn", "keras")
        for variant in ("masked", "renorm")
    }
    if BACKEND != "torch":
        variants.add("keras_bn_sync")
    if BACKEND == "tensorflow":
        variants.add("keras_sync")
    found = [
        (tuple(row["shape"]), row["operation"], row["name"])
        for row in written["measurements"]
    ]
    assert sorted(found) == sorted(
        (shape, operation, name)
        for shape in ((4, 3, 3, 2), (8, 5))
        for operation, measured in (
            ("inference", names),
            ("forward", names),
            ("forward_backward", names | variants),
        )
        for name in measured
    )
    for row in written["measurements"]:
        assert (row["backend"], row["dtype"]) == (BACKEND, "float32")
        for clock in ("cpu", "wall"):
            times = row[f"{clock}_seconds"]
            assert 0 < times["lower_quartile"] <= times["median"]
            assert times["median"] <= times["upper_quartile"] < 1
            assert math.isclose(
                row[f"{clock}_to_floor"],
                times["median"] / row[f"floor_{clock}_seconds"],
            )


def test_what_measured_it_is_written(report):
    written, printed = report
    assert written["machine"]["cores"] >= 1
    assert written["machine"]["cpu"]
    assert written["machine"]["packages"]["keras"] == keras.__version__
    assert written["repetitions"] == 2
    assert "--repetitions=2" in written["command"]
    assert written["environment"]["MALLOC_MMAP_MAX_"] == "0"
    assert "MALLOC_MMAP_MAX_=0" in printed
    assert "keras_bn" in printed
    if BACKEND == "tensorflow":
        steps = written["training_step"]
        assert set(steps) == {"none", "keras_bn", "keras"}
        assert steps["none"]["cpu_added_percent"] == 0
        assert steps["keras"]["cpu_seconds"]["median"] > 0
    else:
        assert written["training_step"] == {}
        assert "training step: needs tensorflow" in written["left_out"]


def test_floor_and_ratios():
    def entry(operation, name, cpu):
        return {
            "backend": "b",
            "shape": [2, 3],
            "dtype": "float32",
            "operation": operation,
            "name": name,
            "cpu": cpu,
            "wall": [2 * seconds for seconds in cpu],
        }

    rows = benchmark.compare(
        [
            entry(operation, name, cpu)
            for operation in ("inference", "forward", "forward_backward")
            for name, cpu in (
                ("keras_bn", [6.0, 6.0, 90.0]),
                ("keras", [12.0, 11.0, 13.0]),
                ("tf_keras", [6.0]),
                ("keras_bn_ghost", [24.0]),
                ("keras_bn_masked", [10.0]),
                ("keras_masked", [40.0]),
                ("copy", [1.0, 2.0, 3.0]),
            )
        ]
    )
    floors = {row["operation"]: row["floor_cpu_seconds"] for row in rows}
    # Copies: 2 passes each; so 1, 1.5 and 4 of them.
    assert floors == {"inference": 2, "forward": 3, "forward_backward": 8}
    names = [row["name"] for row in rows]
    assert len(names) == 18 and "copy" not in names
    to_keras = {row["name"]: row["cpu_to_keras"] for row in rows}
    assert to_keras["tf_keras"] == 6 / 12
    assert to_keras["keras_bn_ghost"] == 24 / 12
    assert to_keras["keras_bn_masked"] == 10 / 40
    assert to_keras["keras_masked"] == 1
    own = rows[12]
    assert own["cpu_to_floor"] == 6 / 8
    assert own["cpu_to_keras"] == 6 / 12
    assert own["floor_wall_seconds"] == 16
    assert own["cpu_seconds"]["upper_quartile"] == 48


def test_added_percent():
    steps = {
        "none": {"cpu": [1.0, 1.0, 9.0], "wall": [2.0]},
        "keras_bn": {"cpu": [1.1], "wall": [2.0]},
        "keras": {"cpu": [1.3], "wall": [1.0]},
    }
    compared = benchmark.compare_training_steps(steps)
    added = [compared[name]["cpu_added_percent"] for name in steps]
    assert added == pytest.approx([0, 10, 30])
    assert compared["keras"]["wall_added_percent"] == -50


def test_interleaved_times_each_call_alike():
    calls = []

    def call(name, seconds):
        def run():
            calls.append(name)
            benchmark_child.time.sleep(seconds)

        return run

    timings = benchmark_child.interleaved(
        {"short": call("short", 0.0001), "long": call("long", 0.02)}, 3
    )
    for name in timings:
        assert len(timings[name].cpu) == len(timings[name].wall) == 3
    assert min(timings["long"].wall) >= 0.02
    # Asleep, so next to no CPU time.
    assert np.median(timings["long"].cpu) < 0.01
    seldom = benchmark_child.interleaved(
        {"one": call("one", 0.01), "two": call("two", 0.01)},
        4,
        frozenset({"two"}),
    )
    assert (len(seldom["one"].cpu), len(seldom["two"].cpu)) == (4, 2)
    # The short call is repeated within a measurement.
    assert calls.count("short") > calls.count("long") == 3 + 1 + 3


def test_all_layers_compute_batch_normalization():
    generator = np.random.default_rng(1)
    inputs = generator.normal(0.5, 2.0, (6, 4, 4, 3)).astype("float32")
    gradient = generator.standard_normal((6, 4, 4, 3), "float32")
    results = {}
    for layer in benchmark_candidates.candidates(
        BACKEND, inputs, gradient, "float32"
    ):
        leaves = keras.tree.flatten(layer.operations["forward_backward"]())
        arrays = [
            np.asarray(getattr(x, "detach", lambda x=x: x)()) for x in leaves
        ]
        inputs_like = [a for a in arrays if a.size == inputs.size]
        results[layer.name] = [
            np.moveaxis(a, 1, -1) if a.shape[1] == 3 else a for a in inputs_like
        ]
    assert {"keras_bn", "keras"} <= set(results)

    def expected(inputs, gradient, kept=None):
        # gamma is 1 and beta 0.
        if kept is None:
            kept = np.ones(inputs.shape[:-1], bool)
        of_kept = inputs[kept]
        factor = 1 / np.sqrt(of_kept.var(0) + benchmark_candidates.EPSILON)
        normalized = (inputs - of_kept.mean(0)) * factor
        dy, dy_normalized = (
            g.sum((0, 1, 2)) / len(of_kept)
            for g in (gradient, gradient * normalized)
        )
        through_moments = kept[..., None] * (dy + normalized * dy_normalized)
        return normalized, factor * (gradient - through_moments)

    def expected_of(name):
        if name == "keras_bn_ghost":
            parts = [
                expected(inputs[i : i + 2], gradient[i : i + 2])
                for i in range(0, 6, 2)
            ]
            return map(np.concatenate, zip(*parts))
        if name.endswith("_masked"):
            kept = benchmark_candidates.kept_positions(inputs.shape)
            assert 0.5 < kept.mean() < 0.9
            return expected(inputs, gradient, kept)
        normalized, of_inputs = expected(inputs, gradient)
        if name.endswith("_renorm"):
            # Corrected back to a mean of 0 and a deviation of 1.
            deviation = np.sqrt(
                inputs.var((0, 1, 2)) + benchmark_candidates.EPSILON
            )
            return inputs, of_inputs * deviation
        return normalized, of_inputs

    assert len(results) >= 7
    for name, (outputs, gradients) in results.items():
        normalized, of_inputs = expected_of(name)
        settings = {"atol": 5e-5, "err_msg": name}
        np.testing.assert_allclose(outputs, normalized, **settings)
        np.testing.assert_allclose(gradients, of_inputs, **settings)


@pytest.mark.parametrize(
    "text", ["128", "3xa", "0x4", "1x2x3x4x5x6", "-1x2", "1x8", "1x1x1x8"]
)
def test_bad_shapes_are_refused(text):
    with pytest.raises(ExperimentError, match="Received: '"):
        benchmark.parse_shape(text)
    assert benchmark.parse_shape("128x32x32x3") == [128, 32, 32, 3]


def test_what_is_named_twice_is_measured_once():
    shapes = benchmark.parse_shapes(["8x5", "4x3", "08x5", "8x5"])
    assert shapes == [[8, 5], [4, 3]]
    assert benchmark.parse_backends([BACKEND, BACKEND]) == [BACKEND]


def test_errors_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for flags, words in (
        (["--backends=numpy"], "Received: 'numpy'"),
        ([f"--backends={BACKEND}", "--shapes=4xx"], "Received: '4xx'"),
        (
            [
                f"--backends={BACKEND}",
                f"--output={tmp_path / 'file' / 'x.json'}",
            ],
            "cannot write",
        ),
    ):
        failed = run_program(*flags)
        assert failed.returncode == 1
        assert words in failed.stderr
        assert failed.stderr.count("\n") == 1, failed.stderr


def test_a_failing_backend_is_one_line(monkeypatch):
    monkeypatch.setattr(benchmark.sys, "executable", "/bin/false")
    with pytest.raises(ExperimentError, match="timing on jax failed"):
        benchmark.measure("jax", {}, print)


def test_an_interruption_ends_the_measuring_process(tmp_path, monkeypatch):
    child = tmp_path / "child"
    child.write_text(
        f"#!{sys.executable}\n"
        "import json, os, time\n"
        "print(json.dumps({'progress': os.getpid()}), flush=True)\n"
        "time.sleep(60)\n"
    )
    child.chmod(0o755)
    monkeypatch.setattr(benchmark.sys, "executable", str(child))

    def interrupt(words):
        raise KeyboardInterrupt(words)

    with pytest.raises(KeyboardInterrupt) as interruption:
        benchmark.measure("jax", {}, interrupt)
    number = int(str(interruption.value).split()[1])
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)
