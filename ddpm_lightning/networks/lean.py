"""The U-Net's layers with little memory: of most, nothing is kept for the gradient but inputs.

`torch.utils.checkpoint` forgets what lies within a layer, too, but has all of it at once when it
computes it again: at 256x256 pixels that is most of the memory of a step. Here what a convolution
takes is made piece by piece, on the way forward and back; of whole tensors there are the inputs,
what lies between a block's convolutions, and their gradients, one of which takes another's place
where that is no longer needed. Two inputs of a block are not joined unless a group of its norm has
channels of both.

Numbers are those of the layers, up to rounding. The gradients cannot be differentiated again.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ddpm_lightning.allocator import return_freed_memory

# Of a tensor: more and smaller ones leave holes in the heap (docs/benchmarks.md).
_NUM_PIECES = 16  # at most
_PIECE_VALUES = 2**20  # of each, at least

Tensors = Sequence[Tensor]


def lean_block(
    inputs: Tensors,
    shift: Tensor,
    norm_1: nn.GroupNorm,
    conv_1: nn.Conv2d,
    norm_2: nn.GroupNorm,
    conv_2: nn.Conv2d,
    shortcut: nn.Conv2d | None,
    keeps_between: bool,
) -> Tensor:
    """Map x to `conv_2(silu(norm_2(conv_1(silu(norm_1(x))) + shift))) + shortcut(x)`.

    Args:
        inputs: The parts of x, [N, C_i, H, W], whose channels follow one another.
        shift: [N, C_out], for all pixels.
        norm_1: Over the channels of all inputs.
        conv_1: 3x3, to C_out channels.
        norm_2: Over C_out channels.
        conv_2: 3x3, to C_out channels.
        shortcut: 1x1, to C_out channels; None for x itself.
        keeps_between: Whether what conv_1 gives is kept for the gradient, not computed again.

    Returns:
        [N, C_out, H, W].
    """
    layers = (norm_1, conv_1, norm_2, conv_2) + (() if shortcut is None else (shortcut,))
    make = partial(_Block, norm_1, norm_2, len(inputs), keeps_between)
    return _apply(make, *inputs, shift, *_parameters(*layers))


def lean_output(x: Tensor, norm: nn.GroupNorm, conv: nn.Conv2d) -> Tensor:
    """Map x [N, C, H, W] to `conv(silu(norm(x)))`, [N, C_out, H, W]; the convolution is 3x3."""

    def make(tensors: Tensors) -> _Output:
        return _Output(_normed_convolution(tensors[:1], norm, tensors[1:]))

    return _apply(make, x, *_parameters(norm, conv))


def lean_upsample(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Map x [N, C, H, W] to a 3x3 convolution of its doubled pixels, [N, C_out, 2H, 2W]."""

    def make(tensors: Tensors) -> _Single:
        x, weight, bias = tensors
        return _Single(_Convolution([_Doubled(x)], weight, bias))

    return _apply(make, x, *_parameters(conv))


def lean_downsample(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Map x [N, C, H, W] to a 3x3 convolution with stride 2, [N, C_out, H/2, W/2].

    Even H and W have a row and a column of zeros at their ends.
    """
    return _apply(_Halving, x, *_parameters(conv))


def _parameters(*layers: nn.Module) -> list[Tensor]:
    return [parameter for layer in layers for parameter in layer.parameters(recurse=False)]


class _Lean(Protocol):
    """A function of tensors."""

    def forward(self) -> tuple[Tensor, Tensors]:
        """Give the output, and what to keep for the gradient besides the tensors."""

    def backward(self, gradient: Tensor, kept: Tensors) -> Sequence[Tensor]:
        """Give the gradients of the tensors, in their order, from the output's."""


def _apply(make: Callable[[Tensors], _Lean], *tensors: Tensor) -> Tensor:
    output: Tensor = _Function.apply(make, *tensors)
    return output


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, make: Callable[[Tensors], _Lean], *tensors: Tensor) -> Tensor:
        output, kept = make(tensors).forward()
        ctx.make, ctx.num_tensors = make, len(tensors)
        ctx.save_for_backward(*tensors, *kept)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tensors, kept = ctx.saved_tensors[: ctx.num_tensors], ctx.saved_tensors[ctx.num_tensors :]
        return None, *ctx.make(tensors).backward(gradient, kept)


class _Block:
    """See `lean_block`; its tensors are the inputs, the shift and the layers' parameters."""

    def __init__(
        self,
        norm_1: nn.GroupNorm,
        norm_2: nn.GroupNorm,
        num_inputs: int,
        keeps_between: bool,
        tensors: Tensors,
    ) -> None:
        self._norm_2, self._keeps_between = norm_2, keeps_between
        inputs, (self._shift, *parameters) = tensors[:num_inputs], tensors[num_inputs:]
        self._sizes = [x.shape[1] for x in inputs]
        self._is_joined = any(size % _group_size(norm_1) for size in self._sizes)
        if self._is_joined:
            inputs = [torch.cat(list(inputs), dim=1)]
        self._first = _normed_convolution(inputs, norm_1, parameters[:4])
        self._second = parameters[4:8]
        self._shortcut = _Shortcut(inputs, parameters[8:])

    def forward(self) -> tuple[Tensor, Tensors]:
        between = self._make_between()
        output = self._shortcut.add_to(self._make_second(between).forward())
        return output, [between] if self._keeps_between else []

    def backward(self, gradient: Tensor, kept: Tensors) -> Sequence[Tensor]:
        between = kept[0] if self._keeps_between else self._make_between()
        (of_between,), of_second = self._make_second(between).backward(gradient)
        del between
        of_shift = of_between.sum((2, 3))
        of_inputs, of_first = self._first.backward(of_between, is_spent=True)
        of_shortcut = self._shortcut.backward(gradient, of_inputs)
        if self._is_joined:
            of_inputs = list(torch.split(of_inputs[0], self._sizes, dim=1))
        return [*of_inputs, of_shift, *of_first, *of_second, *of_shortcut]

    def _make_between(self) -> Tensor:
        return self._first.forward().add_(self._shift[:, :, None, None])

    def _make_second(self, between: Tensor) -> "_Convolution":
        return _normed_convolution([between], self._norm_2, self._second)


class _Single:
    """A convolution alone; its tensors are the input and the parameters."""

    def __init__(self, layer: "_Convolution") -> None:
        self._layer = layer

    def forward(self) -> tuple[Tensor, Tensors]:
        return self._layer.forward(), []

    def backward(self, gradient: Tensor, kept: Tensors) -> Sequence[Tensor]:
        of_inputs, of_parameters = self._layer.backward(gradient)
        return [*of_inputs, *of_parameters]


class _Output(_Single):
    """The last layer, whose gradient is the first."""

    def backward(self, gradient: Tensor, kept: Tensors) -> Sequence[Tensor]:
        # From here on a step has most: what it freed on the way are holes among what it keeps.
        if gradient.device.type == "cpu":
            return_freed_memory()
        return super().backward(gradient, kept)


class _Halving:
    """See `lean_downsample`; its tensors are the input and the parameters."""

    def __init__(self, tensors: Tensors) -> None:
        self._x, self._weight, self._bias = tensors
        num, channels, height, width = self._x.shape
        self._shape = (num, len(self._weight), height // 2, width // 2)
        halves = (num, 4 * channels, height // 2, width // 2)
        self._pieces = list(_pieces(halves))

    def forward(self) -> tuple[Tensor, Tensors]:
        output = self._x.new_empty(self._shape)
        for images, rows in self._pieces:
            taken = self._take(images, rows)
            output[images, :, rows] = F.conv2d(taken, self._weight, self._bias, stride=2)
        return output, []

    def backward(self, gradient: Tensor, kept: Tensors) -> Sequence[Tensor]:
        of_x, of_weight = torch.empty_like(self._x), torch.zeros_like(self._weight)
        below: Tensor | None = None
        for images, rows in self._pieces:
            outer, taken = gradient[images, :, rows], self._take(images, rows)
            inner, of_piece = _convolution_backward(outer, taken, self._weight, (0, 0), 2)
            of_weight += of_piece
            of_x[images, :, 2 * rows.start : 2 * rows.stop] = inner[:, :, :-1, :-1]
            if rows.start > 0:
                assert below is not None
                of_x[images, :, 2 * rows.start] += below
            below = inner[:, :, -1, :-1].clone()
        return [of_x, of_weight, gradient.sum((0, 2, 3))]

    def _take(self, images: slice, rows: slice) -> Tensor:
        """Make what a piece of the output sees, [n, C, 2 * rows + 1, W + 1]."""
        x = self._x[images, :, 2 * rows.start : 2 * rows.stop + 1]
        return F.pad(x, (0, 1, 0, 2 * (rows.stop - rows.start) + 1 - x.shape[2]))


class _Source(ABC):
    """What a convolution takes: made from an input, piece by piece."""

    shape: Sequence[int]
    """[N, C, H, W]."""

    @abstractmethod
    def write(self, images: slice, rows: slice, into: Tensor) -> None:
        """Write a piece, [n, C, rows, W]."""

    @abstractmethod
    def backward(self, gradient: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Give the gradients of input and parameters, from this one's, which it may overwrite."""


def _normed_convolution(inputs: Tensors, norm: nn.GroupNorm, parameters: Tensors) -> "_Convolution":
    """Make a convolution of the activated group norm of inputs, each of whole groups.

    Args:
        inputs: [N, C_i, H, W].
        norm: Of all their channels.
        parameters: The norm's scale and offset, the convolution's weight and bias.
    """
    scale, offset, weight, bias = parameters
    sources = [
        _Activated(x, norm.eps, _group_size(norm), scale[channels], offset[channels])
        for x, channels in zip(inputs, _channels(inputs), strict=True)
    ]
    return _Convolution(sources, weight, bias)


class _Convolution:
    """A 3x3 convolution.

    Args:
        sources: What it takes, one after the other's channels.
        weight: [C_out, C, 3, 3].
        bias: [C_out].
    """

    def __init__(self, sources: Sequence[_Source], weight: Tensor, bias: Tensor) -> None:
        self._sources, self._weight, self._bias = sources, weight, bias
        self._channels = _channels(sources)
        num, _, self._height, self._width = sources[0].shape
        self._num = num
        self._pieces = list(_pieces((num, weight.shape[1], self._height, self._width)))

    def forward(self) -> Tensor:
        """Give the output, [N, C_out, H, W]."""
        shape = (self._num, len(self._weight), self._height, self._width)
        output = self._weight.new_empty(shape)
        for images, rows in self._pieces:
            taken = self._take(images, rows)
            output[images, :, rows] = F.conv2d(taken, self._weight, self._bias, padding=(0, 1))
        return output

    def backward(
        self, gradient: Tensor, is_spent: bool = False
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Give the gradients of the inputs, and of the parameters: the sources', and its own.

        Args:
            gradient: Of the output.
            is_spent: Whether one of the inputs' may take its memory.
        """
        of_bias = gradient.sum((0, 2, 3))
        of_sources = self._of_sources(gradient if is_spent else None)
        of_weight: Tensor | None = None  # of deep levels it is large, and one piece's
        below: Tensor | None = None
        for images, rows in self._pieces:
            taken = self._take(images, rows)
            outer = gradient[images, :, rows]
            inner, of_piece = _convolution_backward(outer, taken, self._weight, (0, 1))
            of_weight = of_piece if of_weight is None else of_weight.add_(of_piece)
            # A row at a piece's edge gets something from the piece on either side. The row below
            # waits: in the gradient's memory it would overwrite what the next piece reads.
            for of_source, channels in zip(of_sources, self._channels, strict=True):
                of_source[images, :, rows] = inner[:, channels, 1:-1]
                if rows.start > 0:
                    assert below is not None
                    of_source[images, :, rows.start - 1] += inner[:, channels, 0]
                    of_source[images, :, rows.start] += below[:, channels]
            below = inner[:, :, -1].clone()
        found = [
            source.backward(of_source)
            for source, of_source in zip(self._sources, of_sources, strict=True)
        ]
        of_parameters = [
            torch.cat(parts) for parts in zip(*(parameters for _, parameters in found), strict=True)
        ]
        assert of_weight is not None
        return [x for x, _ in found], [*of_parameters, of_weight, of_bias]

    def _of_sources(self, spent: Tensor | None) -> list[Tensor]:
        """Make room for the sources' gradients: for one of them, the spent tensor."""
        rooms: list[Tensor] = []
        for source in self._sources:
            if spent is not None and spent.shape == source.shape:
                rooms.append(spent)
                spent = None
            else:
                rooms.append(self._weight.new_empty(source.shape))
        return rooms

    def _take(self, images: slice, rows: slice) -> Tensor:
        """Make a piece with a row more above and below, which is zero beyond the image.

        Returns:
            [n, C, rows + 2, W].
        """
        seen = slice(max(rows.start - 1, 0), min(rows.stop + 1, self._height))
        inside = slice(seen.start - rows.start + 1, seen.stop - rows.start + 1)
        num, height = images.stop - images.start, rows.stop - rows.start + 2
        taken = self._weight.new_empty(num, self._weight.shape[1], height, self._width)
        taken[:, :, : inside.start] = 0
        taken[:, :, inside.stop :] = 0
        for source, channels in zip(self._sources, self._channels, strict=True):
            source.write(images, seen, taken[:, channels, inside])
        return taken


class _Activated(_Source):
    """SiLU of the group norm of some channels.

    Args:
        x: [N, C, H, W], C a multiple of the size of a group.
        eps: The norm's, added to variances.
        group_size: Channels in a group.
        scale: The norm's, [C].
        offset: The norm's, [C].
    """

    def __init__(
        self, x: Tensor, eps: float, group_size: int, scale: Tensor, offset: Tensor
    ) -> None:
        self.shape = x.shape
        self._x, self._scale, self._group_size = x, scale[:, None, None], group_size
        self._pieces = list(_pieces(x.shape))
        # all that follows is [N, C, 1, 1]
        self._mean = self._group_means(x.sum((2, 3), keepdim=True))
        # about the mean: a difference of mean squares would lose what it is about
        squares = torch.zeros_like(self._mean)
        for images, rows, room in self._rooms():
            centred = torch.sub(x[images, :, rows], self._mean[images], out=room)
            squares[images] += centred.square_().sum((2, 3), keepdim=True)
        self._inverse = (self._group_means(squares) + eps).rsqrt()
        self._factor = self._inverse * self._scale
        self._shift = offset[:, None, None] - self._mean * self._factor

    def _group_means(self, sums: Tensor) -> Tensor:
        """Give each channel the mean of its group's pixels, from sums over channels."""
        groups = sums.reshape(len(sums), -1, self._group_size, 1, 1).mean(2)
        of_channels = groups.repeat_interleave(self._group_size, dim=1)
        return of_channels / (self.shape[2] * self.shape[3])

    def _rooms(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Give every piece and the same room for what is made of it."""
        images, rows = self._pieces[0]
        room = self._x[images, :, rows].new_empty(self._x[images, :, rows].shape)
        for images, rows in self._pieces:
            yield images, rows, room[: images.stop - images.start, :, : rows.stop - rows.start]

    def write(self, images: slice, rows: slice, into: Tensor) -> None:
        torch.mul(self._x[images, :, rows], self._factor[images], out=into)
        F.silu(into.add_(self._shift[images]), inplace=True)

    def backward(self, gradient: Tensor) -> tuple[Tensor, list[Tensor]]:
        sums, products = torch.zeros_like(self._mean), torch.zeros_like(self._mean)
        for images, rows, room in self._rooms():
            x, part = self._x[images, :, rows], gradient[images, :, rows]
            normed = torch.mul(x, self._factor[images], out=room).add_(self._shift[images])
            torch.ops.aten.silu_backward.grad_input(part, normed, grad_input=part)
            sums[images] += part.sum((2, 3), keepdim=True)
            centred = torch.sub(x, self._mean[images], out=room)
            products[images] += centred.mul_(part).sum((2, 3), keepdim=True)
        products *= self._inverse
        # With y = (x - mean) inverse and means over groups, the gradient g becomes
        # inverse (scale g - mean(scale g) - y mean(scale g y)), here linear in g and x.
        slope = self._group_means(self._scale * products) * -(self._inverse**2)
        level = self._group_means(self._scale * sums) * -self._inverse - slope * self._mean
        for images, rows in self._pieces:
            part = gradient[images, :, rows].mul_(self._factor[images])
            part.addcmul_(self._x[images, :, rows], slope[images]).add_(level[images])
        return gradient, [products.sum((0, 2, 3)), sums.sum((0, 2, 3))]


class _Doubled(_Source):
    """Pixels as squares of four.

    Args:
        x: [N, C, H / 2, W / 2].
    """

    def __init__(self, x: Tensor) -> None:
        num, channels, height, width = x.shape
        self.shape = (num, channels, 2 * height, 2 * width)
        self._x = x

    def write(self, images: slice, rows: slice, into: Tensor) -> None:
        which = torch.arange(rows.start, rows.stop, device=self._x.device) // 2
        into.copy_(self._x[images, :, which].repeat_interleave(2, dim=3))

    def backward(self, gradient: Tensor) -> tuple[Tensor, list[Tensor]]:
        return F.avg_pool2d(gradient, 2).mul_(4), []


class _Shortcut:
    """A 1x1 convolution of a block's inputs, or they themselves."""

    def __init__(self, inputs: Tensors, parameters: Tensors) -> None:
        self._inputs = inputs
        self._channels = _channels(inputs)
        self._weight: Tensor | None
        self._bias: Tensor | None
        self._weight, self._bias = parameters or (None, None)

    def add_to(self, output: Tensor) -> Tensor:
        """Add it to a block's output."""
        for x, channels in zip(self._inputs, self._channels, strict=True):
            if self._weight is None:
                output[:, channels] += x
                continue
            for images, rows in _pieces(x.shape):
                output[images, :, rows] += F.conv2d(x[images, :, rows], self._weight[:, channels])
        return output if self._bias is None else output.add_(self._bias[:, None, None])

    def backward(self, gradient: Tensor, of_inputs: Tensors) -> list[Tensor]:
        """Add its share to the inputs' gradients, and give those of its parameters."""
        of_weight = None if self._weight is None else torch.zeros_like(self._weight)
        for x, of_x, channels in zip(self._inputs, of_inputs, self._channels, strict=True):
            if self._weight is None or of_weight is None:
                of_x += gradient[:, channels]
                continue
            weight = self._weight[:, channels]
            for images, rows in _pieces(x.shape):
                piece, outer = x[images, :, rows], gradient[images, :, rows]
                inner, of_piece = _convolution_backward(outer, piece, weight, (0, 0))
                of_x[images, :, rows] += inner
                of_weight[:, channels] += of_piece
        return [] if of_weight is None else [of_weight, gradient.sum((0, 2, 3))]


def _convolution_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, padding: tuple[int, int], stride: int = 1
) -> tuple[Tensor, Tensor]:
    """Give the gradients of x and weight."""
    rest = ([stride, stride], list(padding), [1, 1], False, [0, 0], 1, [True, True, False])
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(gradient, x, weight, None, *rest)
    return of_x, of_weight


def _group_size(norm: nn.GroupNorm) -> int:
    return norm.num_channels // norm.num_groups


def _channels(parts: Sequence[Tensor] | Sequence[_Source]) -> list[slice]:
    """Give each part's channels among those of all."""
    stops = accumulate((part.shape[1] for part in parts), initial=0)
    return [slice(start, stop) for start, stop in pairwise(stops)]


def _pieces(shape: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Cut [N, C, H, W] into whole images or, where one is too large, into rows of it."""
    num, channels, height, width = shape
    most = max(_PIECE_VALUES, num * channels * height * width // _NUM_PIECES)
    images = max(1, most // (channels * height * width))
    rows = height if images > 1 else max(1, min(height, most // (channels * width)))
    for first in range(0, num, images):
        for top in range(0, height, rows):
            yield slice(first, min(first + images, num)), slice(top, min(top + rows, height))
