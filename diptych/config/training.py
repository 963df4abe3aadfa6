"""`optim.*`, `train.*`, `validation.*` and `checkpoint.*`: how a model learns, is judged and is kept."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import BeforeValidator

from diptych.config.base import Config, comma_separated


class OptimConfig(Config):
    """The optimizer, its schedule, clipping and EMA."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW, or Muon for the matrices and filters of hidden layers and AdamW for the rest, at one rate (`train.strategy=ddp` only)."""
    lr: float = pydantic.Field(1e-4, gt=0)
    """Peak learning rate."""
    betas: Annotated[tuple[float, float], BeforeValidator(comma_separated)] = (0.9, 0.999)
    """Adam's decay rates."""
    eps: float = pydantic.Field(1e-8, gt=0)
    """Adam's epsilon."""
    eight_bit: bool = False
    """Moments in 8 bits (bitsandbytes, the extra `gpu`): a quarter of the memory. GPUs, AdamW and `train.strategy=ddp` only."""
    weight_decay: float = pydantic.Field(0.01, ge=0)
    """Decoupled decay of matrices; gains and biases are not decayed."""
    warmup_steps: int = pydantic.Field(0, ge=0)
    """Linear warm-up, in optimizer steps."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """After warm-up, until `train.steps`."""
    min_lr: float = pydantic.Field(0.0, ge=0)
    """Where `cosine` and `linear` end."""
    clip_norm: float = pydantic.Field(0.0, ge=0)
    """Largest global gradient norm; 0 = no clipping."""
    ema_decay: float = pydantic.Field(0.0, ge=0, lt=1)
    """Decay of the averaged weights per step; 0 = none. Warmed up as min(decay, (1+t)/(10+t)), so short runs gain too."""


class TrainConfig(Config):
    """The loop."""

    steps: int = pydantic.Field(100, ge=1)
    """Optimizer steps of the whole run."""
    global_batch_size: int = pydantic.Field(32, ge=1)
    """Samples per optimizer step over all workers and micro-batches."""
    micro_batches: int = pydantic.Field(1, ge=1)
    """Micro-batches per worker and step (gradient accumulation); pictures in aspect buckets take more, none of them larger."""
    strategy: Literal["ddp", "zero1", "zero2", "zero3"] = "ddp"
    """DDP, or DeepSpeed ZeRO stage 1, 2 or 3."""
    offload: bool = False
    """Keep the optimizer's state in host memory (ZeRO only)."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto` takes bf16 where the device multiplies it fast (CUDA ≥ 8.0, AMX), else fp32, and logs its choice."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    compile: bool = False
    """`torch.compile` the task."""
    deterministic: bool = False
    """Deterministic kernels, for bitwise equal GPU runs."""
    log_every: int = pydantic.Field(10, ge=1)
    """Steps between logged lines."""
    patience: int = pydantic.Field(0, ge=0)
    """Stop after this many validations without improvement of `monitor`; 0 = never."""
    monitor: str = "val/loss"
    """Metric for `patience` and for the best checkpoint."""
    monitor_mode: Literal["min", "max"] = "min"
    """Whether smaller or larger is better."""
    start_from: str = ""
    """A run folder, or `RUN/checkpoints/NAME`, whose weights, moments, averages and slot a new run begins with; seed, global batch
    and data must be its own, hyperparameters need not. `steps` counts the donor's too. Empty = begin afresh."""
    collective_timeout_seconds: float = pydantic.Field(600.0, gt=0)
    """A collective that hangs longer fails the attempt."""


class ValidationConfig(Config):
    """Validation in the loop."""

    every_steps: int = pydantic.Field(0, ge=0)
    """Optimizer steps between validations; 0 = only at the end."""
    samples: int = pydantic.Field(512, ge=0)
    """Held-out samples used each time, at most; 0 = no validation."""
    batch_size: int = pydantic.Field(0, ge=0)
    """Samples per validation batch over all workers; 0 = the global batch size."""


class CheckpointConfig(Config):
    """Checkpoints."""

    every_steps: int = pydantic.Field(0, ge=0)
    """Optimizer steps between checkpoints; 0 = only at the end."""
    keep: int = pydantic.Field(3, ge=1)
    """Newest checkpoints kept; the best one by `train.monitor` is kept beside them."""
    storage: str = ""
    """Folder or URL, such as `s3://bucket/runs`, for checkpoints, metrics and traces; empty = the run folder."""
