import math
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddpm_lightning.checkpoints import check_same_model, describe
from ddpm_lightning.errors import InputError
from ddpm_lightning.networks import lean, pieces, unet
from ddpm_lightning.networks.unet import (
    Attention,
    Downsample,
    Dropout,
    ResBlock,
    UNet,
    Upsample,
    timestep_embedding,
)

CIFAR10 = (3, 3, 128, (1, 2, 2, 2), 2, (1,), 0.1)
PIXELS_256 = (3, 3, 128, (1, 1, 2, 2, 4, 4), 2, (4,), 0.0)


def count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize(
    ("arguments", "num_parameters"),
    [
        (CIFAR10, 35_746_307),
        ((3, 6, *CIFAR10[2:]), 35_749_766),
        (PIXELS_256, 113_673_219),
        ((3, 3, 192, *PIXELS_256[3:]), 255_677_955),
    ],
)
def test_parameter_counts_are_the_authors(
    arguments: tuple[object, ...], num_parameters: int
) -> None:
    with torch.device("meta"):
        assert count(UNet(*arguments)) == num_parameters  # type: ignore[arg-type]


def test_initialisation_is_the_authors() -> None:
    net = UNet(3, 3, 128, (1,), 1, (0,))
    block, attention = net.down[0].res, net.down[0].attention
    assert isinstance(block, ResBlock)
    assert isinstance(attention, Attention)
    bound = 0.05103103630798288  # conv 3x3, 128 -> 128
    assert bound * 0.999 < block.conv_1.weight.abs().max().item() <= bound
    zero = block.conv_2.weight.abs().max().item()
    assert 5.09e-07 < zero <= 5.103103630798288e-07
    # q, k and v are three layers with fans of C each, not one with 3C
    for weight in attention.qkv.weight.chunk(3):
        bound = math.sqrt(6 / 256)
        assert bound * 0.999 < weight.abs().max().item() <= bound
    assert attention.proj.weight.abs().max().item() <= 1e-5 * bound
    assert net.conv_out.weight.abs().max().item() <= 1e-5
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
    for module in net.modules():
        if isinstance(module, nn.GroupNorm):
            assert (module.eps, module.num_groups) == (1e-6, 32)
            assert bool((module.weight == 1).all())


@pytest.mark.parametrize("group_channels", [1, 4])
def test_groups_of_norms(group_channels: int) -> None:
    net = UNet(1, 1, 32, (1, 2, 4, 8), 1, (1,), group_channels=group_channels)
    norms = [module for module in net.modules() if isinstance(module, nn.GroupNorm)]
    found = {norm.num_channels: norm.num_groups for norm in norms}
    if group_channels == 1:
        assert set(found.values()) == {32}
    else:  # as many as the paper's, from 128 channels on
        assert {channels: found[channels] for channels in (32, 64, 96, 128, 256)} == {
            **{32: 8, 64: 16, 96: 24},
            **{128: 32, 256: 32},
        }


def test_a_channel_that_is_normalised_alone_forgets_the_timestep() -> None:
    x, embeddings = torch.randn(2, 32, 4, 4), torch.randn(2, 1, 128)
    for group_channels, forgets in ((1, True), (4, False)):
        block = ResBlock(32, 32, 128, 0.0, group_channels)
        nn.init.normal_(block.conv_2.weight)  # is almost zero
        first, second = (block(x, embedding.expand(2, -1)) for embedding in embeddings)
        assert torch.allclose(first, second, atol=1e-4) == forgets


def test_embedding_facts() -> None:
    embedding = timestep_embedding(torch.tensor([0, 1]), 128)
    assert torch.equal(embedding[0], torch.cat([torch.zeros(64), torch.ones(64)]))
    picked = embedding[1][[0, 1, 63, 64, 127]].tolist()
    expected = [0.8414709848, 0.7604387421, 9.999999983e-05, 0.5403023058, 0.999999995]
    assert picked == pytest.approx(expected, rel=1e-5)
    assert timestep_embedding(torch.tensor([7]), 33).shape == (1, 33)
    assert timestep_embedding(torch.tensor([7]), 33)[0, -1] == 0


def test_downsampling_pads_right_and_bottom() -> None:
    """With a kernel that copies its top left tap, output (0, 0) is input (0, 0)."""
    net = UNet(1, 1, 32, (1, 1), 1, ())
    down = net.down[1]
    assert isinstance(down, Downsample)
    weight, bias = down.conv.weight, down.conv.bias
    assert bias is not None
    with torch.no_grad():
        weight.zero_()
        weight[:, :, 0, 0] = torch.eye(32)
        bias.zero_()
    x = torch.randn(1, 32, 6, 4)
    assert torch.equal(down(x), x[:, :, ::2, ::2])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_upsampling_repeats_pixels_and_convolves(layout: torch.memory_format) -> None:
    """Values and gradients, borders included, in either layout."""
    up = Upsample(32).double()
    for parameter in up.parameters():
        nn.init.normal_(parameter)
    up.to(memory_format=layout)
    x = torch.randn(2, 32, 3, 5, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    inputs = (x, *up.parameters())
    outputs = up(x), up.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    assert outputs[0].is_contiguous(memory_format=layout)
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(outputs[0])
    gradients = [torch.autograd.grad(output, inputs, weights) for output in outputs]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 8, 8), (2, 8, 12), (5, 4, 16)])
def test_any_channels_and_sides(channels: int, height: int, width: int) -> None:
    net = UNet(channels, channels, 32, (1, 2), 1, (1,))
    x = torch.randn(2, channels, height, width)
    assert net(x, torch.tensor([0, 9])).shape == x.shape


def test_impossible_sizes_name_the_nearest() -> None:
    net = UNet(1, 1, 32, (1, 1, 1), 1, ())
    with pytest.raises(InputError, match="height 28 or 32, width 28$"):
        net(torch.zeros(1, 1, 30, 28), torch.tensor([0]))
    with pytest.raises(InputError, match="height 4, width 8$"):
        net.check_size(3, 8)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_patches_are_pixels_of_more_channels(patch_size: int) -> None:
    area = patch_size**2
    net = UNet(2, 4, 32, (1, 2), 1, (1,), patch_size=patch_size)
    plain = UNet(2 * area, 4 * area, 32, (1, 2), 1, (1,))
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.05)
    plain.load_state_dict(net.state_dict())
    x, t = torch.randn(3, 2, 8, 12), torch.tensor([0, 9, 500])
    small = torch.cat([x[..., i::patch_size, j::patch_size] for i, j in squares(patch_size)], dim=1)
    order = [channel * area + place for place in range(area) for channel in range(2)]
    with torch.no_grad():
        # a pixel's values are ordered by channel first
        plain.conv_in.weight.copy_(plain.conv_in.weight[:, order])
        output, pieces = net(x, t), plain(small, t)
    assert output.shape == (3, 4, 8, 12)
    for place, (i, j) in enumerate(squares(patch_size)):
        piece = output[..., i::patch_size, j::patch_size]
        torch.testing.assert_close(piece, pieces[:, place::area], rtol=0, atol=1e-5)


def squares(size: int) -> list[tuple[int, int]]:
    """Give the places in a patch, row by row."""
    return [(i, j) for i in range(size) for j in range(size)]


def test_patches_need_sizes_that_they_divide() -> None:
    net = UNet(1, 1, 32, (1, 2), 1, (), patch_size=2)
    net.check_size(28, 28)
    with pytest.raises(InputError, match="2 levels of patches of 2 pixels .* by 4, got 30x28"):
        net.check_size(30, 28)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
        ({"base_channels": 48}, "multiple of 32, got 48"),
        ({"channel_mults": ()}, "channel_mults"),
        ({"num_res_blocks": 0}, "num_res_blocks"),
        ({"attention_levels": (2,)}, r"0\.\.1"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        UNet(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.75, 1 - 2**-17])
def test_dropout_is_torchs_but_for_the_draws(p: float, dtype: torch.dtype) -> None:
    ours, theirs = Dropout(p), nn.Dropout(p)
    x = torch.rand(4, 64, 32, 32, dtype=dtype).add_(0.5).requires_grad_()
    outputs = []
    for layer in (ours, theirs):
        torch.manual_seed(1)
        outputs.append(layer(x))
    kept = outputs[0] != 0
    # what is kept is scaled as torch's is, and so is the gradient
    both = kept & (outputs[1] != 0)
    torch.testing.assert_close(outputs[0][both], outputs[1][both])
    (gradient,) = torch.autograd.grad(outputs[0].float().sum(), x)
    torch.testing.assert_close(gradient * x, outputs[0])
    # every place is dropped as often as any other: within 5 standard deviations
    for parts in (kept.flatten()[None], kept.movedim(1, 0).flatten(1)):
        shares = 1 - parts.double().mean(dim=1)
        assert ((shares - p).abs() <= 5 * math.sqrt(p * (1 - p) / parts.shape[1])).all()
    torch.manual_seed(1)
    assert torch.equal(ours(x), outputs[0])  # keyed by the seed,
    assert p == 0 or not torch.equal(ours(x), outputs[0])  # and drawn anew each time
    assert ours.eval()(x) is x


def test_dropout_in_bfloat16_scales_by_more_digits_than_that_has() -> None:
    """1 / 0.9 is 1.109375 in bfloat16, and all expectations would be 0.16 % less."""
    torch.manual_seed(0)
    x = torch.rand(100_000).add_(1).bfloat16()
    outputs = Dropout(0.1)(x)
    assert outputs.dtype == torch.bfloat16
    kept = outputs != 0
    assert torch.equal(outputs[kept], (x[kept].float() / 0.9).bfloat16())


def test_dropout_keeps_to_a_probability_below_its_smallest_step() -> None:
    torch.manual_seed(0)
    p, x, calls = 2**-18, torch.ones(250_001), 400
    dropped = [(Dropout(p)(x) == 0).sum().item() for _ in range(calls)]
    # its bound is 1 in a quarter of the calls, which drop 2**-16 of their values: 3.8 each
    assert 0.7 * p < sum(dropped) / (calls * len(x)) < 1.3 * p
    assert 60 < sum(count > 0 for count in dropped) < 140


def test_dropout_keeps_the_layout() -> None:
    x = torch.rand(2, 8, 4, 4).to(memory_format=torch.channels_last)
    assert Dropout(0.5)(x).is_contiguous(memory_format=torch.channels_last)


def test_dropout_compiles_whole() -> None:
    net = UNet(1, 1, 32, (1,), 1, (), dropout=0.5)
    compiled = torch.compile(net, backend="eager", fullgraph=True)  # refuses what breaks the graph
    assert compiled(torch.rand(1, 1, 4, 4), torch.tensor([3])).isfinite().all()


def test_dropout_acts_in_training_only() -> None:
    net = UNet(1, 1, 32, (1,), 1, (), dropout=0.5)
    nn.init.normal_(net.conv_out.weight)
    for module in net.modules():
        if isinstance(module, ResBlock):
            nn.init.normal_(module.conv_2.weight)
    x, t = torch.randn(1, 1, 4, 4), torch.tensor([3])
    assert not torch.equal(net(x, t), net(x, t))
    net.eval()
    assert torch.equal(net(x, t), net(x, t))


@pytest.mark.parametrize(
    ("dropout", "group_channels", "piece_values"),
    [
        (0.3, 4, 2**20),  # dropout's masks are drawn again from the same random state
        (0.0, 4, 2**20),  # a layer's input is one piece
        (0.0, 4, 2500),  # images are pieces
        (0.0, 4, 1),  # rows are pieces
        (0.0, 1, 700),  # groups with channels of both of a block's inputs
    ],
)
def test_checkpointing_changes_memory_and_no_gradient(
    monkeypatch: pytest.MonkeyPatch, dropout: float, group_channels: int, piece_values: int
) -> None:
    """Both values, by either way of saving memory."""
    monkeypatch.setattr(pieces, "_PIECE_VALUES", piece_values)
    applied = mock.Mock(wraps=lean._apply)
    monkeypatch.setattr(lean, "_apply", applied)
    returned = mock.Mock()
    monkeypatch.setattr(unet, "return_freed_memory", returned)
    monkeypatch.setattr(lean, "return_freed_memory", returned)
    arguments = (1, 1, 32, (1, 2, 1), 1, (1,), dropout, 0, group_channels)
    nets = [UNet(*arguments, checkpointing=value).double() for value in (False, True)]
    torch.manual_seed(0)
    for parameter in nets[0].parameters():
        nn.init.normal_(parameter, std=0.05)
    nets[1].load_state_dict(nets[0].state_dict())
    x, t = torch.randn(2, 1, 8, 12, dtype=torch.float64), torch.tensor([3, 900])

    kept = []
    for net in nets:
        parameters = {parameter.data_ptr() for parameter in net.parameters()}
        sizes: dict[int, int] = {}  # of tensors that are there for the gradient alone

        def keep(
            tensor: torch.Tensor,
            sizes: dict[int, int] = sizes,
            parameters: set[int] = parameters,
        ) -> torch.Tensor:
            if tensor.data_ptr() not in parameters:
                sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = net(x, t).square().mean()
        kept.append(sum(sizes.values()))
        torch.rand(5)  # what is drawn between must not matter
        loss.backward()
    assert kept[1] < 0.5 * kept[0]
    assert applied.called == (dropout == 0)
    assert returned.call_count == (2 if dropout == 0 else 0)  # before forward and backward
    for plain, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert plain.grad is not None and other.grad is not None
        torch.testing.assert_close(other.grad, plain.grad, rtol=0, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(nets[0].eval()(x, t), nets[1].eval()(x, t))


def test_deep_levels_compute_no_convolution_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = mock.Mock(side_effect=pieces.Convolution.forward, autospec=True)
    monkeypatch.setattr(pieces.Convolution, "forward", lambda convolution: forward(convolution))
    net = UNet(1, 1, 32, (1, 2, 1), 1, (), checkpointing=True)
    output = net(torch.randn(1, 1, 8, 12), torch.tensor([3]))
    num_blocks, num_deep, num_others = 11, 5, 3  # deep: with an eighth of the first level's values
    assert forward.call_count == 2 * num_blocks + num_others
    output.square().mean().backward()
    assert forward.call_count == 2 * num_blocks + num_others + num_blocks - num_deep


@pytest.mark.parametrize("way", ["autocast", "compiled"])
def test_checkpointing_where_layers_cannot_work_in_pieces(
    monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Below float32, and where a compiler is to see what is done."""
    monkeypatch.setattr(lean, "_apply", None)  # nobody calls it
    nets = [UNet(1, 1, 32, (1, 2), 1, (), checkpointing=value) for value in (False, True)]
    for parameter in nets[0].parameters():
        nn.init.normal_(parameter, std=0.05)
    nets[1].load_state_dict(nets[0].state_dict())
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 900])
    for net in nets:
        run: Callable[..., torch.Tensor] = net
        if way == "compiled":
            run = torch.compile(net, backend="eager")
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            run(x, t).float().square().mean().backward()  # type: ignore[no-untyped-call]
    for plain, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(other.grad, plain.grad)


def test_a_run_may_go_on_with_checkpointing_and_not_with_another_network() -> None:
    plain, saving, other = (
        {"net": describe(net)} for net in (UNet(), UNet(checkpointing=True), UNet(dropout=0.1))
    )
    check_same_model({"hyper_parameters": plain}, saving, "last.ckpt")
    with pytest.raises(InputError, match=r"net\.init_args\.dropout = 0\.0"):
        check_same_model({"hyper_parameters": plain}, other, "last.ckpt")
