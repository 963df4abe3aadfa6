"""The section of one U-Net of the DALL-E 2 decoder, `task.base.*`, `task.upsampler.*`; no task of its own."""

from __future__ import annotations

import pydantic

from diptych.config import Config, ConfigError, Flags, Integers


class UnetConfig(Config):
    """One of dalle2-pytorch's U-Nets. Stages are its resolutions, one per entry of `dim_mults`."""

    dim: int = pydantic.Field(64, ge=8)
    """Channels of the first stage."""
    dim_mults: Integers = (1, 2, 4)
    """Channels of each stage, in multiples of `dim`; each stage but the last halves the resolution."""
    num_resnet_blocks: Integers = (2,)
    """Residual blocks of each stage; one number for all."""
    resnet_groups: Integers = (8,)
    """Groups of the normalisation in each stage; one number for all."""
    resnet_weight_standardization: bool = False
    """Standardise the weights of convolutions (arXiv:1903.10520)."""
    cond_dim: int | None = pydantic.Field(None, ge=2)
    """Channels of a condition token; empty = `dim`. Must differ from the embedding's dimension, see the task's page."""
    num_image_tokens: int = pydantic.Field(4, ge=1)
    """Condition tokens that the image embedding is spread over."""
    num_time_tokens: int = pydantic.Field(2, ge=1)
    """Condition tokens that the timestep is spread over."""
    add_image_embeds_to_time: bool = True
    """Add the image embedding to the timestep's, too, as in the paper."""
    cond_on_text_encodings: bool = False
    """Attend to the caption's token states, see `task.text_tower`."""
    max_text_len: int = pydantic.Field(256, ge=1)
    """Token states attended to; shorter captions are filled with learned null states."""
    self_cond: bool = False
    """Feed back the last prediction (arXiv:2208.04202)."""
    self_attn: Flags = (False,)
    """Self-attention in each stage; one value for all. The middle always attends."""
    sparse_attn: bool = False
    """Linear attention in stages without self-attention."""
    attn_heads: int = pydantic.Field(16, ge=1)
    """Heads of self-attention."""
    attn_dim_head: int = pydantic.Field(32, ge=4)
    """Channels of a head of self-attention."""
    cosine_sim_cross_attn: bool = False
    """Cosine similarity in cross-attention."""
    cosine_sim_self_attn: bool = False
    """Cosine similarity in self-attention."""
    init_dim: int | None = pydantic.Field(None, ge=8)
    """Channels of the first convolution; empty = `dim`."""
    init_cross_embed: bool = True
    """First convolution at several kernel sizes at once."""
    init_cross_embed_kernel_sizes: Integers = (3, 7, 15)
    """Those kernel sizes, odd, in pixels."""
    init_conv_kernel_size: int = pydantic.Field(7, ge=1)
    """Kernel of the first convolution without `init_cross_embed`, in pixels."""
    cross_embed_downsample: bool = False
    """Halve the resolution by convolutions at several kernel sizes at once."""
    cross_embed_downsample_kernel_sizes: Integers = (2, 4)
    """Those kernel sizes, even, in pixels."""
    memory_efficient: bool = False
    """Halve the resolution before a stage's blocks, not after them, as Imagen's upsamplers do."""
    scale_skip_connection: bool = False
    """Scale skip connections by the square root of one half."""
    pixel_shuffle_upsample: bool = True
    """Double the resolution by pixel shuffling, not by nearest neighbours."""
    combine_upsample_fmaps: bool = False
    """The last block sees the features of all stages."""
    final_conv_kernel_size: int = pydantic.Field(1, ge=1)
    """Kernel of the last convolution, in pixels."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> UnetConfig:
        for key in ("num_resnet_blocks", "resnet_groups", "self_attn"):
            values = getattr(self, key)
            if len(values) not in (1, len(self.dim_mults)):
                raise ConfigError(f"task.<unet>.{key}", values, f"one value, or {len(self.dim_mults)}, one for each of dim_mults")
        return self
