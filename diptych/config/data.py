"""`data.*`: where samples come from and how they stream."""

from __future__ import annotations

from typing import Literal

import pydantic

from diptych.config.base import Config, Paths


class DataConfig(Config):
    """Where samples come from and how they stream."""

    shards: str = ""
    """Folder or URL of webdataset tars, or a brace pattern such as `s3://bucket/{00000..00099}.tar`."""
    manifest: str = ""
    """Folder of the manifest; empty = beside the shards, or in the working folder where those cannot be written."""
    keep: Paths = ()
    """Keep-lists (Parquet); a sample is used if all of them keep it."""
    embeddings: str = ""
    """Folder of precomputed embeddings, clip-retrieval's layout or the reordered one; `members` = `.npy` in the tars."""
    caches: Paths = ()
    """Folders that `diptych cache` wrote (latents, text states, image states), for tasks that read them instead of computing them."""
    validation_share: float = pydantic.Field(0.02, ge=0, lt=1)
    """Share of the samples held out for validation, chosen by hash of the key."""
    split_seed: int = 0
    """Seed of the validation split; it does not depend on the run's seed."""
    shuffle: bool = True
    """False streams in the manifest's order."""
    shuffle_chunk: int = pydantic.Field(32, ge=1)
    """Neighbouring samples that are moved together, in samples: larger reads more sequentially."""
    shuffle_group: int = pydantic.Field(8192, ge=1)
    """Samples that are shuffled among each other, in samples: larger mixes more."""
    fault_budget: int = pydantic.Field(100, ge=0)
    """Distinct bad samples that a run may replace before it stops."""
    read_retries: int = pydantic.Field(5, ge=0)
    """Repeated tries of one read after a transient error, with exponential backoff."""
    decoder: Literal["auto", "pil", "opencv"] = "auto"
    """JPEG decoder; `auto` is the fastest one installed. Both use a reduced DCT scale when the target is smaller."""
    block_megabytes: float = pydantic.Field(32.0, gt=0, le=96)
    """Upper bound of one worker's block of consecutive steps, in MB of decoded batch."""
    prefetch_blocks: int = pydantic.Field(2, ge=1)
    """Blocks that are read ahead, per worker."""
    trace: bool = False
    """Write `trace.parquet` (step, rank, slot, shard, key, attempt) to the run folder."""
