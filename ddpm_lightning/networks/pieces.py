"""Convolutions, and what they take, that are made piece by piece, forward and back.

A piece is some images whole or, where one is too large, some of an image's rows.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Of a tensor: more and smaller ones leave holes in the heap (docs/benchmarks.md).
_NUM_PIECES = 16  # at most
_PIECE_VALUES = 2**20  # of each, at least

Tensors = Sequence[Tensor]


class Source(ABC):
    """What a convolution takes: made from an input, piece by piece."""

    shape: Sequence[int]
    """[N, C, H, W]."""

    @abstractmethod
    def write(self, images: slice, rows: slice, into: Tensor) -> None:
        """Write a piece, [n, C, rows, W]."""

    @abstractmethod
    def backward(self, gradient: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Give the gradients of input and parameters, from this one's, which it may overwrite."""


def normed_convolution(inputs: Tensors, norm: nn.GroupNorm, parameters: Tensors) -> "Convolution":
    """Make a convolution of the activated group norm of inputs, each of whole groups.

    Args:
        inputs: [N, C_i, H, W].
        norm: Of all their channels.
        parameters: The norm's scale and offset, the convolution's weight and bias.
    """
    scale, offset, weight, bias = parameters
    sources = [
        Activated(x, norm.eps, group_size(norm), scale[channels], offset[channels])
        for x, channels in zip(inputs, _channels(inputs), strict=True)
    ]
    return Convolution(sources, weight, bias)


class Convolution:
    """A 3x3 convolution.

    Args:
        sources: What it takes, one after the other's channels.
        weight: [C_out, C, 3, 3].
        bias: [C_out].
    """

    def __init__(self, sources: Sequence[Source], weight: Tensor, bias: Tensor) -> None:
        self._sources, self._weight, self._bias = sources, weight, bias
        self._channels = _channels(sources)
        num, _, self._height, self._width = sources[0].shape
        self._num = num
        self._pieces = list(_pieces((num, max(weight.shape[:2]), self._height, self._width)))

    def forward(self) -> Tensor:
        """Give the output, [N, C_out, H, W]."""
        output = self._make_output()
        for images, rows in self._pieces:
            taken = self._take(images, rows)
            made = F.conv2d(taken, self._weight, self._bias, padding=(0, 1))
            self._place(made, images, rows, output)
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
            outer = self._find(images, rows, gradient)
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

    def _make_output(self) -> Tensor:
        return self._weight.new_empty(self._num, len(self._weight), self._height, self._width)

    def _place(self, made: Tensor, images: slice, rows: slice, output: Tensor) -> None:
        """Write what a piece gave into the output."""
        output[images, :, rows] = made

    def _find(self, images: slice, rows: slice, gradient: Tensor) -> Tensor:
        """Give the gradient of what a piece gave, from the output's."""
        return gradient[images, :, rows]

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


class Activated(Source):
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
        first = self._x[images, :, rows]
        room = first.new_empty(first.shape)
        for images, rows in self._pieces:
            yield images, rows, room[: images.stop - images.start, :, : rows.stop - rows.start]

    def write(self, images: slice, rows: slice, into: Tensor) -> None:
        """Write a piece of it."""
        torch.mul(self._x[images, :, rows], self._factor[images], out=into)
        F.silu(into.add_(self._shift[images]), inplace=True)

    def backward(self, gradient: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Give the gradients of x, where this one's is, and of the norm's scale and offset."""
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


class Pixels(Source):
    """A tensor itself.

    Args:
        x: [N, C, H, W].
    """

    def __init__(self, x: Tensor) -> None:
        self.shape, self._x = x.shape, x

    def write(self, images: slice, rows: slice, into: Tensor) -> None:
        """Write a piece of it."""
        into.copy_(self._x[images, :, rows])

    def backward(self, gradient: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Give this one's gradient, which is the tensor's."""
        return gradient, []


class DoublingConvolution(Convolution):
    """A 3x3 convolution of doubled pixels, in 4 products for each output instead of 9.

    Of four outputs with one pixel in their midst, each sees 2x2 pixels: four convolutions in one.

    Args:
        x: The pixels, [N, C, H, W].
        weight: [C_out, C, 3, 3].
        bias: [C_out].
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor) -> None:
        # by output (upper, lower), by pixel: which of three doubled pixels that pixel is
        self._which = weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
        kernel = torch.einsum("auk,bvl,ockl->abocuv", self._which, self._which, weight)
        super().__init__([Pixels(x)], kernel.flatten(0, 2), bias.repeat(4))
        self._num_channels = len(weight)

    def backward(
        self, gradient: Tensor, is_spent: bool = False
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Give the gradients of x, and of weight and bias; see `Convolution`."""
        of_inputs, (of_kernel, of_bias) = super().backward(gradient, is_spent)
        of_kernel = of_kernel.view(2, 2, self._num_channels, *of_kernel.shape[1:])
        of_weight = torch.einsum("auk,bvl,abocuv->ockl", self._which, self._which, of_kernel)
        return of_inputs, [of_weight, of_bias]

    def _make_output(self) -> Tensor:
        shape = (self._num, self._num_channels, 2 * self._height, 2 * self._width)
        return self._weight.new_empty(shape)

    def _place(self, made: Tensor, images: slice, rows: slice, output: Tensor) -> None:
        for there, here in self._views(output, made, images, rows):
            there.copy_(here)

    def _find(self, images: slice, rows: slice, gradient: Tensor) -> Tensor:
        num, height = images.stop - images.start, rows.stop - rows.start
        found = gradient.new_zeros(num, len(self._weight), height + 1, self._width + 1)
        for there, here in self._views(gradient, found, images, rows):
            here.copy_(there)
        return found

    def _views(
        self, whole: Tensor, piece: Tensor, images: slice, rows: slice
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Give every second row and column of a piece of the output, and where it is made."""
        quarters = piece.view(len(piece), 2, 2, self._num_channels, *piece.shape[2:])
        height = rows.stop - rows.start
        for lower in range(2):
            for right in range(2):
                there = whole[images, :, 2 * rows.start + lower : 2 * rows.stop : 2, right::2]
                made = quarters[:, lower, right]
                yield there, made[:, :, lower : lower + height, right : right + self._width]


class HalvingConvolution:
    """A 3x3 convolution with stride 2; even H and W have zeros after their ends.

    Args:
        x: [N, C, H, W].
        weight: [C_out, C, 3, 3].
        bias: [C_out].
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor) -> None:
        self._x, self._weight, self._bias = x, weight, bias
        num, channels, height, width = x.shape
        self._shape = (num, len(weight), height // 2, width // 2)
        self._pieces = list(_pieces((num, 4 * channels, height // 2, width // 2)))

    def forward(self) -> Tensor:
        """Give the output, [N, C_out, H / 2, W / 2]."""
        output = self._x.new_empty(self._shape)
        for images, rows in self._pieces:
            taken = self._take(images, rows)
            output[images, :, rows] = F.conv2d(taken, self._weight, self._bias, stride=2)
        return output

    def backward(self, gradient: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Give the gradients of x, and of weight and bias."""
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
        return [of_x], [of_weight, gradient.sum((0, 2, 3))]

    def _take(self, images: slice, rows: slice) -> Tensor:
        """Make what a piece of the output sees, [n, C, 2 * rows + 1, W + 1]."""
        x = self._x[images, :, 2 * rows.start : 2 * rows.stop + 1]
        return F.pad(x, (0, 1, 0, 2 * (rows.stop - rows.start) + 1 - x.shape[2]))


class Shortcut:
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


def group_size(norm: nn.GroupNorm) -> int:
    """Give how many channels a group has."""
    return norm.num_channels // norm.num_groups


def _channels(parts: Sequence[Tensor] | Sequence[Source]) -> list[slice]:
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
