"""Networks of weather and of medical volumes at their own code bases: CorrDiff of PhysicsNeMo, and MAISI of MONAI."""

from __future__ import annotations

from typing import Any

import torch

from tests.families.base import Call, Decoder, family, import_network, randn, randomise

SCIENCE = "science"
# What PhysicsNeMo imports for other models, for training and for data
_UNUSED = (
    "torchvision", "timm", "s3fs", "zarr", "tensordict", "treelib", "h5py", "cftime", "omegaconf", "hydra", "nvtx",
    "git", "fsspec", "pandas", "xarray", "netCDF4", "dask", "termcolor",
)  # fmt: skip


def _physicsnemo(name: str, h: int, w: int, **more: Any) -> Any:
    config = {
        "img_resolution": [h, w], "in_channels": 5, "out_channels": 3, "model_channels": 8, "channel_mult": [1, 2],
        "num_blocks": 1, "attn_resolutions": [w // 2], **more,
    }  # fmt: skip
    nets = import_network("physicsnemo.models.diffusion_unets", _UNUSED)
    return randomise(getattr(nets, name)(**config))


def _call(module: Any, channels: int, h: int, w: int) -> Call:
    return Call(module, {"x": randn(1, channels, h, w), "noise_labels": torch.tensor([0.3]), "class_labels": None})


@family(SCIENCE, needs="physicsnemo")
def corrdiff(h: int, w: int) -> Call:
    """CorrDiff's network: positions of a grid beside the image's channels."""
    module = _physicsnemo("SongUNetPosEmbd", h, w, in_channels=9, N_grid_channels=4, gridtype="sinusoidal")
    return _call(module, 5, h, w)


@family(SCIENCE, needs="physicsnemo")
def corrdiff_learnable(h: int, w: int) -> Call:
    module = _physicsnemo("SongUNetPosEmbd", h, w, in_channels=9, N_grid_channels=4, gridtype="learnable",
                          additive_pos_embed=True)  # fmt: skip
    return _call(module, 5, h, w)


@family(SCIENCE, needs="physicsnemo")
def song_ncsnpp(h: int, w: int) -> Call:
    """Residual encoder, skip decoder, filters of four taps, and noise by Fourier features."""
    module = _physicsnemo("SongUNet", h, w, embedding_type="fourier", encoder_type="residual", decoder_type="standard",
                          resample_filter=[1, 3, 3, 1], channel_mult_noise=2)  # fmt: skip
    return _call(module, 5, h, w)


@family(SCIENCE, needs="physicsnemo")
def dhariwal(h: int, w: int) -> Call:
    return _call(
        _physicsnemo("DhariwalUNet", h, w, img_resolution=h, attn_resolutions=[h // 2], model_channels=32), 5, h, w
    )


_WRAPPED = {"img_in_channels": 8, "img_out_channels": 3, "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1}


@family(SCIENCE, needs="physicsnemo")
def corrdiff_regression(h: int, w: int) -> Call:
    """The first stage of CorrDiff: one call without a noise level, of a low resolution that was enlarged."""
    nets = import_network("physicsnemo.models.diffusion_unets", _UNUSED)
    module = nets.CorrDiffRegressionUNet(
        img_resolution=(h, w), attn_resolutions=[w // 2], N_grid_channels=4, **_WRAPPED
    )
    return Call(randomise(module), {"x": randn(1, 3, h, w), "img_lr": randn(1, 4, h, w, seed=1)})


@family(SCIENCE, needs="physicsnemo")
def corrdiff_denoiser(h: int, w: int) -> Call:
    """The second stage with the scales of its preconditioning."""
    made = import_network("physicsnemo.diffusion.preconditioners.legacy", _UNUSED)
    module = made.EDMPrecondSuperResolution(
        img_resolution=(h, w), attn_resolutions=[w // 2], N_grid_channels=4, gridtype="sinusoidal", **_WRAPPED
    )
    kwargs = {"x": randn(1, 3, h, w), "img_lr": randn(1, 4, h, w, seed=1), "sigma": torch.tensor([1.7])}
    return Call(randomise(module), kwargs)


def _maisi(**more: Any) -> Any:
    return {"spatial_dims": 3, "num_res_blocks": (1, 1), "num_channels": (8, 16), "norm_num_groups": 4, **more}


@family(SCIENCE, needs="monai", sizes=((12, 8), (16, 8)))
def maisi(h: int, w: int) -> Call:
    """The UNet of volumes of bodies, with regions and spacing."""
    nets = import_network("monai.apps.generation.maisi.networks.diffusion_model_unet_maisi")
    module = nets.DiffusionModelUNetMaisi(**_maisi(
        in_channels=2, out_channels=2, attention_levels=(False, True), num_head_channels=4,
        include_top_region_index_input=True, include_bottom_region_index_input=True, include_spacing_input=True,
    ))  # fmt: skip
    one = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    return Call(randomise(module), {
        "x": randn(1, 2, h, w, 8), "timesteps": torch.tensor([3]), "top_region_index_tensor": one,
        "bottom_region_index_tensor": one, "spacing_tensor": torch.tensor([[1.0, 1.5, 2.0]]),
    }, {"x": 2})  # fmt: skip


def _maisi_decoder(splits: int) -> Any:
    nets = import_network("monai.apps.generation.maisi.networks.autoencoderkl_maisi")
    module = nets.AutoencoderKlMaisi(**_maisi(
        in_channels=1, out_channels=1, latent_channels=4, attention_levels=(False, False), num_splits=splits,
        norm_float16=False, save_mem=False,
    ))  # fmt: skip
    return Decoder(randomise(module))


@family(SCIENCE, needs="monai", sizes=((12, 8), (16, 8)))
def maisi_decoder(h: int, w: int) -> Call:
    return Call(_maisi_decoder(1), {"z": randn(1, 4, h, w, 8)}, {"z": 2})


@family(SCIENCE, needs="monai", sizes=((12, 8), (16, 8)))
def maisi_decoder_in_pieces(h: int, w: int) -> Call:
    """Convolutions of a volume in pieces along its first dim, to save memory; the ranks divide another dim."""
    return Call(_maisi_decoder(2), {"z": randn(1, 4, 8, h, w)}, {"z": 3})
