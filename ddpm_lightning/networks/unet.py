"""The U-Net of Ho et al. 2020 (appendix B), all of it in this file; lean.py saves memory."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddpm_lightning.allocator import return_freed_memory
from ddpm_lightning.errors import InputError
from ddpm_lightning.networks.lean import lean_block, lean_downsample, lean_output, lean_upsample

NUM_GROUPS = 32
GROUP_NORM_EPS = 1e-6  # the authors' tf.contrib default; torch's is 1e-5
ZERO_GAIN = 1e-5  # "zero" initialisation: variance scale 1e-10, the gain is its root
MAX_PERIOD = 10_000.0  # longest wavelength of the sinusoids (Vaswani et al. 2017)


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Embed timesteps as sinusoids (Vaswani et al. 2017): all sines, then all cosines.

    Args:
        t: Timesteps, int64 [N], as they are (not rescaled).
        dim: Width, at least 4; an odd one is padded with a zero.

    Returns:
        float32 [N, dim]. Frequencies run from 1 down to 1 / MAX_PERIOD, both included.
    """
    half = dim // 2
    levels = torch.arange(half, dtype=torch.float32, device=t.device)
    # This order of operations rounds as diffusers does, so that outputs agree to 1e-10.
    angles = t.float()[:, None] * (-math.log(MAX_PERIOD) * levels / (half - 1)).exp()
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return F.pad(embedding, (0, dim % 2))


def _init(layer: nn.Conv2d | nn.Linear, gain: float = 1.0) -> None:
    """Variance scaling over the average fan, uniform, which is Glorot's; biases zero."""
    nn.init.xavier_uniform_(layer.weight, gain)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)


def _conv(in_channels: int, out_channels: int, kernel_size: int, gain: float = 1.0) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
    _init(conv, gain)
    return conv


def _linear(in_features: int, out_features: int) -> nn.Linear:
    linear = nn.Linear(in_features, out_features)
    _init(linear)
    return linear


def _norm(channels: int, group_channels: int) -> nn.GroupNorm:
    num_groups = min(NUM_GROUPS, channels // group_channels)
    return nn.GroupNorm(num_groups, channels, eps=GROUP_NORM_EPS)


class Dropout(nn.Dropout):
    """Dropout; on a CPU the mask is drawn in a third of the time that torch's takes."""

    def forward(self, input: Tensor) -> Tensor:
        """Drop values of a tensor of any shape."""
        is_torchs = input.device.type != "cpu" or torch.compiler.is_compiling()
        has_bound = 0 < self.p < 1 - 2**-16  # in 16 bits
        if not self.training or not has_bound or is_torchs:
            return super().forward(input)
        # 16 random bits a value, against a bound that is rounded up or down by chance, by which
        # each value is dropped with the very probability that was asked for
        words = torch.empty(-(-input.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        # 1 / (1 - p) in bfloat16 would shift all expectations by up to 0.2 %
        mask = torch.empty_like(input, dtype=torch.promote_types(input.dtype, torch.float32))
        bits = words.view(torch.int16).as_strided(mask.shape, mask.stride())
        bound = math.floor(self.p * 2**16 + torch.rand(()).item()) - 2**15
        mask.copy_(bits >= bound)
        return (input * mask.mul_(1 / (1 - self.p))).to(input.dtype)


class ResBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut; the timestep is added per channel between them."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embed_channels: int,
        dropout: float,
        group_channels: int,
        keeps_between: bool = False,
    ) -> None:
        super().__init__()
        self._keeps_between = keeps_between
        self.norm_1 = _norm(in_channels, group_channels)
        self.conv_1 = _conv(in_channels, out_channels, 3)
        self.embed = _linear(embed_channels, out_channels)
        self.norm_2 = _norm(out_channels, group_channels)
        self.dropout = Dropout(dropout)
        self.conv_2 = _conv(out_channels, out_channels, 3, ZERO_GAIN)
        self.shortcut = (
            nn.Identity() if in_channels == out_channels else _conv(in_channels, out_channels, 1)
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map x [N, C_in, H, W] and the activated embedding [N, E] to [N, C_out, H, W]."""
        shortcut: Tensor = self.shortcut(x)  # first: after conv_2 nothing is kept for the gradient
        h: Tensor = self.conv_1(F.silu(self.norm_1(x)))
        h += self.embed(embedding)[:, :, None, None]
        h = self.conv_2(self.dropout(F.silu(self.norm_2(h))))
        h += shortcut
        return h

    def lean(self, inputs: Sequence[Tensor], embedding: Tensor) -> Tensor:
        """Map the parts of x as `forward` does without dropout."""
        shortcut = self.shortcut if isinstance(self.shortcut, nn.Conv2d) else None
        shift: Tensor = self.embed(embedding)
        layers = (self.norm_1, self.conv_1, self.norm_2, self.conv_2, shortcut)
        return lean_block(inputs, shift, *layers, self._keeps_between)


class Attention(nn.Module):
    """Self-attention over pixels with a single head, added to its input."""

    def __init__(self, channels: int, group_channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels, group_channels)
        self.qkv = _conv(channels, 3 * channels, 1)
        for weight in self.qkv.weight.detach().chunk(3):  # three layers, each with its own fans
            nn.init.xavier_uniform_(weight)
        self.proj = _conv(channels, channels, 1, ZERO_GAIN)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [N, C, H, W] to the same shape."""
        # [N, 3C, H, W] -> three of [N, 1 head, HW, C]; the scale is 1 / sqrt(C)
        pixels = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)
        # torch's fast kernels, which never keep HW x HW values, want a pixel's channels together
        q, k, v = pixels.contiguous().unsqueeze(1).chunk(3, dim=-1)
        h = F.scaled_dot_product_attention(q, k, v)
        output: Tensor = self.proj(h.squeeze(1).transpose(1, 2).reshape(x.shape))
        output += x
        return output


class Block(nn.Module):
    """A residual block, followed by attention on the levels that have it."""

    def __init__(self, res: ResBlock, attention: Attention | None) -> None:
        super().__init__()
        self.res = res
        self.attention = attention

    def forward(self, embedding: Tensor, *inputs: Tensor) -> Tensor:
        """Map the activated embedding [N, E] and parts of x [N, C_in, H, W] to [N, C_out, H, W].

        A copy of two parts as one is within the block, where checkpointing can forget it.
        """
        x: Tensor = self.res(inputs[0] if len(inputs) == 1 else torch.cat(inputs, dim=1), embedding)
        return x if self.attention is None else self.attention(x)

    def lean(self, embedding: Tensor, *inputs: Tensor) -> Tensor:
        """Do so without dropout."""
        x = self.res.lean(inputs, embedding)
        return x if self.attention is None else _checkpointed(self.attention, x)


class Downsample(nn.Module):
    """Halve height and width by a 3x3 convolution with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)
        _init(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to [N, C, H/2, W/2]."""
        # TensorFlow's SAME pads an even input on the right and at the bottom only.
        output: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return output

    def lean(self, x: Tensor) -> Tensor:
        """Do so, piece by piece."""
        return lean_downsample(x, self.conv)


class Upsample(nn.Module):
    """Double height and width by repetition, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to [N, C, 2H, 2W]."""
        # Repetition is a transposed convolution with 2x2 ones, and two convolutions in a row are
        # one, whose kernel is theirs convolved: 4 products for each output instead of 9.
        weight = self.conv.weight
        is_last = weight.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if is_last else torch.contiguous_format
        # in the layout that the convolution wants: it would copy all 16 values instead of these 9
        kernel = weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=layout)
        kernel = F.avg_pool2d(kernel, 2, stride=1, padding=1, divisor_override=1)  # sums
        return F.conv_transpose2d(x, kernel, self.conv.bias, stride=2, padding=1)

    def lean(self, x: Tensor) -> Tensor:
        """Do so, piece by piece, by another convolution of four products."""
        return lean_upsample(x, self.conv)


class UNet(nn.Module):
    """epsilon_theta: predicts the noise in x_t (Ho et al. 2020, appendix B).

    The defaults are the network of the digits experiment. CIFAR-10's is `UNet(3, 3, 128,
    (1, 2, 2, 2), 2, (1,), 0.1)`, with 35,746,307 parameters.

    Args:
        in_channels: Channels of x_t.
        out_channels: Channels of the output.
        base_channels: Channels of the first level; a multiple of 32, for the group norms.
        channel_mults: Width of each level as a multiple of `base_channels`; every level but the
            last halves the resolution.
        num_res_blocks: Residual blocks per level on the way down; one more on the way up.
        attention_levels: Levels (from 0) with attention after each block. The middle always has it.
        dropout: Probability of dropping a value before each block's second convolution.
        num_classes: Classes that the network is told; 0 for none. One label more, `num_classes`
            itself, stands for no label.
        group_channels: Channels in a group of the norms, at least, where 32 groups would have
            fewer; divides 32. The paper's networks have 4 and more. With 1, timestep and class are
            lost where there are 32 channels: normalised alone, a channel forgets what was added.
        patch_size: Each square of so many pixels a side is a pixel to the network, with all their
            values as its channels ("space to depth"); 1 for the paper's network. With 2, a pass of
            the same width takes a quarter of the time.
        checkpointing: In training, keep each layer's input alone, and compute the rest again for
            the gradient (Chen et al. 2016): less memory, more time, the same numbers up to
            rounding. Without dropout and in full precision most layers also work in pieces, and
            what lies between the convolutions of a deep level's blocks, which is little, is kept.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        base_channels: int = 32,
        channel_mults: Sequence[int] = (1, 2),
        num_res_blocks: int = 1,
        attention_levels: Sequence[int] = (1,),
        dropout: float = 0.0,
        num_classes: int = 0,
        group_channels: int = 4,
        patch_size: int = 1,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        _check(
            in_channels,
            out_channels,
            base_channels,
            channel_mults,
            num_res_blocks,
            attention_levels,
            dropout,
            num_classes,
            group_channels,
            patch_size,
        )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.base_channels = base_channels
        self.channel_mults = list(channel_mults)
        self.num_res_blocks = num_res_blocks
        self.attention_levels = list(attention_levels)
        self.dropout = dropout
        self.num_classes = num_classes
        self.group_channels = group_channels
        self.patch_size = patch_size
        self.checkpointing = checkpointing

        embed_channels = 4 * base_channels
        self.embed_1 = _linear(base_channels, embed_channels)
        self.embed_2 = _linear(embed_channels, embed_channels)
        if num_classes:
            # standard normal, as Nichol & Dhariwal's code has it; the last row is "no label"
            self.embed_label = nn.Embedding(num_classes + 1, embed_channels)

        def block(in_channels: int, out_channels: int, level: int, attention: bool) -> Block:
            # on levels whose tensors have an eighth of the first's values and less
            keeps_between = 8 * out_channels <= base_channels * channel_mults[0] * 4**level
            res = ResBlock(
                in_channels, out_channels, embed_channels, dropout, group_channels, keeps_between
            )
            return Block(res, Attention(out_channels, group_channels) if attention else None)

        self.conv_in = _conv(in_channels * patch_size**2, base_channels, 3)
        self.down = nn.ModuleList()
        channels = base_channels
        skips = [channels]
        for level, mult in enumerate(channel_mults):
            attention = level in attention_levels
            for _ in range(num_res_blocks):
                self.down.append(block(channels, base_channels * mult, level, attention))
                channels = base_channels * mult
                skips.append(channels)
            if level < len(channel_mults) - 1:
                self.down.append(Downsample(channels))
                skips.append(channels)

        self.mid_1 = block(channels, channels, level, attention=True)
        self.mid_2 = block(channels, channels, level, attention=False)

        self.up = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mults))):
            attention = level in attention_levels
            for _ in range(num_res_blocks + 1):
                skip = skips.pop()
                self.up.append(block(channels + skip, base_channels * mult, level, attention))
                channels = base_channels * mult
            if level > 0:
                self.up.append(Upsample(channels))

        self.norm_out = _norm(channels, group_channels)
        self.conv_out = _conv(channels, out_channels * patch_size**2, 3, ZERO_GAIN)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predict the noise.

        Args:
            x: x_t, float [N, in_channels, H, W]; `check_size` says which H and W work.
            t: Timesteps, int64 [N].
            labels: Classes, int64 [N] in [0, num_classes], where `num_classes` is no label; none
                for a network without classes.

        Returns:
            float [N, out_channels, H, W].

        Raises:
            InputError: The levels do not divide the size.
            ValueError: There are labels and no classes, or the reverse.
        """
        self.check_size(x.shape[2], x.shape[3])
        if (labels is None) != (self.num_classes == 0):
            raise ValueError(f"num_classes is {self.num_classes}, but labels are {labels}")
        if self._is_lean(x) and x.device.type == "cpu":
            return_freed_memory()  # a step's gradients, and more, are freed at its end
        embedding = timestep_embedding(t, self.base_channels).to(self.embed_1.weight.dtype)
        embedding = self.embed_2(F.silu(self.embed_1(embedding)))
        if labels is not None:
            embedding = embedding + self.embed_label(labels)
        embedding = F.silu(embedding)  # every block starts so

        h = self.conv_in(F.pixel_unshuffle(x, self.patch_size))
        skips = [h]
        for layer in self.down:
            h = self._run(layer, embedding, h) if isinstance(layer, Block) else self._run(layer, h)
            skips.append(h)
        h = self._run(self.mid_1, embedding, h)
        h = self._run(self.mid_2, embedding, h)
        for layer in self.up:
            is_block = isinstance(layer, Block)
            h = self._run(layer, embedding, h, skips.pop()) if is_block else self._run(layer, h)
        if self._is_lean(h):
            h = lean_output(h, self.norm_out, self.conv_out)
        else:
            h = self._run(self._output, h)
        return F.pixel_shuffle(h, self.patch_size)

    def _output(self, h: Tensor) -> Tensor:
        output: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return output

    def _run(self, layer: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Run a layer, keeping only its inputs for the gradient where that is asked for."""
        if isinstance(layer, Block | Downsample | Upsample) and self._is_lean(inputs[-1]):
            return layer.lean(*inputs)
        return _checkpointed(layer, *inputs) if self._forgets() else layer(*inputs)

    def _forgets(self) -> bool:
        return self.checkpointing and self.training and torch.is_grad_enabled()

    def _is_lean(self, h: Tensor) -> bool:
        if not self._forgets() or self.dropout or torch.compiler.is_compiling():
            return False  # a compiler wants to see the operations
        # half precision would need wider sums
        kind = h.device.type
        is_cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        return h.dtype in (torch.float32, torch.float64) and not is_cast

    def check_size(self, height: int, width: int) -> None:
        """Refuse a size that cannot be halved once per level, naming the nearest that can.

        Args:
            height: Of the images, in pixels.
            width: Of the images, in pixels.

        Raises:
            InputError: With the nearest sizes that work.
        """
        factor = self.patch_size * 2 ** (len(self.channel_mults) - 1)
        if height % factor == 0 and width % factor == 0:
            return

        def nearest(size: int) -> str:
            below, above = size // factor * factor, -(-size // factor) * factor
            return " or ".join(str(near) for near in sorted({below, above} - {0}))

        patches = "" if self.patch_size == 1 else f" of patches of {self.patch_size} pixels"
        raise InputError(
            f"{len(self.channel_mults)} levels{patches} need height and width divisible "
            f"by {factor}, got {height}x{width}; the nearest that work: height {nearest(height)}, "
            f"width {nearest(width)}"
        )


def _checkpointed(layer: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    # Recomputing stops at the last thing that is kept, which is before a convolution, so that no
    # layer's last one is done again. Dropout's random state is restored.
    output: Tensor = checkpoint(layer, *inputs, use_reentrant=False)
    return output


def _check(
    in_channels: int,
    out_channels: int,
    base_channels: int,
    channel_mults: Sequence[int],
    num_res_blocks: int,
    attention_levels: Sequence[int],
    dropout: float,
    num_classes: int,
    group_channels: int,
    patch_size: int,
) -> None:
    if min(in_channels, out_channels) < 1:
        raise InputError(
            f"in_channels and out_channels must be at least 1, got {in_channels} and {out_channels}"
        )
    if base_channels < 1 or base_channels % NUM_GROUPS:
        raise InputError(f"base_channels must be a multiple of {NUM_GROUPS}, got {base_channels}")
    if not channel_mults or min(channel_mults) < 1:
        raise InputError(f"channel_mults must be one or more numbers >= 1, got {channel_mults}")
    if num_res_blocks < 1:
        raise InputError(f"num_res_blocks must be at least 1, got {num_res_blocks}")
    if not set(attention_levels) <= set(range(len(channel_mults))):
        raise InputError(
            f"attention_levels must lie in 0..{len(channel_mults) - 1}, got {attention_levels}"
        )
    if not 0 <= dropout < 1:
        raise InputError(f"dropout must lie in [0, 1), got {dropout}")
    if num_classes < 0:
        raise InputError(f"num_classes must be at least 0, got {num_classes}")
    if group_channels < 1 or NUM_GROUPS % group_channels:
        raise InputError(f"group_channels must divide {NUM_GROUPS}, got {group_channels}")
    if patch_size < 1:
        raise InputError(f"patch_size must be at least 1, got {patch_size}")
