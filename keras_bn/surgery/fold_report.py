"""What `fold` did, layer by layer."""

import collections.abc
import dataclasses

from keras_bn.diagnostics.text_table import text_table

BEFORE = "into the layer before"
AFTER = "into the layer after"
BOTH = "into the layers before and after"
MULTIPLY_ADD = "multiply-add"
KEPT = "kept"


@dataclasses.dataclass(frozen=True)
class LayerFold:
    """What `fold` did with one batch normalization.

    Attributes:
        layer: Name of the layer, after those of the models that it is in:
            `"backbone/bn"`.
        how: `"into the layer before"`, `"into the layer after"` or `"into the
            layers before and after"`, where the absolute scale goes before
            and the rest after; `"multiply-add"`: it became a layer
            `inputs * scale + shift`; or `"kept"`: it is what it was.
        into: Tuple of the names of the layers whose weights changed, in the
            order of the graph.
        reason: Why it was not folded; empty where it was.
    """

    layer: str
    how: str
    into: tuple
    reason: str


class FoldReport(collections.abc.Sequence):
    """A `LayerFold` for each batch normalization; printed as a table.

    No list, as a model would take one for a part of itself.

    Attributes:
        folded: List of those that are gone.
        left: List of the others.
    """

    def __init__(self, layers):
        self._layers = tuple(layers)

    def __getitem__(self, index):
        return self._layers[index]

    def __len__(self):
        return len(self._layers)

    @property
    def folded(self):
        return [one for one in self if one.into]

    @property
    def left(self):
        return [one for one in self if not one.into]

    def __str__(self):
        return text_table(
            ["layer", "folded", "into, or why not"],
            [
                [one.layer, one.how, _into(one) or one.reason]
                for one in self
            ],
        )


def _into(one):
    if one.how != BOTH:
        return ", ".join(one.into)
    before, *after = one.into
    return f"{before} (scale), {', '.join(after)} (sign and shift)"
