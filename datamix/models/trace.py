"""What a part is, read off one run of it on the meta device: shapes, linearity, reach.

Every operation that torch dispatches is seen, whatever module it comes from. So nothing depends on
how a network is written, and nothing is declared by hand: a part is linear if every operation that
touches its input is, and a chain of such operations is linear for all values.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from datamix.models.split import Shape


@dataclass(frozen=True, slots=True)
class Reach:
    """Which inputs an output depends on, along height and width.

    Output ``i`` sees the inputs ``i * step + low`` to ``i * step + high``, the same linear map of
    them for every ``i`` (away from the borders).
    """

    step: tuple[int, int] = (1, 1)
    low: tuple[int, int] = (0, 0)
    high: tuple[int, int] = (0, 0)

    @property
    def kernel(self) -> tuple[int, int]:
        """Height and width of the one convolution that does the same."""
        return self.high[0] - self.low[0] + 1, self.high[1] - self.low[1] + 1

    def through(self, kernel: Any, stride: Any, padding: Any, dilation: Any = 1) -> Reach:
        """What is seen through one more window."""
        pads = [_at(padding, axis) for axis in (0, 1)]
        wide = [(_at(kernel, axis) - 1) * _at(dilation, axis) for axis in (0, 1)]
        window = Reach(
            (_at(stride, 0), _at(stride, 1)),
            (-pads[0], -pads[1]),
            (wide[0] - pads[0], wide[1] - pads[1]),
        )
        return self.then(window)

    def then(self, other: Reach) -> Reach:
        """What is seen through this and then ``other``."""
        axes = (0, 1)
        step, low, high = (
            tuple(self.step[axis] * other.step[axis] for axis in axes),
            tuple(self.low[axis] + self.step[axis] * other.low[axis] for axis in axes),
            tuple(self.high[axis] + self.step[axis] * other.high[axis] for axis in axes),
        )
        return Reach((step[0], step[1]), (low[0], low[1]), (high[0], high[1]))

    def joined(self, other: Reach) -> Reach | None:
        """What a sum of two sees; None where their windows move at different speeds."""
        if self.step != other.step:
            return None
        low = tuple(min(pair) for pair in zip(self.low, other.low, strict=True))
        high = tuple(max(pair) for pair in zip(self.high, other.high, strict=True))
        return Reach(self.step, (low[0], low[1]), (high[0], high[1]))


@dataclass(frozen=True, slots=True)
class Trace:
    """What was found.

    Attributes:
        problem: the operation that isn't linear in the input, and where; None if the part is.
        reach: of the output; None where the part isn't linear, or is no convolution.
    """

    problem: str | None
    reach: Reach | None


def on_meta(part: nn.Module) -> nn.Module:
    """A copy in eval mode that holds shapes and no values; the values are not copied first."""
    memo: dict[int, Any] = {}
    for tensor in chain(part.parameters(), part.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
    return deepcopy(part, memo).eval()


def output_shape(part: nn.Module, shape: Shape) -> Shape:
    """The shape of one output for one input of ``shape``, without the batch's axis."""
    with torch.no_grad():
        return tuple(on_meta(part)(torch.empty((1, *shape), device="meta")).shape[1:])


def trace(part: nn.Module, shape: Shape) -> Trace:
    """Follow one input of ``shape`` through a part in eval mode."""
    copy = on_meta(part)
    where: list[str] = []
    for name, module in copy.named_modules():
        _note(module, name, where)
    inputs = torch.empty((1, *shape), device="meta")
    follower = _Follower(inputs)
    try:
        with torch.no_grad(), follower:
            output = copy(inputs)
    except _NotLinear as problem:
        layer = next((name for name in reversed(where) if name), "")
        kind = type(copy.get_submodule(layer)).__name__
        return Trace(f"{problem} in layer {layer!r} ({kind})" if layer else str(problem), None)
    if not follower.follows(output):
        return Trace("the output does not depend on the input", None)
    return Trace(None, follower.reach(output))


def _note(module: nn.Module, name: str, where: list[str]) -> None:
    """Keep ``name`` in ``where`` while the module runs."""

    def leave(*_: object) -> None:
        where.pop()

    module.register_forward_pre_hook(lambda *_: where.append(name))
    module.register_forward_hook(leave)


def is_linear(part: nn.Module, shape: Shape) -> bool:
    """Whether a part is exactly linear in eval mode: ``f(a u + b v) == a f(u) + b f(v)``.

    Every operation has to be; where the part holds values, that is tried on numbers as well.

    Args:
        part: (n, *shape) -> (n, ...).
        shape: of one input.
    """
    if trace(part, shape).problem is not None:
        return False
    has_values = all(not tensor.is_meta for tensor in chain(part.parameters(), part.buffers()))
    return not has_values or _superposes(part, shape)


def _superposes(part: nn.Module, shape: Shape) -> bool:
    copy = deepcopy(part).to("cpu").double().eval()
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(
            (1, *shape), generator=generator, dtype=torch.float64, device=torch.device("cpu")
        )

    u, v = draw(), draw()
    with torch.no_grad():
        together, apart = copy(1.5 * u - 0.7 * v), 1.5 * copy(u) - 0.7 * copy(v)
    largest = float(apart.abs().max())
    return bool((together - apart).abs().max() <= 1e-9 * max(largest, 1e-30))


class _NotLinear(Exception):
    """An operation that is not linear in the input."""


# Linear, and each output place sees the same input place.
_PLACEWISE = frozenset(("clone", "contiguous", "detach", "alias", "_to_copy", "neg", "lift_fresh"))
# Linear in the first argument; which places the result sees is not followed.
_REARRANGING = frozenset(
    (
        *("view", "_unsafe_view", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze"),
        *("expand", "select", "slice", "split", "split_with_sizes", "unbind", "flip", "roll"),
        *("repeat", "mean", "sum", "cumsum", "_adaptive_avg_pool2d", "pixel_shuffle"),
        *("pixel_unshuffle", "channel_shuffle", "reflection_pad2d", "replication_pad2d"),
        *("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "as_strided"),
        *("native_channel_shuffle", "_adaptive_avg_pool3d", "avg_pool1d", "avg_pool3d"),
    )
)
_PRODUCTS = frozenset(("mm", "bmm", "mv", "dot", "matmul"))


class _Follower(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows what depends on the input, and stops at the first operation that isn't linear."""

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # The tensors are held so that no other one gets the id of one that is gone.
        self._seen: dict[int, tuple[Tensor, Reach | None]] = {id(inputs): (inputs, Reach())}

    def follows(self, value: object) -> bool:
        return id(value) in self._seen

    def reach(self, value: object) -> Reach | None:
        return self._seen[id(value)][1]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        reach = None
        if touched := [value for value in tree_iter((args, kwargs)) if self.follows(value)]:
            # An operation in place ends in an underscore and computes the same.
            name = func.overloadpacket.__name__
            name = name if name.startswith("_") else name.rstrip("_")
            reach = self._through(name, args, kwargs, len(touched))
        result = func(*args, **kwargs)
        if touched:
            for value in tree_iter(result):
                if isinstance(value, Tensor):
                    self._seen[id(value)] = (value, reach)
        return result

    def _through(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], touched: int
    ) -> Reach | None:
        """The reach of the result of one operation.

        Raises:
            _NotLinear: it isn't linear in what depends on the input.
        """
        if (dtype := kwargs.get("dtype")) is not None and not dtype.is_floating_point:
            raise _NotLinear(f"{name} to {dtype} is not linear")
        first: Any = args[0] if args else None
        alone = touched == 1 and self.follows(first)
        if alone and name in _PLACEWISE:
            return self.reach(first)
        if alone and name in _REARRANGING:
            return None
        if alone and name in ("convolution", "avg_pool2d", "constant_pad_nd", "div"):
            return getattr(self, f"_{name}")(*args, **kwargs)  # type: ignore[no-any-return]
        if touched == 1 and name in _PRODUCTS:
            return None
        if touched == 1 and name == "mul":
            one, other = args[:2]
            return self._times(*((one, other) if self.follows(one) else (other, one)))
        if name in ("add", "sub") and all(self.follows(value) for value in args[:2]):
            return self._sum(list(args[:2]))
        if name == "cat" and all(self.follows(value) for value in first or ()):
            axis = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            return self._sum(first) if axis in (1, -3) and first[0].ndim == 4 else None
        raise _NotLinear(f"{name} is not linear")

    def _sum(self, values: list[Tensor]) -> Reach | None:
        """Of a sum, or of channels side by side."""
        reach = self.reach(values[0])
        for value in values[1:]:
            other = self.reach(value)
            if reach is None or other is None or value.shape[-2:] != values[0].shape[-2:]:
                return None
            reach = reach.joined(other)
        return reach

    def _times(self, value: Tensor, factor: object) -> Reach | None:
        """One factor per channel leaves a convolution one; one per place does not."""
        places = factor.shape[-2:] if isinstance(factor, Tensor) else ()
        return self.reach(value) if prod(places) == 1 else None

    def _div(self, value: Tensor, divisor: object, **rounding: object) -> Reach | None:
        if rounding:
            raise _NotLinear("div with rounding is not linear")
        return self._times(value, divisor)

    def _convolution(self, value: Tensor, weight: Tensor, bias: object, *rest: Any) -> Reach | None:
        stride, padding, dilation, transposed = rest[:4]
        if bias is not None:
            raise _NotLinear("convolution with a bias is not linear")
        reach = self.reach(value)
        if reach is None or transposed or weight.ndim != 4:
            return None
        return reach.through(weight.shape[2:], stride, padding, dilation)

    def _avg_pool2d(
        self, value: Tensor, kernel: Any, stride: Any = (), padding: Any = 0, *_: Any
    ) -> Reach | None:
        reach = self.reach(value)
        return reach and reach.through(kernel, stride or kernel, padding)

    def _constant_pad_nd(self, value: Tensor, pads: list[int], fill: float = 0) -> Reach | None:
        if fill:
            raise _NotLinear(f"padding with {fill} is not linear")
        reach = self.reach(value)
        if reach is None or value.ndim != 4:
            return None
        left, _, top, _ = (*pads, 0, 0, 0, 0)[:4]
        return reach.through(1, 1, (top, left))


def _at(value: Any, axis: int) -> int:
    """One number for both axes, or one each."""
    if isinstance(value, int):
        return value
    return int(value[axis if len(value) > 1 else 0])
