"""The process in which `experiments.update_ops_pitfall` trains some arms.

A request comes in as JSON on standard input: the `settings` of a run, the
`folder` with the images as .npy files, the `output` folder, the `framework`
of the process and the names of the `arms`. Lines of JSON go out on standard
output: `{"arm": name}` when an arm begins, `{"step": 1}` for each training
step, `{"facts": ...}` when an arm has been examined.

What an arm has trained stays in the output folder as a .keras file, and is
not trained again. TensorFlow 1's variables are left there as an .npz file,
for a process of another Keras to move into a model.
"""

import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments import atomic
from experiments import child_process
from experiments import data
from experiments import pitfall_arms
from experiments import run_model
from experiments import same_settings
from experiments.pitfall_arms import Arm
from experiments.run_settings import Settings

# The training curve of arm e_enough, with both kinds of statistics.
CURVE = "headline.jsonl"


def write_images(dataset: data.Dataset, folder: Path) -> None:
    """Writes a data set for children to read."""
    for field in dataclasses.fields(dataset):
        value = getattr(dataset, field.name)
        np.save(folder / f"{field.name}.npy", value)


def read_images(folder: Path) -> data.Dataset:
    """Reads what `write_images` wrote."""
    values = {
        field.name: np.load(folder / f"{field.name}.npy")
        for field in dataclasses.fields(data.Dataset)
    }
    return data.Dataset(
        **{k: v if v.ndim else str(v) for k, v in values.items()}
    )


def shifted(dataset: data.Dataset) -> data.Dataset:
    """Returns the same images in other light, see `pitfall_arms.shift`."""
    return dataclasses.replace(
        dataset,
        train_images=pitfall_arms.shift(dataset.train_images),
        test_images=pitfall_arms.shift(dataset.test_images),
    )


class Arms:
    """Trains and examines arms in this process.

    Args:
        settings: of every training but that of few steps.
        dataset: the images as they are.
        output: folder of the results.
        on_step: called after each training step.
    """

    def __init__(
        self,
        settings: Settings,
        dataset: data.Dataset,
        output: Path,
        on_step: Callable[[], None],
    ):
        self._settings = settings
        self._dataset = dataset
        self._output = output
        self._on_step = on_step

    def train_in_session(self, arm: Arm) -> None:
        """Trains an arm of form (a), unless its variables are there."""
        from experiments.pitfall_loops import tensorflow1

        path = variables_path(self._output, arm)
        if os.path.exists(path):
            return
        values, accuracy = tensorflow1.train(
            self._settings,
            data.Batches(self._dataset, self._settings.batch_size),
            arm.name.removeprefix("a_"),
            self._dataset.test_images,
            self._dataset.test_labels,
            self._on_step,
        )
        with atomic.replacing(path) as incomplete:
            np.savez(incomplete, test_accuracy=accuracy, **values)

    def examine(self, arm: Arm) -> dict:
        """Returns the facts of an arm, which is trained if it was not yet."""
        import keras

        from experiments import pitfall_examination
        from experiments import train

        path = model_path(self._output, arm)
        facts = {}
        if arm.form == "a":
            facts = self._move(arm, path)
        elif not os.path.exists(path):
            model = self._train(arm)
            with atomic.replacing(path) as incomplete:
                model.save(incomplete)
        dataset = self._dataset
        if arm.form == "f":
            dataset = shifted(dataset)
        # Its own registration is what loading needs of keras_bn.
        import keras_bn  # noqa: F401

        model = keras.models.load_model(path)
        circumstances = train.describe(self._settings, dataset)
        return {
            "form": arm.form,
            "arm": arm.name,
            "title": arm.title,
            "right": arm.right,
            "steps": self._steps(arm),
            **facts,
            **pitfall_examination.examine(model, dataset),
            "backend": circumstances["backend"],
            **{x: circumstances[x] for x in same_settings.CIRCUMSTANCES},
        }

    def _steps(self, arm):
        return pitfall_arms.training_steps(arm.trained_as, self._settings.steps)

    def _move(self, arm, path):
        from experiments.pitfall_loops import tensorflow1

        with np.load(variables_path(self._output, arm)) as file:
            values = dict(file)
        accuracy = float(values.pop("test_accuracy"))
        model = run_model.network(self._settings)
        tensorflow1.move(values, model)
        with atomic.replacing(path) as incomplete:
            model.save(incomplete)
        return {"test_accuracy_in_session": accuracy}

    def _train(self, arm):
        framework = pitfall_arms.FORMS[arm.form].framework
        dataset = self._dataset
        if arm.name == "f_same_data":
            dataset = shifted(dataset)
        batches = data.Batches(dataset, self._settings.batch_size)
        if framework is None:
            return self._fit(arm, batches)
        loop = importlib.import_module(f"experiments.pitfall_loops.{framework}")
        return loop.train(self._settings, batches, arm.right, self._on_step)

    def _fit(self, arm, batches):
        """Trains as Keras does; arm e_enough draws the curve on its way."""
        from experiments import pitfall_examination

        model = run_model.build(self._settings)
        steps, curve = self._steps(arm), []
        for step in range(1, steps + 1):
            model.train_on_batch(*batches[step - 1])
            self._on_step()
            if arm.trained_as != "e_enough":
                continue
            if step == steps or step % self._settings.eval_every == 0:
                curve.append(
                    {
                        "step": step,
                        "test_accuracy": pitfall_examination.accuracy(
                            model, self._dataset
                        ),
                        "test_accuracy_recalibrated": (
                            pitfall_examination.accuracy_recalibrated(
                                model, self._dataset
                            )
                        ),
                    }
                )
        if curve:
            text = "".join(json.dumps(line) + "\n" for line in curve)
            atomic.write_text(self._output / CURVE, text)
        return model


def model_path(output: Path, arm: Arm) -> Path:
    """Where the model that an arm uses is kept."""
    return output / "models" / f"{arm.trained_as}.keras"


def variables_path(output: Path, arm: Arm) -> Path:
    """Where TensorFlow 1's variables of an arm are kept."""
    return output / "models" / f"{arm.name}.npz"


def main() -> None:
    """Reads the request, trains, examines."""
    answer = child_process.answering()
    request = json.load(sys.stdin)
    arms = Arms(
        Settings(**request["settings"]),
        read_images(Path(request["folder"])),
        Path(request["output"]),
        lambda: answer(step=1),
    )
    for name in request["arms"]:
        answer(arm=name)
        arm = pitfall_arms.ARMS[name]
        if request["framework"] == "tensorflow1":
            arms.train_in_session(arm)
        else:
            answer(facts=arms.examine(arm))


if __name__ == "__main__":
    main()
