"""A tiny task with a contrastive and a caption term, and streams of counted batches, for tests of the training plane."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.batches import EmbeddingNeed, Needs, StepBatch, TokenNeed
from diptych.config import (
    CheckpointConfig,
    DataConfig,
    OptimConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
    ValidationConfig,
    load_recipe,
    set_path,
)
from diptych.trainers import randomness
from diptych.trainers.checkpoint import load, newest_whole
from diptych.trainers.journal import read_metrics, read_trace
from diptych.trainers.loop import Callbacks, TrainResult, train
from diptych.trainers.recorder import Recorder, start_attempt
from diptych.trainers.runfolder import RunFolder
from diptych.trainers.state import TrainState
from diptych.trainers.strategies import Strategy, make_strategy
from diptych.trainers.task import Batch, Output, Task, Term, Validation, synthetic_rows
from diptych.trainers.tasks import load_task_class

VOCABULARY, LENGTH, WIDTH = 23, 7, 12


class PairConfig(TaskConfig):
    """Configuration of the tiny task."""

    name: ClassVar[str] = "pair"
    dropout: float = 0.0
    noise: float = 0.1
    hidden: int = 16
    idle: bool = False
    """Add a parameter that the loss never reaches, and a frozen one."""

    def needs(self) -> Needs:
        return Needs(tokens=TokenNeed("none", LENGTH), image_embedding=EmbeddingNeed(WIDTH))


class PairTask(Task):
    """Aligns embeddings with token sums over the whole global batch, and predicts the next token."""

    name = "pair"

    def __init__(self, config: PairConfig, seed: int) -> None:
        super().__init__(config, seed)
        H = config.hidden
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(VOCABULARY, H)
            self.image = nn.Sequential(nn.Linear(WIDTH, 4 * H), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(4 * H, H))
            self.decode = nn.Sequential(nn.Linear(2 * H, 4 * H), nn.GELU(), nn.Dropout(config.dropout))
            self.head = nn.Linear(4 * H, VOCABULARY)
            self.frozen = nn.Linear(H, H).requires_grad_(False) if config.idle else None
        self.scale = nn.Parameter(torch.tensor(1.5))
        # Used by this module itself, not by a part of it.
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, H))
        self.register_buffer("shift", torch.full((H,), 0.25))
        if config.idle:
            self.idle = nn.Parameter(torch.ones(5))

    @property
    def coefficients(self) -> dict[str, float]:
        return {"caption": 2.0}

    def draws(self, batch: Batch) -> Batch:
        return {"noise": randomness.normal(self.seed, "noise", batch["slot"], (WIDTH,))}

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        mask = batch["token_mask"][:, 1:] * batch["weight"][:, None]
        return {"contrast": batch["weight"].sum(), "caption": mask.sum()}

    def _encode(self, batch: Batch) -> dict[str, Tensor]:
        image = self.image(batch["image_embedding"] + self.config.noise * batch["noise"]) + self.shift
        mask = batch["token_mask"][..., None].float()
        text = self.gain * (self.embed(batch["tokens"]) * mask).sum(1) / mask.sum(1).clamp_min(1)
        return {"image": F.normalize(image, dim=-1), "text": F.normalize(text, dim=-1), "scale": self.scale}

    def forward(self, batch: Batch) -> Output:
        features = self._encode(batch)
        state = torch.cat([self.embed(batch["tokens"][:, :-1]), features["image"][:, None].expand(-1, LENGTH - 1, -1)], dim=-1)
        logits = self.head(self.decode(state))
        mask = batch["token_mask"][:, 1:].float() * batch["weight"][:, None]
        losses = F.cross_entropy(logits.float().transpose(1, 2), batch["tokens"][:, 1:], reduction="none")
        right = (logits.argmax(-1) == batch["tokens"][:, 1:]).float()
        return Output({"caption": Term((losses * mask).sum(), mask.sum())}, features, {"accuracy": Term((right * mask).sum(), mask.sum())})

    def features(self, batch: Batch) -> dict[str, Tensor]:
        return self._encode(batch)

    def contrast(self, features: dict[str, Tensor], weight: Tensor, rows: slice) -> dict[str, Term]:
        bias = torch.where(weight > 0, 0.0, -1e9)
        labels = torch.arange(weight.shape[0])[rows]
        total = torch.zeros(())
        for mine, others in (("image", "text"), ("text", "image")):
            logits = features["scale"].exp() * features[mine][rows] @ features[others].T + bias
            total = total + 0.5 * (F.cross_entropy(logits, labels, reduction="none") * weight[rows]).sum()
        return {"contrast": Term(total, weight[rows].sum())}

    def validate(self, batch: Batch) -> Validation:
        result = super().validate(batch)
        features = self._encode(batch)
        result.rows = {"image": features["image"], "text": features["text"], "number": batch["slot"]}
        return result

    def summarise(self, rows: dict[str, Tensor]) -> dict[str, float]:
        best = (rows["image"] @ rows["text"].T).argmax(-1)
        return {"recall": float((best == torch.arange(len(best))).float().mean()), "last_slot": float(rows["number"][-1])}

    def after_step(self) -> None:
        self.scale.clamp_(min=1.49)

    def set_gradient_checkpointing(self) -> None:
        from torch.utils.checkpoint import checkpoint

        decode = self.decode.forward
        self.decode.forward = lambda state: checkpoint(decode, state, use_reentrant=False)  # type: ignore[method-assign]

    def example_batch(self, batch_size: int, seed: int = 0) -> Batch:
        arrays = make_rows(np.arange(batch_size))
        return synthetic_rows(batch_size) | {key: torch.from_numpy(arrays[key]) for key in ("tokens", "token_mask", "image_embedding")}

    def export(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)


def make_rows(slots: np.ndarray) -> dict[str, np.ndarray]:
    """Samples 0 to 96 of the tiny task, over and over, by slot; captions are 2 to 7 tokens long."""
    count = len(slots)
    parts = [np.random.default_rng(1000 + max(int(slot), 0) % 97) for slot in slots]
    lengths = np.array([part.integers(2, LENGTH + 1) for part in parts]).reshape(count)
    tokens = np.array([part.integers(1, VOCABULARY, LENGTH) for part in parts]).reshape(count, LENGTH)
    mask = np.arange(LENGTH) < lengths[:, None]
    embedding = np.array([part.normal(size=WIDTH) for part in parts], dtype=np.float32).reshape(count, WIDTH)
    # The image says what the first tokens are, so that there is something to learn.
    embedding[:, 0] = tokens[:, 0] / VOCABULARY
    embedding[:, 1] = tokens[:, 1] / VOCABULARY
    return {
        "slot": slots.astype(np.int64),
        "row": np.where(slots >= 0, slots % 97, -1).astype(np.int64),
        "weight": (slots >= 0).astype(np.float32),
        "tokens": np.where(mask, tokens, 0).astype(np.int64),
        "token_mask": mask,
        "image_embedding": embedding,
    }


def share_of(start: int, count: int, rank: int, size: int, multiple: int) -> np.ndarray:
    """Slots of one worker's share of `[start, start + count)`, padded with -1."""
    part = -(-count // size)
    slots = np.arange(start + rank * part, min(start + (rank + 1) * part, start + count))
    padded = -(-part // multiple) * multiple
    return np.concatenate([slots, np.full(padded - len(slots), -1)]).astype(np.int64)


def stream_from(config: RunConfig, rank: int, size: int, first: int) -> Iterator[StepBatch]:
    """An endless stream of one worker's shares, from step `first` on."""
    step, batch = first, config.train.global_batch_size
    while True:
        yield StepBatch(step, make_rows(share_of(step * batch, batch, rank, size, config.train.micro_batches)))
        step += 1


def held_out(config: RunConfig, rank: int, size: int) -> Iterable[StepBatch]:
    """Validation shares, beyond the slots of training."""
    batch = config.validation.batch_size or config.train.global_batch_size
    for index, start in enumerate(range(0, config.validation.samples, batch)):
        count = min(batch, config.validation.samples - start)
        yield StepBatch(index, make_rows(share_of(10**6 + start, count, rank, size, 1)))


def pair_config(**changes: Any) -> RunConfig:
    """A small run of the tiny task; `changes` are dotted paths with `__` for the dot."""
    config = RunConfig(
        task=PairConfig(),
        seed=3,
        data=DataConfig(trace=True),
        optim=OptimConfig(lr=1e-2, ema_decay=0.9),
        train=TrainConfig(steps=8, global_batch_size=8, log_every=1, precision="fp32"),
        validation=ValidationConfig(samples=0),
        checkpoint=CheckpointConfig(every_steps=0),
    )
    for key, value in changes.items():
        config = set_path(config, key.replace("__", "."), value)
    return config


SAMPLES = 7
"""Global batch of the parity tests; divided by neither 2, 3 nor 4 workers."""
DIM = 16


def smallest(name: str) -> Task:
    """The tiny task of the tests, or a task as its recipe `smoke` makes it."""
    if name == "pair":
        return PairTask(PairConfig(dropout=0.3), seed=3)
    config = load_recipe(name, "smoke").task
    for key in ("embed_dim", "image_embed_dim"):
        if key in type(config).model_fields and getattr(config, key) is None:
            config = set_path(config, key, DIM)
    return load_task_class(name)(config, seed=3)


def share(whole: Batch, rank: int, size: int, multiple: int) -> Batch:
    """One worker's rows of a global batch, padded with rows of zeros and weight zero."""
    slots = torch.from_numpy(share_of(0, SAMPLES, rank, size, multiple))
    rows = {
        key: torch.where((slots >= 0).view(-1, *[1] * (value.ndim - 1)), value[slots], 0).to(value.dtype) for key, value in whole.items()
    }
    rows["slot"] = rows["row"] = slots
    return rows


def train_in(
    folder: str | Path,
    config: RunConfig,
    *,
    stream: Callable[[int], Iterable[StepBatch]] | None = None,
    callbacks: Callbacks | None = None,
    task: Task | None = None,
) -> tuple[TrainResult, Strategy]:
    """One attempt of `config` in the run folder `folder`, as a training worker does it; every process of a group calls it."""
    strategy = make_strategy(config, task or PairTask(config.task, config.seed))
    rank, size = strategy.world.rank, strategy.world.size
    attempt = start_attempt(str(folder), strategy.world)
    recorder = Recorder(str(folder), attempt, strategy.world, config, "digest")
    result = train(
        config,
        strategy,
        stream or (lambda first: stream_from(config, rank, size, first)),
        lambda: held_out(config, rank, size),
        recorder,
        callbacks=callbacks,
    )
    return result, strategy


def final_state(folder: str | Path) -> TrainState:
    """Every tensor of the newest checkpoint of a run."""
    run = RunFolder(str(folder))
    name = newest_whole(run)
    assert name is not None
    return load(run, name).tensors


def differences(left: TrainState, right: TrainState) -> dict[str, float]:
    """Largest absolute difference of each part; infinite where names differ. AdamW's counters are left out, see `idle`."""
    found = {}
    for part in ("weights", "optimizer", "ema"):
        one, other = ({k: v for k, v in getattr(state, part).items() if not k.startswith("step/")} for state in (left, right))
        same_names = set(one) == set(other)
        found[part] = max((float((one[name] - other[name]).abs().max()) for name in one), default=0.0) if same_names else float("inf")
    return found


def assert_identical(left: TrainState, right: TrainState) -> None:
    """Same names, same bits."""
    for part in ("weights", "optimizer", "ema"):
        one, other = getattr(left, part), getattr(right, part)
        assert set(one) == set(other)
        different = [name for name in one if not torch.equal(one[name], other[name])]
        assert not different, f"{part}: {len(different)} of {len(one)} tensors differ, such as {different[:3]}"


def losses_by_step(folder: str | Path) -> dict[int, float]:
    """`train/loss` of the history that counts."""
    return {line["step"]: line["metrics"]["train/loss"] for line in read_metrics(str(folder)) if "train/loss" in line["metrics"]}


def trace_rows(folder: str | Path) -> list[tuple[int, int, int]]:
    """(step, slot, row) of the history that counts, in order."""
    table = read_trace(str(folder)).to_pydict()
    return list(zip(table["step"], table["slot"], table["row"], strict=True))


def denormal_product() -> float:
    """Above 0 where this thread computes with denormal numbers, 0 where it flushes them."""
    return (torch.full((64,), 1e-30) * 1e-10).sum().item()


def fresh_pages() -> int:
    """How many pages this thread touches for the first time when it takes 192 MB that it has freed several times."""

    def taken_and_freed() -> int:
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        # Together, as activations are: the freed end of the heap is what malloc gives back.
        blocks = [torch.ones(2_000_000) for _ in range(24)]
        del blocks
        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

    return [taken_and_freed() for _ in range(5)][-1]
