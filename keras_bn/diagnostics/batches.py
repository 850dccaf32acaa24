"""Data in any form that Keras takes, as batches of NumPy arrays."""

import itertools
import math
import numbers
import types
import typing

import keras
import numpy as np
from keras.src.trainers.data_adapters import get_data_adapter
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter

from keras_bn.argument_checks import flag
from keras_bn.argument_checks import shown

# Samples of arrays that are one batch, as in the article's training.
BATCH_SIZE = 128


class Batch(typing.NamedTuple):
    """One batch.

    Attributes:
        inputs: Array, or structure of arrays, with samples along axis 0.
        labels: The same, or None.
        weights: Weights of the samples, as `model.fit` takes them, or None.
    """

    inputs: typing.Any
    labels: typing.Any = None
    weights: typing.Any = None

    @property
    def samples(self):
        """How many samples the batch holds."""
        return len(_arrays(self.inputs)[0])


class Batches:
    """The batches of `data`, each a `Batch`, read anew by each `for` loop.

    Args:
        data: Array, or list, tuple, dictionary or nested structure of arrays;
            `tf.data.Dataset`, `keras.utils.PyDataset`,
            `torch.utils.data.DataLoader`, or a generator of `(inputs,)`,
            `(inputs, labels)` or `(inputs, labels, weights)`, which can be
            read once.
        labels: Array with a label for each sample, or a structure of them;
            only for arrays, the others bring their own.
        steps: Int, how many batches are read; None: all of them.
        batch_size: Int, samples in a batch; only for arrays.
        shuffled: Whether arrays are read in another order, always the same:
            a batch of samples that were sorted has statistics of its own.
        at_least: Int: as many batches are joined as have so many samples,
            where they are of one shape.
        verbose: 1 for a progress bar, where the number of batches is known.

    Attributes:
        number: How many batches there are, or None where nobody knows.

    Raises:
        ValueError: `data` is none of these, ragged, empty or endless, or the
            number of labels is not that of samples; when they are read, `data`
            ends before `steps`, a batch is not one of those above, or a value
            is not finite.
    """

    def __init__(
        self,
        data,
        labels=None,
        steps=None,
        batch_size=BATCH_SIZE,
        shuffled=False,
        at_least=1,
        verbose=0,
    ):
        if steps is not None:
            _check_count("steps", steps, ", or None")
        _check_count("batch_size", batch_size)
        _refuse_ragged(data)
        _check_arrays(data, labels)
        self._steps = steps
        self._is_read = False
        self._at_least = at_least
        self._verbose = flag("verbose", verbose)
        try:
            self._adapter = _adapter(data, labels, batch_size, shuffled)
        except Exception as error:
            # Keras has several kinds.
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                "`data` cannot be read. Received: data of type "
                f"{type(data).__name__}. Keras says: "
                f"{reason or type(error).__name__}"
            ) from error
        self.number = self._adapter.num_batches
        if steps is not None:
            self.number = steps
        elif _is_endless(data):
            raise ValueError(
                "`data` has no end. Received: data of type "
                f"{type(data).__name__}, steps=None. Give `steps`, the number "
                "of batches to read."
            )
        self.can_be_read_again = not hasattr(data, "send")

    def __iter__(self):
        waiting = []
        for batch in self._read():
            if waiting and _shapes(batch) != _shapes(waiting[0]):
                yield _joined(waiting)
                waiting = []
            waiting.append(batch)
            if sum(x.samples for x in waiting) >= self._at_least:
                yield _joined(waiting)
                waiting = []
        if waiting:
            yield _joined(waiting)

    def _read(self):
        if self._is_read and not self.can_be_read_again:
            raise ValueError(
                "A generator can be read once, and more passes are needed. "
                "Received: data of type generator. Give arrays, a "
                "tf.data.Dataset or a keras.utils.PyDataset."
            )
        self._is_read = True
        read = 0
        # Of an unknown number Keras's bar would say "1/Unknown".
        visible = self._verbose and self.number is not None
        bar = keras.utils.Progbar(self.number, verbose=int(visible))
        for batch in itertools.islice(
            self._adapter.get_numpy_iterator(), self.number
        ):
            batch = _unpacked(batch)
            if batch.samples:
                _check_finite(batch.inputs, read)
                read += 1
                yield batch
            bar.add(1)
        if read < (self._steps or 1):
            raise ValueError(
                "`data` ended early. "
                f"Received: {read} batches, steps={self._steps}."
            )


def _adapter(data, labels, batch_size, shuffled):
    """What reads data in any form, as Keras's data adapters do."""
    if isinstance(data, types.GeneratorType) and labels is None:
        return _GeneratorAdapter(data)
    adapter = get_data_adapter(data, labels, None, batch_size)
    if not isinstance(adapter, ArrayDataAdapter):
        return adapter
    # Keras's adapter refuses text, which models may take, as NumPy arrays.
    text = any(
        getattr(getattr(x, "dtype", None), "kind", "-") in "OSUmM"
        for x in _arrays((data, labels))
    )
    if not shuffled and not text:
        return adapter
    return get_data_adapter(_Rows(data, labels, batch_size, shuffled))


class _GeneratorAdapter:
    """Keras's own reads two batches at once, and hides their errors."""

    num_batches = None

    def __init__(self, generator):
        self._generator = generator

    def get_numpy_iterator(self):
        for batch in self._generator:
            yield keras.tree.map_structure(_as_numpy, batch)


def _as_numpy(x):
    if keras.ops.is_tensor(x):
        return keras.ops.convert_to_numpy(x)
    return np.asarray(x) if hasattr(x, "__array__") else x


def _unpacked(batch):
    try:
        batch = Batch(*keras.utils.unpack_x_y_sample_weight(batch))
    except ValueError as error:
        raise ValueError(
            "`data` must give batches of (inputs,), (inputs, labels) or "
            "(inputs, labels, weights). Received: a batch of type "
            f"{type(batch).__name__} and length {len(batch)}."
        ) from error
    arrays = _arrays(batch.inputs)
    if not arrays or not all(getattr(x, "shape", ()) for x in arrays):
        kinds = sorted({type(x).__name__ for x in arrays})
        raise ValueError(
            "`data` must give batches of arrays, with samples along the first "
            f"axis. Received: inputs of {', '.join(kinds) or 'no arrays'}."
        )
    return batch


def _shapes(batch):
    """What has to be alike in batches that are joined."""
    return [
        None if x is None else np.shape(x)[1:]
        for x in keras.tree.flatten(tuple(batch))
    ]


def _arrays(structure):
    """The arrays in it; None stands for an optional input, or for no labels."""
    return [x for x in keras.tree.flatten(structure) if x is not None]


def _joined(batches):
    if len(batches) == 1:
        return batches[0]
    return Batch(
        *keras.tree.map_structure(
            _unless_none(lambda *parts: np.concatenate(parts)),
            *map(tuple, batches),
        )
    )


def _unless_none(function):
    return lambda x, *others: None if x is None else function(x, *others)


class _Rows(keras.utils.PyDataset):
    """Batches of samples of arrays.

    Args:
        shuffled: Whether in a random order that is always the same. It is
            drawn from a generator of its own.
    """

    def __init__(self, data, labels, batch_size, shuffled):
        super().__init__()
        self._arrays = data if labels is None else (data, labels)
        self._packs = labels is None
        self._arrays = keras.tree.map_structure(_as_numpy, self._arrays)
        self._batch_size = batch_size
        samples = len(_arrays(self._arrays)[0])
        self._order = np.arange(samples)
        if shuffled:
            self._order = np.random.default_rng(0).permutation(samples)

    def __len__(self):
        return math.ceil(len(self._order) / self._batch_size)

    def __getitem__(self, i):
        start = i * self._batch_size
        # In order within the batch, which is how memory is read fastest.
        rows = np.sort(self._order[start : start + self._batch_size])
        batch = keras.tree.map_structure(
            _unless_none(lambda x: x[rows]), self._arrays
        )
        return (batch,) if self._packs else batch


def _check_count(name, value, also=""):
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < 1:
        raise ValueError(
            f"`{name}` must be an integer of at least 1{also}. "
            f"Received: {name}={shown(value)}."
        )


def _refuse_ragged(data):
    """Raises ValueError: Keras fills up rows with zeros, which would count."""
    # A tf.data.Dataset says of what kind its tensors are.
    for x in _arrays(getattr(data, "element_spec", data)):
        if getattr(x, "ragged_rank", None):
            raise ValueError(
                "`data` is ragged, and the moments of its rows alone cannot be "
                f"had. Received: a {type(x).__name__} of shape "
                f"{tuple(x.shape)}. Give dense batches, each of samples of one "
                "length, or padded data that the model masks."
            )


def _check_arrays(data, labels):
    found = _arrays(data)
    arrays = [x for x in found if isinstance(x, np.ndarray)]
    if not found or any(x.shape[:1] == (0,) for x in arrays):
        raise ValueError(
            "`data` is empty. Received: data of type "
            f"{type(data).__name__} with no samples."
        )
    if any(getattr(x, "shape", None) == () for x in found):
        raise ValueError(
            "`data` must have samples along its first axis. Received: an "
            "array of shape ()."
        )
    if labels is None:
        return
    sizes = {len(x) for x in arrays}
    # A model may have several outputs, and labels for each.
    for x in _arrays(labels):
        if not getattr(x, "shape", ()):
            raise ValueError(
                "`labels` must be an array, or a structure of arrays, with a "
                "label for each sample. Received: labels of type "
                f"{type(labels).__name__} with {type(x).__name__}."
            )
        if sizes and {x.shape[0]} != sizes:
            raise ValueError(
                "`labels` must have one label for each sample. Received: "
                f"{x.shape[0]} labels for {min(sizes)} samples."
            )
        if isinstance(x, np.ndarray) and not _is_finite(x):
            raise ValueError(
                "`labels` has values that are not finite. "
                "Received: NaN or infinity."
            )


def _is_finite(array):
    return array.dtype.kind not in "fc" or bool(np.isfinite(array).all())


def _check_finite(inputs, number):
    for x in _arrays(inputs):
        if not _is_finite(np.asarray(x)):
            raise ValueError(
                "`data` has values that are not finite. "
                f"Received: NaN or infinity in batch {number}."
            )


def _is_endless(data):
    if isinstance(data, keras.utils.PyDataset):
        return data.num_batches is None
    # Of a tf.data.Dataset; TensorFlow need not be there. -1: infinite.
    cardinality = getattr(data, "cardinality", None)
    return callable(cardinality) and math.isclose(float(cardinality()), -1)
