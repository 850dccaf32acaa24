"""Files of runs that nobody trained."""

import json

FACTS = {
    "steps": 400,
    "eval_every": 100,
    "batch_size": 128,
    "optimizer": "adam",
    "learning_rate": 1e-3,
    "input": "raw",
    "shuffle": False,
    "layer": "keras_bn",
    "dataset": "cifar10",
    "dataset_version": "3.0.2",
    "dataset_copy": "a test's copy",
    "backend": "tensorflow",
    "device": "CPU:0",
    "packages": {"python": "3.12", "keras": "3.15"},
    "revision": "abc123",
}


def write_run(
    results, condition, seed, accuracies, every=100, lines=None, **facts
):
    """Writes one run's files, evaluated every `every` steps."""
    folder = results / str(condition) / str(seed)
    folder.mkdir(parents=True)
    own = FACTS | {"condition": condition, "seed": seed} | facts
    (folder / "run.json").write_text(json.dumps(own, indent=2))
    metrics, timing = [], []
    for count, accuracy in enumerate(accuracies, start=1):
        step = {"step": every * count}
        metrics.append(json.dumps(step | {"test_accuracy": accuracy}))
        timing.append(
            json.dumps(
                step
                | {
                    "train_seconds": 2.5,
                    "eval_seconds": 0.5,
                    "images_per_second": 1234.0,
                }
            )
        )
    (folder / "metrics.jsonl").write_text(
        "".join(line + "\n" for line in lines or metrics)
    )
    (folder / "timing.jsonl").write_text(
        "".join(line + "\n" for line in timing)
    )
    return folder
