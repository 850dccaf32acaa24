"""What a run of a study is asked to do."""

import dataclasses
from pathlib import Path

from experiments import data
from experiments import run_model
from experiments import studies
from experiments.run_settings import RunSettings
from experiments.studies import records
from experiments.studies.small_networks import Architecture


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudySettings(RunSettings):
    """What a run of a study is asked to do.

    Attributes:
        study: the study's name.
        arm: name of the choice of settings that it is of.
        train_images, test_images: how many, the first ones; at most.
        architecture: of its network.
    """

    study: str
    arm: str
    train_images: int
    test_images: int
    architecture: Architecture
    learning_rate: float = 3e-3
    input: str = "standardized"
    shuffle: bool = True

    @property
    def name(self):
        return f"{self.study}, {self.arm}, seed {self.seed}"

    def folder(self, output):
        return Path(output) / self.arm / str(self.seed)

    def network(self):
        return studies.find(self.study).network(self)

    def images(self, dataset):
        return studies.find(self.study).images(self, dataset)

    def begin(self, model, dataset):
        studies.find(self.study).begin(self, model, dataset)

    def observe(self, model, dataset):
        return studies.find(self.study).observe(self, model, dataset)

    def trained(self, folder):
        return folder.finished or self._is_recorded(folder)

    def conclude(self, dataset, folder):
        """Adds the run to the study's records; its weights go then."""
        # Another process may see that it is trained, and do the same.
        with folder.locked():
            if self._is_recorded(folder):
                return
            trained, model = self.network(), run_model.build(self)
            folder.load_weights(trained)
            model.set_weights(trained.get_weights())
            study = studies.find(self.study)
            measures = study.measure(self, model, self.images(dataset))
            records.add(folder.path.parents[1], folder, measures)
            folder.discard_weights()

    def _is_recorded(self, folder):
        found = records.read(folder.path.parents[1])
        return self.seed in found.get(self.arm, {})


def shrink(dataset: data.Dataset) -> data.Dataset:
    """Returns a data set with images of 16x16, each pixel a mean of four."""

    def smaller(images):
        count, height, width, channels = images.shape
        parts = images.reshape(
            count, height // 2, 2, width // 2, 2, channels
        ).astype("uint16")
        return ((parts.sum(axis=(2, 4)) + 2) // 4).astype("uint8")

    return dataclasses.replace(
        dataset,
        train_images=smaller(dataset.train_images),
        test_images=smaller(dataset.test_images),
        copy=f"{dataset.copy}, shrunk to 16x16",
    )


def first(
    dataset: data.Dataset, train_images: int, test_images: int
) -> data.Dataset:
    """Returns a data set with its first images alone."""
    return dataclasses.replace(
        dataset,
        train_images=dataset.train_images[:train_images],
        train_labels=dataset.train_labels[:train_images],
        test_images=dataset.test_images[:test_images],
        test_labels=dataset.test_labels[:test_images],
    )
