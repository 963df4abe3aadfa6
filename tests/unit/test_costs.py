"""What work costs, in counts: bytes, reads, blocks, copies, tasks, padding, calls. Counts are the same on every machine, seconds are not.

Each limit stands beside the count of the naive way, so that a change which does more than it must fails here on any machine, however busy.
"""

from __future__ import annotations

import io
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from support_sd import tiny_pipeline

from diptych.batches import ImageNeed, Needs, TokenNeed
from diptych.config import DataConfig, apply_overrides, load_recipe
from diptych.datasets import ranged
from diptych.datasets.keep import Selection, select
from diptych.datasets.manifest import Manifest, build_manifest
from diptych.datasets.reader import Samples, SampleSource, read_rows
from diptych.datasets.shards import ShardWriter
from diptych.datasets.stream import Assembler, LocalStream, Plan, StreamSpec
from diptych.datasets.tokens import train_tokenizer

SAMPLES, PER_SHARD, BATCH, SIDE = 600, 100, 16, 8
NOISE = np.random.default_rng(0)


def sample(number: int) -> dict[str, object]:
    """A picture of about 7 kB, a caption, and a member of 20 kB that nothing asks for."""
    file = io.BytesIO()
    Image.fromarray(NOISE.integers(0, 256, (48, 48, 3), np.uint8)).save(file, "PNG")
    return {"png": file.getvalue(), "txt": f"picture number {number}", "bin": bytes(20_000)}


class Reads:
    """Every ranged read of tars."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []

    @property
    def bytes(self) -> int:
        """Of all reads."""
        return sum(size for _, _, size in self.calls)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Counts what really goes to the descriptors: the two functions below `read_range` and `read_ranges`."""
    counted, alone, into = Reads(), ranged._pread, ranged._pread_into

    def pread(url: str, offset: int, size: int) -> bytes:
        counted.calls.append((url, offset, size))
        return alone(url, offset, size)

    def pread_into(url: str, offset: int, buffer: memoryview) -> None:
        counted.calls.append((url, offset, len(buffer)))
        into(url, offset, buffer)

    monkeypatch.setattr(ranged, "_pread", pread)
    monkeypatch.setattr(ranged, "_pread_into", pread_into)
    return counted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("costs")
    ShardWriter(str(folder / "shards"), samples_per_shard=PER_SHARD).write_all(sample(number) for number in range(SAMPLES))
    train_tokenizer([f"picture number {number}" for number in range(SAMPLES)], 300, folder / "words")
    return folder


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Manifest:
    return build_manifest(str(folder / "shards"))


def spec_of(manifest: Manifest, needs: Needs, **changes: object) -> StreamSpec:
    source = SampleSource.of(manifest, None, DataConfig())
    spec = StreamSpec(source, Selection(None, manifest.samples, manifest.digest), needs, seed=0, global_batch_size=BATCH)
    return replace(spec, **changes)  # type: ignore[arg-type]


def an_epoch(spec: StreamSpec) -> set[int]:
    """Rows of one epoch."""
    shares = LocalStream(spec, 0, 1, 0, -(-spec.selection.samples // BATCH))
    return {int(row) for share in shares for row in share.arrays["row"] if row >= 0}


def image_bytes(manifest: Manifest) -> int:
    """Of all pictures."""
    return int(manifest.members(np.arange(manifest.samples), ("png",))[2].sum())


def test_an_epoch_of_captions_reads_no_byte_of_a_tar(folder: Path, manifest: Manifest, reads: Reads) -> None:
    spec = spec_of(manifest, Needs(tokens=TokenNeed(str(folder / "words"), 16)))
    assert len(an_epoch(spec)) > 0.9 * SAMPLES
    assert reads.bytes == 0
    text = int(manifest.members(np.arange(SAMPLES), ("txt",))[2].sum())
    tars = sum(path.stat().st_size for path in (folder / "shards").glob("*.tar"))
    assert 0 < text < tars / 100, "a loader that walks the tars reads a hundred times their text"


def test_an_epoch_of_pictures_reads_the_pictures_alone(manifest: Manifest, reads: Reads) -> None:
    """In order, with gaps of at most 64 kB read over, and shuffled with locality: never more than the tars once."""
    pictures, whole = image_bytes(manifest), sum(manifest.shards["bytes"].to_pylist())
    spec = spec_of(manifest, Needs(image=ImageNeed(SIDE)), shuffle_chunk=1, shuffle_group=1, block_megabytes=1e-3)
    # One sample at a time has no neighbour: exactly its bytes, exactly one read.
    for row in range(0, SAMPLES, 50):
        read_rows(spec.source, np.array([row]), np.array([row]), spec.needs, 0)
    assert len(reads.calls) == SAMPLES // 50
    assert reads.bytes == int(manifest.members(np.arange(0, SAMPLES, 50), ("png",))[2].sum())
    reads.calls.clear()
    read_rows(spec.source, np.arange(SAMPLES), np.arange(SAMPLES), spec.needs, 0)
    assert len(reads.calls) == SAMPLES // PER_SHARD, "one read per shard where everything is asked for"
    assert pictures <= reads.bytes <= whole


def test_locality_keeps_the_reads_of_a_shuffled_epoch_few(manifest: Manifest, reads: Reads) -> None:
    needs = Needs(image=ImageNeed(SIDE))
    an_epoch(spec_of(manifest, needs, shuffle_chunk=25, shuffle_group=150, block_megabytes=0.05))
    near = len(reads.calls)
    reads.calls.clear()
    an_epoch(spec_of(manifest, needs, shuffle_chunk=1, shuffle_group=1, block_megabytes=0.05))
    assert near <= len(reads.calls) / 2


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_step_reads_each_of_its_samples_once_whatever_the_workers(manifest: Manifest, world_size: int) -> None:
    plans = [Plan(spec_of(manifest, Needs(image=ImageNeed(SIDE))), rank, world_size, 0, 50) for rank in range(world_size)]
    wanted = np.concatenate([plan.block(number).wanted for plan in plans for number in range(plan.blocks)])
    assert sorted(wanted.tolist()) == list(range(50 * BATCH))


def test_blocks_are_as_many_as_their_bytes_ask_for(manifest: Manifest) -> None:
    """A run of 10⁶ steps: 32 MB a block, one small block first, and no work for steps that nobody has asked for."""
    spec = spec_of(manifest, Needs(image=ImageNeed(256)))
    plan = Plan(spec, 0, 1, 0, 1_000_000)
    rows = plan.block(1).slots.size
    assert 24e6 < plan.block_bytes <= 32e6
    assert plan.block(0).slots.size == BATCH
    assert plan.blocks == 1 + -(-(1_000_000 * BATCH - BATCH) // rows)
    tiny = Plan(replace(spec, needs=Needs(tokens=TokenNeed("words", 16))), 0, 1, 0, 1_000_000)
    assert tiny.blocks <= 1 + 1_000_000 * BATCH // 4000, "thousands of short rows share a block"


def test_a_read_task_is_a_block_and_small(manifest: Manifest) -> None:
    """What the driver of a stream sends: 16 bytes a sample and a few kilobytes; only a segment is planned at once."""
    from ray import cloudpickle

    from diptych.datasets.ray_stream import SEGMENT_BLOCKS, SlotsDatasource

    plan = Plan(spec_of(manifest, Needs(image=ImageNeed(256))), 0, 1, 10**7, 2 * 10**7)
    assert plan.blocks > 1000 * SEGMENT_BLOCKS
    source = SlotsDatasource(plan, 1, 9)
    tasks = source.get_read_tasks(parallelism=200)
    assert len(tasks) == len(source.blocks) == 8
    for task, block in zip(tasks, source.blocks, strict=True):
        assert len(cloudpickle.dumps(task)) <= 16 * len(block.wanted) + 6000


def test_a_block_crosses_to_the_worker_without_a_copy() -> None:
    """Decoded pixels are copied by Ray into its store, and by nobody else until they are a batch."""
    from diptych.datasets.ray_stream import pack, unpack

    slots = np.arange(BATCH)
    arrays = {"slot": slots, "row": slots.copy(), "image": np.zeros((BATCH, SIDE, SIDE, 3), np.uint8)}
    table = pack(Samples(arrays, [], 0))
    assert all(table[key].chunk(0).buffers()[1].address == array.ctypes.data for key, array in arrays.items())
    found = unpack([table])
    assert all(np.shares_memory(found.arrays[key], array) for key, array in arrays.items())


def test_a_batch_of_one_block_is_a_view_of_it(manifest: Manifest) -> None:
    plan = Plan(spec_of(manifest, Needs(image=ImageNeed(SIDE))), 0, 1, 0, 9)
    assembler = Assembler(plan)
    for number in range(plan.blocks):
        block = plan.block(number)
        samples = read_rows(plan.spec.source, block.rows, block.wanted, plan.spec.needs, 0)
        for share in assembler.add(block, samples):
            assert np.shares_memory(share.arrays["image"], samples.arrays["image"])


@pytest.mark.parametrize("step", [0, 1_000, 10_000_000])
def test_the_first_batch_costs_the_same_wherever_a_run_resumes(manifest: Manifest, reads: Reads, step: int) -> None:
    """The samples of one step are read for the first block, not those of the steps before."""
    plan = Plan(spec_of(manifest, Needs(image=ImageNeed(SIDE))), 0, 1, step, step + 1_000_000)
    block = plan.block(0)
    samples = read_rows(plan.spec.source, block.rows, block.wanted, plan.spec.needs, 0)
    assert len(block.wanted) == BATCH
    assert len(reads.calls) <= BATCH
    assert samples.bytes_read == int(manifest.members(block.rows, ("png",))[2].sum())
    assert len(plan.order._epochs) <= 2, "an epoch that is not asked for was computed"


def lengths_of_prompts(count: int) -> np.ndarray:
    """As captions are: most short, some long, 2 to 64 tokens."""
    return np.clip(np.random.default_rng(1).lognormal(2.4, 0.7, count), 2, 64).astype(int)


def cells(batching: str, lengths: np.ndarray) -> int:
    """Tokens that a model computes for prompts of these lengths, padding included."""
    import torch

    from diptych.trainers.prompt_layout import lay_out

    config = apply_overrides(load_recipe("gpt2", "prompts_small").task, [f"batching={batching}"])
    tokens = torch.ones(len(lengths), 64, dtype=torch.long)
    sheets = lay_out(tokens, torch.from_numpy(lengths), config)
    assert sum(int((sheet.owner >= 0).sum()) for sheet in sheets) == lengths.sum(), "a token is missing or computed twice"
    return sum(sheet.tokens.numel() for sheet in sheets)


def test_bucketing_and_packing_compute_little_padding() -> None:
    groups = lengths_of_prompts(640).reshape(10, 64)
    real = groups.sum()
    padded, trimmed = groups.size * 64, sum(cells("trim", lengths) for lengths in groups)
    bucketed, packed = (sum(cells(batching, lengths) for lengths in groups) for batching in ("bucket", "pack"))
    assert trimmed <= padded
    assert bucketed - real <= (trimmed - real) / 3
    assert packed - real <= (trimmed - real) / 6


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("pipelines") / "sd")


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A name for each call of a frozen encoder."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    calls: list[str] = []
    for cls, method, name in ((AutoencoderKL, "encode", "vae"), (CLIPTextModel, "forward", "text encoder")):
        really = getattr(cls, method)

        def counted(*given: object, really: object = really, name: str = name, **named: object) -> object:
            calls.append(name)
            return really(*given, **named)  # type: ignore[operator]

        monkeypatch.setattr(cls, method, counted)
    return calls


@pytest.mark.parametrize(
    ("cached", "expected"), [("", ["text encoder", "vae"]), ("latents", ["text encoder"]), ("latents,text-states", [])]
)
def test_what_is_cached_is_not_computed(pipeline: Path, encoded: list[str], cached: str, expected: list[str]) -> None:
    """Frozen encoders are called once per micro-batch, or, where their output is cached, not at all."""
    from diptych.trainers.tasks.stable_diffusion import StableDiffusionTask

    config = load_recipe("stable_diffusion", "lora_reports").task
    overrides = [f"pretrained={pipeline}", "image_size=16", "flip=0"] + ([f"cached={cached}"] if cached else [])
    task = StableDiffusionTask(apply_overrides(config, overrides), 3)
    batch = task.example_batch(2)
    task(batch | task.draws(batch)).terms["diffusion"].sum.backward()
    assert sorted(encoded) == expected


def test_a_split_takes_bits_a_row_and_not_numbers() -> None:
    """Both sides of 40 million rows: row numbers would take 320 MB, and as much again while they are put together."""
    rows = 40_000_000
    hashes = np.random.default_rng(0).integers(0, 2**64, rows, np.uint64)
    manifest = SimpleNamespace(samples=rows, digest="d", root="shards", columns={"key_hash": hashes})
    tracemalloc.start()
    try:
        train, _ = select(manifest, (), 0.02, 0)  # type: ignore[arg-type]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0.979 < train.samples / rows < 0.981
    assert peak < rows, f"{peak / 1e6:.0f} MB"
