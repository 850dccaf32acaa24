"""Where images come from: CIFAR-10 through TFDS, or the bundled digits.

Everything is held in memory as uint8; `Batches` makes a step's float32 batch.
"""

import dataclasses
import hashlib
import io
import os
import sys

import numpy as np

from experiments import ExperimentError
from experiments import download

DATASETS = ("auto", "cifar10", "digits")
INPUTS = ("raw", "standardized")
# In the order of the labels.
CLASS_NAMES = {
    "cifar10": (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ),
    "digits": tuple("0123456789"),
}
READ_AT_ONCE = 1_000


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images in [0, 255] and their labels, all in memory.

    Attributes:
        train_images, test_images: uint8 (images, 32, 32, 3).
        train_labels, test_labels: int32 (images,), 0 to 9.
        name: "cifar10" or "digits".
        version: version of the data set, e.g. "3.0.2".
        copy: which copy of that version it is.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    name: str
    version: str
    copy: str

    @property
    def note(self) -> str:
        """One line that says what these images are."""
        return f"{self.name} {self.version} ({self.copy})"

    @property
    def digest(self) -> str:
        """A text that other images or labels would have otherwise."""
        digest = hashlib.sha256()
        for values in (
            self.train_images,
            self.train_labels,
            self.test_images,
            self.test_labels,
        ):
            digest.update(str(values.shape).encode())
            digest.update(np.ascontiguousarray(values))
        return digest.hexdigest()


def load(dataset: str = "auto", data_dir: str | None = None) -> Dataset:
    """Loads a data set into memory.

    Args:
        dataset: "cifar10", "digits", or "auto": CIFAR-10 where it is prepared
            or can be downloaded, else the digits and a line on stderr.
        data_dir: TensorFlow Datasets' folder; by default TFDS_DATA_DIR, or
            else ~/tensorflow_datasets. An incomplete download leaves nothing
            there.

    Raises:
        ExperimentError: the folder given does not exist, what is prepared in
            it cannot be read, or CIFAR-10 is insisted on and not to be had.
    """
    check(dataset, data_dir)
    if dataset == "digits":
        return load_digits()
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR")
    data_dir = data_dir or os.path.expanduser("~/tensorflow_datasets")
    try:
        builder = _cifar10_builder(data_dir)
        if not builder.is_prepared():
            if os.path.exists(builder.data_dir):
                raise _unreadable(builder.data_dir, "no dataset_info.json")
            download.download(data_dir)
            builder = _cifar10_builder(data_dir)
        return _read(builder)
    except download.DownloadError as error:
        if dataset == "cifar10":
            raise
        print(
            f"{error}. Going on with scikit-learn's handwritten digits, "
            "enlarged to 32x32x3: this is not the article's data.",
            file=sys.stderr,
        )
        return load_digits()


def check(dataset: str, data_dir: str | None) -> None:
    """Finds out, before anything is imported, whether `load` can be asked.

    Raises:
        ExperimentError: it cannot: there is no such data set or folder.
    """
    if dataset not in DATASETS:
        raise ExperimentError(
            f"dataset is one of {', '.join(DATASETS)}. "
            f"Received: dataset={dataset!r}"
        )
    folder = data_dir or os.environ.get("TFDS_DATA_DIR")
    if dataset != "digits" and folder and not os.path.isdir(folder):
        raise ExperimentError(
            "the data folder does not exist: create it, or give another. "
            f"Received: data_dir={folder}"
        )


def load_digits() -> Dataset:
    """Returns scikit-learn's 1,797 handwritten digits.

    The 8x8 images are enlarged fourfold and repeated over three channels;
    the last 360, by other writers than the first, are the test images.
    """
    import sklearn
    from sklearn.datasets import load_digits as bundled_digits

    digits = bundled_digits()
    # 0..16 becomes 0..255.
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    images = images.repeat(4, axis=1).repeat(4, axis=2)
    images = np.repeat(images[..., np.newaxis], 3, axis=-1)
    labels = digits.target.astype(np.int32)
    return Dataset(
        images[:-360],
        labels[:-360],
        images[-360:],
        labels[-360:],
        name="digits",
        version=f"scikit-learn {sklearn.__version__}",
        copy="8x8 enlarged to 32x32x3",
    )


def _unreadable(folder, reason):
    reason = str(reason).strip().split("\n")[0]
    return ExperimentError(
        f"the data in {folder} cannot be read ({reason}): delete that folder "
        "to have it prepared again, or give another data_dir"
    )


def _cifar10_builder(data_dir):
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise download.DownloadError(
            "CIFAR-10 needs the package tensorflow-datasets"
        ) from error
    try:
        return tfds.builder("cifar10", data_dir=data_dir)
    except Exception as error:  # TFDS lets each reader's own errors through
        raise _unreadable(os.path.join(data_dir, "cifar10"), error) from error


def _read(builder):
    """Reads a prepared CIFAR-10 into a `Dataset`."""
    import tensorflow_datasets as tfds

    parts, encodings = {}, set()
    for split in ("train", "test"):
        try:
            expected = builder.info.splits[split].num_examples
            images = np.empty((expected, 32, 32, 3), np.uint8)
            labels = np.empty(expected, np.int32)
            read = 0
            for encoded, batch_labels in _encoded(tfds, builder, split):
                for image, label in zip(encoded, batch_labels):
                    encodings.add(_decode(image, images[read]))
                    labels[read] = label
                    read += 1
        except ModuleNotFoundError as error:
            raise ExperimentError(
                f"the data in {builder.data_dir} needs {error.name} to be "
                "read: install it, or give a data_dir of ArrayRecord files"
            ) from error
        except Exception as error:
            raise _unreadable(builder.data_dir, error) from error
        if read != expected:
            raise _unreadable(
                builder.data_dir, f"{read} of {expected} {split} images"
            )
        parts[f"{split}_images"], parts[f"{split}_labels"] = images, labels
    # TFDS itself writes PNG, so any other encoding marks another copy.
    encoding = "/".join(sorted(encodings))
    return Dataset(
        **parts,
        name="cifar10",
        version=str(builder.version),
        copy="PNG of TFDS" if encoding == "PNG" else f"{encoding} re-encoded",
    )


def _encoded(tfds, builder, split):
    """Yields (encoded images, labels) in the order of the split.

    The images are decoded elsewhere, all by one decoder: those of TensorFlow
    and of TFDS's data source differ by some grey levels on JPEG.
    """
    decoders = {"image": tfds.decode.SkipDecoding()}
    file_format = builder.info.file_format
    if file_format == tfds.core.FileFormat.ARRAY_RECORD:
        source = builder.as_data_source(split, decoders=decoders)
        for start in range(0, len(source), READ_AT_ONCE):
            stop = min(start + READ_AT_ONCE, len(source))
            examples = source.__getitems__(range(start, stop))
            yield (
                [example["image"] for example in examples],
                [example["label"] for example in examples],
            )
    else:
        _leave_accelerators_to_keras()
        examples = builder.as_dataset(
            split, decoders=decoders, batch_size=READ_AT_ONCE
        )
        for example in tfds.as_numpy(examples):
            yield example["image"], example["label"]


def _leave_accelerators_to_keras():
    """Keeps TensorFlow, as a mere reader, from taking a GPU's memory."""
    import keras
    import tensorflow as tf

    if keras.backend.backend() != "tensorflow":
        tf.config.set_visible_devices([], "GPU")


def _decode(encoded, image):
    """Decodes into `image`, uint8 (32, 32, 3); returns the encoding's name."""
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as decoded:
        image[...] = decoded
        return decoded.format


class Batches:
    """Training batches by step: ``batches[step]`` -> (inputs, labels).

    Every epoch has the full batches alone; the remainder is dropped. Without
    `shuffle`, as in the article, every epoch has the same batches in the same
    order. The batch of a step depends on the arguments alone, so a run can go
    on from any step.

    Args:
        dataset: a `Dataset`.
        batch_size: images in a batch.
        input: "raw" or "standardized", see `inputs`.
        shuffle: whether every epoch has its own order, drawn from `seed` and
            the epoch's number.
        seed: int of at least 0.

    Attributes:
        size: images in a batch.
        per_epoch: batches in an epoch.
        images, labels: all that batches are made of, as in `Dataset`.
        prepare: what `inputs` returns.

    Raises:
        ExperimentError: there are fewer images than `batch_size`.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        input: str = "raw",
        shuffle: bool = False,
        seed: int = 0,
    ):
        self.size = batch_size
        self.images = dataset.train_images
        self.labels = dataset.train_labels
        self.prepare = inputs(dataset, input)
        self._shuffle = shuffle
        self._seed = seed
        self._epoch, self._order = None, np.arange(len(self.images))
        self.per_epoch = len(self.images) // batch_size
        if not self.per_epoch:
            raise ExperimentError(
                f"{dataset.name} has {len(self.images)} training "
                f"images: give a smaller batch. Received: "
                f"batch_size={batch_size}"
            )

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns float32 (batch, 32, 32, 3) and int32 (batch,)."""
        rows = self.rows(step)
        if not self._shuffle:
            # A view: nothing is copied.
            rows = slice(rows[0], rows[-1] + 1)
        return self.prepare(self.images[rows]), self.labels[rows]

    def rows(self, step: int) -> np.ndarray:
        """Returns which training images a batch has, integers (batch,)."""
        epoch, index = divmod(step, self.per_epoch)
        if self._shuffle and epoch != self._epoch:
            random = np.random.default_rng([self._seed, epoch])
            self._order = random.permutation(len(self.images))
            self._epoch = epoch
        return self._order[index * self.size : (index + 1) * self.size]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Makes the network's inputs: (images - shift) * factor.

    Called with uint8 (batch, 32, 32, 3) it returns float32 of that shape.

    Attributes:
        shift, factor: float32 (channels,), or None where nothing is done.
    """

    shift: np.ndarray | None = None
    factor: np.ndarray | None = None

    def __call__(self, images: np.ndarray) -> np.ndarray:
        if self.shift is None:
            return images.astype(np.float32)
        return (images - self.shift) * self.factor


def inputs(dataset: Dataset, input: str) -> Inputs:
    """Returns what makes the network's inputs of uint8 images.

    Args:
        dataset: a `Dataset`.
        input: "raw", the article's: 0 to 255; or "standardized": less each
            channel's mean and divided by its standard deviation, both over
            the training images.

    Raises:
        ExperimentError: `input` is not one of `INPUTS`.
    """
    if input == "raw":
        return Inputs()
    if input != "standardized":
        raise ExperimentError(
            f"input is one of {', '.join(INPUTS)}. Received: input={input!r}"
        )
    mean, deviation = moments(dataset.train_images)
    return Inputs(mean.astype(np.float32), (1 / deviation).astype(np.float32))


def moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean and the standard deviation of each channel.

    Args:
        images: uint8 (images, height, width, channels).

    Returns:
        Two float64 arrays (channels,).
    """
    # Exact, and without a float copy of the data: moments of a histogram.
    levels = np.arange(256)
    channels = images.shape[-1]
    mean, deviation = np.empty((2, channels))
    for channel in range(channels):
        counts = np.bincount(images[..., channel].ravel(), minlength=256)
        mean[channel] = np.average(levels, weights=counts)
        deviation[channel] = np.sqrt(
            np.average((levels - mean[channel]) ** 2, weights=counts)
        )
    return mean, deviation
