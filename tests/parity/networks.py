"""The same networks as other libraries build them, for tests and benchmarks."""

from diffusers import UNet2DModel

from ddpm_lightning.networks.unet import UNet


def diffusers_unet(ours: UNet) -> UNet2DModel:
    """Build diffusers' network for the same arguments, set to the authors' conventions."""
    num_levels = len(ours.channel_mults)
    attention = [level in ours.attention_levels for level in range(num_levels)]
    return UNet2DModel(
        in_channels=ours.in_channels,
        out_channels=ours.out_channels,
        block_out_channels=[ours.base_channels * mult for mult in ours.channel_mults],
        layers_per_block=ours.num_res_blocks,
        down_block_types=["AttnDownBlock2D" if has else "DownBlock2D" for has in attention],
        up_block_types=["AttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)],
        dropout=ours.dropout,
        freq_shift=1,
        flip_sin_to_cos=False,
        downsample_padding=0,
        norm_eps=1e-6,
        attention_head_dim=None,
    )
