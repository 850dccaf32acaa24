"""What `--data` of the command names, as data that Keras takes."""

import math
from pathlib import Path

import keras
import numpy as np

from keras_bn.cli import CommandError

_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif"}


def read(data, labels, model, batch_size):
    """`(data, labels)` for `audit` and `recalibrate`.

    Args:
        data: Str: an `.npz` file, a folder of images, or the name of a
            dataset of TensorFlow Datasets, with `:SPLIT` after it.
        labels: Str or None: an `.npy` file.
        model: `keras.Model`; images are resized to what it takes.
        batch_size: Int.

    Raises:
        CommandError: there is none, or it cannot be read.
    """
    path = Path(data)
    if data.endswith(".npz"):
        return _arrays(path, labels, model)
    if labels is not None:
        raise CommandError(
            "--labels belong to an .npz file; folders and datasets bring "
            f"their own. Received: --labels={labels}. Leave it out"
        )
    if path.is_dir():
        return ImageFolder(path, _image_size(model), batch_size), None
    if path.suffix or path.exists() or data.startswith((".", "/")):
        raise CommandError(
            "--data must be an .npz file, a folder of images or a dataset. "
            f"Received: --data={data}. There is no such folder"
        )
    return _of_tensorflow_datasets(data, batch_size), None


def _arrays(path, labels, model):
    if not path.is_file():
        raise CommandError(f"no such file. Received: --data={path}")
    try:
        with np.load(path) as file:
            arrays = dict(file)
    except Exception as error:
        raise CommandError(
            f"the file of arrays cannot be read ({error}). "
            f"Received: --data={path}. Write it with numpy.savez"
        ) from error
    found = arrays.pop("y", None)
    if labels is not None:
        try:
            found = np.load(labels)
        except Exception as error:
            raise CommandError(
                f"the labels cannot be read ({error}). "
                f"Received: --labels={labels}. Write them with numpy.save"
            ) from error
    if "x" in arrays:
        return arrays["x"], found
    names = list(getattr(model, "input_names", []))
    if not arrays or set(arrays) != set(names):
        raise CommandError(
            "the file must hold an array x, or one for each input of the "
            f"model. Received: arrays {sorted(arrays)}, inputs {names}"
        )
    return arrays, found


class ImageFolder(keras.utils.PyDataset):
    """The images of a folder, in an order that mixes the classes.

    The folders in it are the classes, in alphabetical order; images outside
    of them have no class, and then there are no labels.

    Args:
        folder: `pathlib.Path`.
        image_size: `(height, width)`; None: as the files are.
        batch_size: Int.
    """

    def __init__(self, folder, image_size, batch_size):
        super().__init__()
        classes = sorted(x for x in folder.iterdir() if x.is_dir())
        self._files = [
            (file, number)
            for number, one in enumerate(classes)
            for file in _images_in(one)
        ]
        self._labelled = bool(self._files)
        if not self._files:
            self._files = [(file, 0) for file in _images_in(folder)]
        if not self._files:
            raise CommandError(
                f"the folder holds no images. Received: --data={folder}. "
                "Give one of .png or .jpg files, or of folders of them"
            )
        order = np.random.default_rng(0).permutation(len(self._files))
        self._files = [self._files[i] for i in order]
        self._image_size = image_size
        self._batch_size = batch_size

    def __len__(self):
        return math.ceil(len(self._files) / self._batch_size)

    def __getitem__(self, i):
        start = i * self._batch_size
        part = self._files[start : start + self._batch_size]
        images = np.stack([self._image(file) for file, _ in part])
        if not self._labelled:
            return (images,)
        return images, np.array([number for _, number in part])

    def _image(self, file):
        try:
            image = keras.utils.load_img(file, target_size=self._image_size)
        except OSError as error:
            raise CommandError(
                f"an image cannot be read. Received: {file}. Remove it"
            ) from error
        return keras.utils.img_to_array(image, data_format="channels_last")


def _images_in(folder):
    return sorted(x for x in folder.iterdir() if x.suffix.lower() in _IMAGES)


def _image_size(model):
    shape = getattr(model, "input_shape", None)
    if isinstance(shape, tuple) and len(shape) == 4:
        height, width = shape[1:3]
        if height and width:
            return height, width
    return None


def _of_tensorflow_datasets(name, batch_size):
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise CommandError(
            f"--data={name} is a dataset of TensorFlow Datasets, which is not "
            "installed. Run `pip install tensorflow-datasets tensorflow`"
        ) from error
    name, _, split = name.partition(":")
    try:
        dataset = tfds.load(name, split=split or "train", as_supervised=True)
    except Exception as error:
        raise CommandError(
            f"TensorFlow Datasets cannot load it. Received: --data={name}"
            f"{':' + split if split else ''}. It says: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    return dataset.batch(batch_size)
