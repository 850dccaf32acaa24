"""What `--data` of the command names, as data that Keras takes."""

import contextlib
import io
import math
from pathlib import Path

import keras
import numpy as np

from keras_bn.diagnostics.batches import Batches
from keras_bn_checks import images_in


def read(data, labels, model, batch_size):
    """`(data, labels)` for `audit` and `recalibrate`.

    `keras_bn_checks.check_data` has seen that they are there.

    Args:
        data: Str: an `.npz` file, a folder of images, or the name of a
            dataset of TensorFlow Datasets, with `:SPLIT` after it, which
            has to be prepared. The file has an array for each input of the
            model, by its name, or x for the only one; and labels y, or an
            array for each output by its name.
        labels: Str or None: an `.npy` file.
        model: `keras.Model`; images are resized to what it takes.
        batch_size: Int.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    if not data:
        raise ValueError("--data must name something. Received: --data=''")
    path = Path(data)
    if data.endswith(".npz"):
        return _arrays(path, labels, model)
    if path.is_dir():
        return ImageFolder(path, _image_size(model), batch_size), None
    return _of_tensorflow_datasets(data, batch_size), None


def first_batch(data, samples):
    """The inputs of the first samples of what `read` returned.

    Returns:
        Array; of several inputs a list, in the order of the model's.
    """
    batch = next(iter(Batches(data, batch_size=samples)))
    inputs = keras.tree.flatten(batch.inputs)
    return inputs if len(inputs) > 1 else inputs[0]


def _arrays(path, labels, model):
    try:
        with np.load(path) as file:
            arrays = dict(file)
    except Exception as error:
        raise ValueError(
            f"the file of arrays cannot be read ({error}). "
            f"Received: --data={path}. Write it with numpy.savez"
        ) from error
    for name, array in arrays.items():
        if array.dtype.kind not in "biufSU":
            raise ValueError(
                "the arrays must hold numbers, or text that the model takes. "
                f"Received: array {name!r} of dtype {array.dtype}"
            )
    inputs = _inputs(arrays, model)
    if labels is None:
        return inputs, _labels(arrays, model)
    try:
        found = np.load(labels)
    except Exception as error:
        raise ValueError(
            f"the labels cannot be read ({error}). "
            f"Received: --labels={labels}. Write them with numpy.save"
        ) from error
    if not isinstance(found, np.ndarray):
        raise ValueError(
            "--labels must be an .npy file of one array. Received: "
            f"--labels={labels}. Put the labels of several outputs into the "
            ".npz file of --data, by the names of the outputs"
        )
    return inputs, found


def _inputs(arrays, model):
    """Takes the inputs out of `arrays`, in the structure of the model's."""
    structure = _structure(model, "input")
    names = _names(structure)
    if names and set(names) <= set(arrays):
        found = [arrays.pop(name) for name in names]
        return keras.tree.pack_sequence_as(structure, found)
    if len(names) < 2 and "x" in arrays:
        return arrays.pop("x")
    raise ValueError(
        "the file must hold an array for each input of the model, by its "
        "name, or x where there is one input. Received: arrays "
        f"{sorted(arrays)}, inputs {names}"
    )


def _labels(arrays, model):
    """The labels in what `_inputs` left of `arrays`, or None."""
    if "y" in arrays:
        return arrays["y"]
    structure = _structure(model, "output")
    names = _names(structure, getattr(model, "output_names", None))
    found = [name for name in names if name in arrays]
    if not found:
        return None
    if len(found) < len(names):
        raise ValueError(
            "the file must hold labels for each output of the model, by its "
            f"name. Received: labels {found}, outputs {names}"
        )
    return keras.tree.pack_sequence_as(
        structure, [arrays[name] for name in names]
    )


def _structure(model, name):
    """`model.input` or `model.output`; a subclass has an empty one."""
    flat = getattr(model, f"{name}s", None) or []
    # A sequential model has no such attribute.
    return getattr(model, name, flat[0] if flat else [])


def _names(structure, names=None):
    """What inputs or outputs are called: a dictionary has names already.

    Args:
        structure: Of Keras tensors.
        names: List of str; None: those of the tensors.
    """
    flat = keras.tree.flatten(structure)
    if isinstance(structure, dict) and len(structure) == len(flat):
        return keras.tree.flatten({name: name for name in structure})
    return list(names or [x.name for x in flat])


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
            for file in images_in(one)
        ]
        self._labelled = bool(self._files)
        if not self._files:
            self._files = [(file, 0) for file in images_in(folder)]
        order = np.random.default_rng(0).permutation(len(self._files))
        self._files = [self._files[i] for i in order]
        self._image_size = image_size
        self._batch_size = batch_size

    def __len__(self):
        return math.ceil(len(self._files) / self._batch_size)

    def __getitem__(self, i):
        start = i * self._batch_size
        part = self._files[start : start + self._batch_size]
        images = [self._image(file) for file, _ in part]
        if len({image.shape for image in images}) > 1:
            raise ValueError(
                "the images must have one size, as the model's input has none"
                f". Received: {part[0][0]} and others of other sizes. Resize "
                "them"
            )
        images = np.stack(images)
        if not self._labelled:
            return (images,)
        return images, np.array([number for _, number in part])

    def _image(self, file):
        try:
            image = keras.utils.load_img(file, target_size=self._image_size)
        except Exception as error:
            # Pillow has many kinds, and one for an image that is too large.
            raise ValueError(
                f"an image cannot be read. Received: {file}. Remove it. "
                f"Pillow says: {error or type(error).__name__}"
            ) from error
        return keras.utils.img_to_array(image, data_format="channels_last")


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
        raise ValueError(
            f"--data={name} is a dataset of TensorFlow Datasets, which is not "
            "installed. Run `pip install tensorflow-datasets`"
        ) from error
    received, (name, _, split) = name, name.partition(":")
    try:
        # Where TensorFlow is absent a banner would come before the results.
        with contextlib.redirect_stdout(io.StringIO()):
            builder = tfds.builder(name)
            prepared = builder.is_prepared()
        if prepared:
            return _prepared(tfds, builder, split or "train", batch_size)
    except ModuleNotFoundError as error:
        # TFDS raises it again, without the name.
        missing = error.name or getattr(error.__cause__, "name", "a package")
        raise ValueError(
            f"the data needs {missing} to be read. Received: "
            f"--data={received}. Install it, or prepare the data with `tfds "
            f"build {name} --file_format=array_record`"
        ) from error
    except Exception as error:
        # TFDS lets each reader's own errors through.
        reason, *_ = [*str(error).strip().splitlines(), type(error).__name__]
        raise ValueError(
            "TensorFlow Datasets cannot load it. Received: "
            f"--data={received}. It says: {reason}"
        ) from error
    # A download that fails would leave its parts there.
    raise ValueError(
        f"the data is not prepared in {builder.data_dir}. Received: "
        f"--data={received}. Run `tfds build {name}`, or set TFDS_DATA_DIR"
    )


def _prepared(tfds, builder, split, batch_size):
    """A split of `(image, label)`, or what else is supervised in it."""
    keys = builder.info.supervised_keys
    if keys is None or len(keys) != 2:
        raise ValueError(
            f"{builder.name} does not say what is input and what is label"
        )
    if builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
        # This needs no TensorFlow.
        return _Source(builder.as_data_source(split), keys, batch_size)
    _leave_accelerators_to_keras()
    dataset = builder.as_dataset(split, as_supervised=True)
    return dataset.batch(batch_size)


def _leave_accelerators_to_keras():
    """Keeps TensorFlow, as a mere reader, from taking a GPU's memory."""
    import tensorflow as tf

    if keras.backend.backend() != "tensorflow":
        tf.config.set_visible_devices([], "GPU")


class _Source(keras.utils.PyDataset):
    """Batches of a TFDS data source.

    Args:
        source: Sequence of dictionaries, with `__getitems__`.
        keys: The names of inputs and labels in them.
        batch_size: Int.
    """

    def __init__(self, source, keys, batch_size):
        super().__init__()
        self._source = source
        self._keys = keys
        self._batch_size = batch_size

    def __len__(self):
        return math.ceil(len(self._source) / self._batch_size)

    def __getitem__(self, i):
        start = i * self._batch_size
        stop = min(start + self._batch_size, len(self._source))
        examples = self._source.__getitems__(list(range(start, stop)))
        return tuple(
            np.stack([example[key] for example in examples])
            for key in self._keys
        )
