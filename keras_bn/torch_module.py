"""What PyTorch's own tools see of the layer.

On PyTorch every Keras layer is a `torch.nn.Module`. The outermost model holds
all variables as parameters in one `ParameterDict`, `_torch_params`, and its
layers are often no modules of it. So Keras's moving statistics are parameters,
which DistributedDataParallel does not broadcast, and what walks over
`modules()` in search of batch normalization finds none and says nothing.

Here, wherever Keras registers the variables of our layer:

* the moving statistics, and what counts for them, are buffers under the names
  that they have as parameters with Keras's layer, so that a `state_dict` fits
  both layers. A buffer is the very tensor that the Keras variable holds;
* a module `BatchNormOfKeras` stands beside them, an instance of PyTorch's
  `_BatchNorm` that refuses what it cannot follow.

A hook on PyTorch's module registration does it, once PyTorch is the backend.
Of a model or layer that was not built, PyTorch sees what it is a part of; a
Keras model alone that was not built shows it no modules yet.
"""

import keras
import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_module_registration_hook

from keras_bn.layer import BatchNormalization

_MARK = "_batch_norm_of_keras"


class BatchNormOfKeras(_BatchNorm):
    """Stands for one layer of ours in `modules()`; has no state.

    The layer itself is no `_BatchNorm`. Tools that only ask for the type take
    this for one without parameters (mixed precision of FSDP); tools that read
    what PyTorch's layer has stop at once.

    Args:
        layer: Name of the layer.

    Raises:
        RuntimeError: `torch.optim.swa_utils.update_bn` comes by.
        AttributeError: `torch.nn.SyncBatchNorm.convert_sync_batchnorm`,
            `torch.func.replace_all_batch_norm_modules_` or others read what
            is not there.
    """

    # Of PyTorch's class, for TorchScript: attributes that are not here.
    __constants__ = []

    def __init__(self, layer):
        # Without PyTorch's weights.
        torch.nn.Module.__init__(self)
        self.layer = layer

    def reset_running_stats(self):
        raise RuntimeError(
            "PyTorch's train() and momentum, by which update_bn works, do not "
            "reach a keras_bn.BatchNormalization. "
            f"Received: layer {self.layer!r}. Make it with momentum=None, "
            "call `keras_bn.reset_statistics(model)`, then "
            "`model(x, training=True)` for each batch."
        )

    def __getattr__(self, name):
        if any(name in x for x in (self._buffers, self._modules)):
            # Added by a tool.
            return super().__getattr__(name)
        instead = {
            "num_features": (
                "instead of convert_sync_batchnorm make the layer with "
                "synchronized=True"
            ),
            "track_running_stats": (
                "instead of replace_all_batch_norm_modules_ set "
                "`layer.update_moving_statistics = False`"
            ),
        }.get(name, "use the layer's own attributes")
        raise AttributeError(
            "A keras_bn.BatchNormalization is not a torch.nn.BatchNorm. "
            f"Received: `{name}` was read of layer {self.layer!r}; {instead}."
        )

    def extra_repr(self):
        return repr(self.layer)

    _load_from_state_dict = torch.nn.Module._load_from_state_dict


class VariablesOfKeras(torch.nn.ParameterDict):
    """Keras's `_torch_params`, where moving statistics are buffers.

    Args:
        parameters: `torch.nn.ParameterDict`, as Keras made it.
        layers: List of the `BatchNormalization` layers whose variables are
            among them.
    """

    def __init__(self, parameters, layers):
        super().__init__(parameters)
        for layer in layers:
            for variable in layer._non_trainable_variables:
                # Not there if the layer was built after its model.
                tensor = self._parameters.pop(variable.path, None)
                if tensor is not None:
                    self.register_buffer(variable.path, tensor)
            # With a slash it is no name of a method here.
            path = layer.path or f"unbuilt/{layer.name}"
            self.add_module(f"{path}/{_MARK}", _mark(layer))

    def _apply(self, fn, recurse=True):
        # Buffers would be replaced, and Keras's variables keep the old ones;
        # of parameters only the data changes.
        names = list(self._buffers)
        self._parameters.update(self._buffers)
        self._buffers.clear()
        try:
            return super()._apply(fn, recurse)
        finally:
            for name in names:
                self._buffers[name] = self._parameters.pop(name)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, *others
    ):
        # `load_state_dict(assign=True)` would do the same to both.
        metadata = {**local_metadata, "assign_to_params_buffers": False}
        super()._load_from_state_dict(state_dict, prefix, metadata, *others)


def _mark(layer):
    """The `BatchNormOfKeras` of a layer, always the same."""
    if _MARK not in layer._modules:
        layer.add_module(_MARK, BatchNormOfKeras(layer.name))
    return layer._modules[_MARK]


def _on_registration(module, name, submodule):
    if isinstance(submodule, BatchNormalization):
        _mark(submodule)
    if (
        name == "_torch_params"
        and isinstance(module, keras.layers.Layer)
        and not isinstance(submodule, VariablesOfKeras)
    ):
        layers = [
            layer
            for layer in module._flatten_layers()
            if isinstance(layer, BatchNormalization)
        ]
        if layers:
            return VariablesOfKeras(submodule, layers)
    return None


register_module_module_registration_hook(_on_registration)
