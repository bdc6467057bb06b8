"""A cloud part made over for mixtures: exactly linear, or with as little cross-talk as can be."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import nn

from datamix.errors import ConfigError
from datamix.models.layers import PReLU, ScaleNorm
from datamix.models.split import Shape
from datamix.models.trace import on_meta, trace

_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU),
    *(nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardtanh, nn.Tanh, nn.Softplus, nn.Softsign, PReLU),
)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def linear_copy(part: nn.Module, shape: Shape, name: str) -> nn.Module:
    """A copy of a part that is exactly linear in eval mode.

    Biases and dropout are left out, activations become the identity, batch norms
    :class:`ScaleNorm`, max pooling average pooling. The weights that are left are copied.

    Args:
        part: (n, *shape) -> (n, ...).
        shape: of one input.
        name: of the part, for the error.

    Raises:
        ConfigError: what is left holds an operation that isn't linear.
    """
    copy = _replaced(deepcopy(part), _linear, {})
    if (problem := trace(copy, shape).problem) is not None:
        raise ConfigError(f"{name} cannot be made linear: {problem}, expected sums and products")
    return copy


def prelu_copy(part: nn.Module, shape: Shape) -> nn.Module:
    """A copy of a part with PReLUs for activations and norms without an offset.

    Args:
        part: (n, *shape) -> (n, ...).
        shape: of one input.
    """
    copy = deepcopy(part)
    channels = {
        id(copy.get_submodule(name)): count for name, count in _channels(part, shape).items()
    }

    def make(layer: nn.Module) -> nn.Module | None:
        if isinstance(layer, _ACTIVATIONS) and id(layer) in channels:
            return PReLU(channels[id(layer)])
        return _scale_only(layer) if isinstance(layer, nn.BatchNorm2d) else None

    return _replaced(copy, make, {})


def _channels(part: nn.Module, shape: Shape) -> dict[str, int]:
    """How many channels go into each activation, by its name."""
    copy = on_meta(part)
    found: dict[str, int] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _, inputs: found.update({name: inputs[0].shape[1]})

    for name, layer in copy.named_modules():
        if isinstance(layer, _ACTIVATIONS):
            layer.register_forward_pre_hook(note(name))
    with torch.no_grad():
        copy(torch.empty((1, *shape), device="meta"))
    return found


def _replaced(
    module: nn.Module, make: Callable[[nn.Module], nn.Module | None], done: dict[int, nn.Module]
) -> nn.Module:
    """The module with ``make(layer)`` in the place of each layer for which there is one."""
    if id(module) in done:
        return done[id(module)]
    new = make(module)
    if new is None:
        for name, child in module._modules.items():
            if child is not None:
                setattr(module, name, _replaced(child, make, done))
        new = module
        if type(module) is nn.Sequential:
            new = nn.Sequential(*(part for part in module if type(part) is not nn.Identity))
    done[id(module)] = new
    return new


def _linear(layer: nn.Module) -> nn.Module | None:
    """The linear layer in the place of this one; None where it stays as it is."""
    if isinstance(layer, _ACTIVATIONS + _DROPOUTS):
        return nn.Identity()
    if isinstance(layer, nn.BatchNorm2d):
        return _scale_only(layer)
    if isinstance(layer, nn.MaxPool2d) and layer.dilation == 1:
        return nn.AvgPool2d(layer.kernel_size, layer.stride, layer.padding, layer.ceil_mode)
    if isinstance(layer, nn.AdaptiveMaxPool2d):
        return nn.AdaptiveAvgPool2d(layer.output_size)
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        layer.bias = None
    return None


def _scale_only(norm: nn.BatchNorm2d) -> ScaleNorm:
    """A norm without an offset, its gain and mean square taken from the batch norm's."""
    scale = ScaleNorm(norm.num_features, momentum=norm.momentum or 0.1, eps=norm.eps)
    if norm.affine:
        scale.gain = nn.Parameter(norm.weight.detach().clone())
    if norm.running_mean is not None and norm.running_var is not None:
        scale.square = norm.running_var + norm.running_mean.square()
    return scale
