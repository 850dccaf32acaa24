"""The loss that a model was compiled with, of outputs that are at hand."""

from typing import Any

import keras
from keras import ops
from keras.src.backend import set_keras_mask

from keras_bn.diagnostics.batches import Batch
from keras_bn.diagnostics.forward_passes import reason_of

_CATEGORICAL = (
    keras.losses.CategoricalCrossentropy,
    keras.losses.CategoricalFocalCrossentropy,
    keras.losses.CategoricalHinge,
    keras.losses.SparseCategoricalCrossentropy,
    keras.losses.categorical_crossentropy,
    keras.losses.categorical_focal_crossentropy,
    keras.losses.categorical_hinge,
    keras.losses.sparse_categorical_crossentropy,
)


class CompiledLoss:
    """The loss of `model.compile(loss=..., loss_weights=...)`.

    It is computed by Keras, as `model.evaluate` does: of one or several
    outputs, by their weights, with sample weights and masks. Losses that
    layers add (`add_loss`, regularizers of weights or activities) are left
    out: they are not of the labels, and would hide what the outputs lose. A
    model whose class has a `compute_loss` of its own is asked by that, and
    what it counts is counted.

    Args:
        model: `keras.Model` or layer.

    Attributes:
        is_there: Whether there is such a loss.
        classes: The only loss, where it is a categorical one of Keras; else
            None.
    """

    def __init__(self, model: keras.layers.Layer):
        self._model = model
        loss = getattr(model, "loss", None)
        own = getattr(type(model), "compute_loss", None)
        self._overridden = own not in (None, keras.Model.compute_loss)
        self.is_there = loss is not None or self._overridden
        self.classes = None if self._overridden else _categorical(loss)
        self._keras = None

    def __call__(self, outputs: Any, batch: Batch, masks: Any = None) -> float:
        """A float: the loss of a batch.

        Args:
            outputs: What the model put out, a structure of arrays.
            batch: `Batch`, with labels.
            masks: The masks of the outputs, in their structure; an array, or
                None where there is none.

        Raises:
            ValueError: Keras cannot compute it.
        """
        try:
            return float(ops.convert_to_numpy(self._of(outputs, batch, masks)))
        except Exception as error:
            # Keras, each framework and functions of the user have kinds.
            raise ValueError(
                "The loss that the model was compiled with cannot be computed. "
                f"Received: outputs of shape {shapes(outputs)}, labels of "
                f"shape {shapes(batch.labels)}. It says: {reason_of(error)}"
            ) from error

    def _of(self, outputs, batch, masks):
        if self._keras is None and not self._overridden:
            self._keras = _of_losses_alone(self._model)
        labels, weights, outputs, masks = keras.tree.map_structure(
            _tensor, (batch.labels, batch.weights, outputs, masks)
        )
        if masks is not None:
            keras.tree.map_structure(set_keras_mask, outputs, masks)
        if self._overridden:
            # What it assigns, as to a metric, is dropped.
            with keras.StatelessScope():
                return self._model.compute_loss(
                    keras.tree.map_structure(_tensor, batch.inputs),
                    labels,
                    outputs,
                    weights,
                )
        return self._keras.compute_loss(
            y=labels, y_pred=outputs, sample_weight=weights
        )


def shapes(structure: Any) -> Any:
    """The shapes of the arrays in a structure."""
    return keras.tree.map_structure(
        lambda x: None if x is None else tuple(x.shape), structure
    )


def _tensor(x):
    return None if x is None else ops.convert_to_tensor(x)


def _categorical(loss: Any) -> Any:
    flat = keras.tree.flatten(loss)
    if len(flat) != 1 or flat[0] is None:
        return None
    if isinstance(flat[0], str) and flat[0].lower() in ("crossentropy", "ce"):
        # Of outputs of several classes it is one of the two.
        return flat[0]
    try:
        loss = keras.losses.get(flat[0])
    except ValueError:
        return None
    known = isinstance(loss, _CATEGORICAL[:4]) or loss in _CATEGORICAL[4:]
    # Elsewhere the classes are not along the last axis.
    return loss if known and getattr(loss, "axis", -1) == -1 else None


def _of_losses_alone(model: keras.Model) -> keras.Model:
    """A `keras.Model` without layers that is compiled with the same losses.

    What Keras builds at the first call, and its metrics, is not the model's.
    """
    # Keras 3.15. Its public `get_compile_config` serializes the optimizer and
    # functions too, which fails for some that are the user's own.
    config = getattr(model, "_compile_config", None)
    config = config.config if config else model.get_compile_config()
    alone = keras.Model(name="losses")
    # A sequential model has one output, and no names.
    if getattr(model, "output_names", None):
        alone.output_names = list(model.output_names)
    alone.compile(
        optimizer=None,
        loss=model.loss,
        loss_weights=config.get("loss_weights"),
        jit_compile=False,
    )
    return alone
