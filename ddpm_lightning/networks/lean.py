"""The U-Net's layers with little memory: of most, nothing is kept for the gradient but inputs.

`torch.utils.checkpoint` forgets what lies within a layer, too, but has all of it at once when it
computes it again: at 256x256 pixels that is most of the memory of a step. Here what a convolution
takes is made piece by piece, on the way forward and back; of whole tensors there are the inputs,
what lies between a block's convolutions, and their gradients, one of which takes another's place
where that is no longer needed. Two inputs of a block are not joined unless a group of its norm has
channels of both.

Numbers are those of the layers, up to rounding. The gradients cannot be differentiated again.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ddpm_lightning.allocator import return_freed_memory
from ddpm_lightning.networks.pieces import (
    Convolution,
    DoublingConvolution,
    HalvingConvolution,
    Shortcut,
    Tensors,
    group_size,
    normed_convolution,
)


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
    return _apply(
        lambda tensors: _Output(normed_convolution(tensors[:1], norm, tensors[1:])),
        *(x, *_parameters(norm, conv)),
    )


def lean_upsample(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Map x [N, C, H, W] to a 3x3 convolution of its doubled pixels, [N, C_out, 2H, 2W]."""
    return _apply(lambda tensors: _Single(DoublingConvolution(*tensors)), x, *_parameters(conv))


def lean_downsample(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Map x [N, C, H, W] to a 3x3 convolution with stride 2, [N, C_out, H/2, W/2].

    Even H and W have a row and a column of zeros at their ends.
    """
    return _apply(lambda tensors: _Single(HalvingConvolution(*tensors)), x, *_parameters(conv))


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
        saved = ctx.saved_tensors  # once: each look unpacks them all
        tensors, kept = saved[: ctx.num_tensors], saved[ctx.num_tensors :]
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
        self._is_joined = any(size % group_size(norm_1) for size in self._sizes)
        if self._is_joined:
            inputs = [torch.cat(list(inputs), dim=1)]
        self._first = normed_convolution(inputs, norm_1, parameters[:4])
        self._second = parameters[4:8]
        self._shortcut = Shortcut(inputs, parameters[8:])

    def forward(self) -> tuple[Tensor, Tensors]:
        between = self._make_between()
        output = self._shortcut.add_to(self._make_second(between).forward())
        return output, [between] if self._keeps_between else []

    def backward(self, gradient: Tensor, kept: Tensors) -> Sequence[Tensor]:
        between = kept[0] if kept else self._make_between()
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

    def _make_second(self, between: Tensor) -> Convolution:
        return normed_convolution([between], self._norm_2, self._second)


class _Single:
    """A convolution alone; its tensors are the input and the parameters."""

    def __init__(self, layer: Convolution | HalvingConvolution) -> None:
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
