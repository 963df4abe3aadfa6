"""Image to prompt embedding: the cosine between a projected image and the sentence embedding of its prompt.

Shapes: B images, H = W pixels, D dimension of the embeddings.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from diptych.recipes.clip_vit import ClipVitConfig
from diptych.trainers.retrieval import recall_at
from diptych.trainers.task import Batch, Output, Table, Task, Term, Validation, synthetic_rows
from diptych.trainers.vision_towers import build_tower


class ClipVitTask(Task):
    """A vision transformer and a linear projection."""

    name: ClassVar[str] = "clip_vit"
    config: ClipVitConfig

    def __init__(self, config: ClipVitConfig, seed: int) -> None:
        """Raises `ConfigError` on a model that is no vision transformer, or has fewer blocks than `task.unfreeze_from`."""
        super().__init__(config, seed)
        assert config.embed_dim is not None, "task.embed_dim is taken from the data before the task is built"
        self.dim = config.embed_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.tower = build_tower(config, self.dim)
        self.mean: Tensor
        self.std: Tensor
        for name, values in (("mean", self.tower.mean), ("std", self.tower.std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def pixels(self, image: Tensor) -> Tensor:
        """uint8 `[B, H, W, 3]` → float32 `[B, 3, H, W]`, normalised on the device as the weights expect."""
        return (image.permute(0, 3, 1, 2).to(self.mean.dtype) / 255 - self.mean) / self.std

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        """Samples."""
        return {"cosine_loss": batch["weight"].sum()}

    def forward(self, batch: Batch) -> Output:
        """−cosine or 1 − cosine of the samples."""
        cosine = functional.cosine_similarity(self.tower(self.pixels(batch["image"])).float(), batch["text_embedding"])
        return Output(terms={"cosine_loss": self._term(cosine, batch["weight"])}, report={"cosine": _report(cosine, batch["weight"])})

    def _term(self, cosine: Tensor, weight: Tensor) -> Term:
        loss = -cosine if self.config.loss == "cosine" else 1 - cosine
        return Term((loss * weight).sum(), weight.sum())

    @property
    def flops_per_sample(self) -> float | None:
        """Matrix products of all blocks forward and of the trained ones backward; the rest is a few per cent."""
        blocks, tokens = self.tower.blocks(), self.tower.tokens()
        weights = sum(parameter.numel() for parameter in blocks[0].parameters() if parameter.ndim == 2)
        width = next(parameter.shape[-1] for parameter in blocks[0].parameters() if parameter.ndim == 2)
        block = 2 * weights * tokens + 4 * tokens * tokens * width
        return float(block * (len(blocks) + 2 * (len(blocks) - self.config.unfreeze_from)))

    @property
    def attention_tokens(self) -> int | None:
        """Patches and the class token."""
        return self.tower.tokens()

    def validate(self, batch: Batch) -> Validation:
        """The loss, and both embeddings of each sample."""
        prediction = self.predict(batch["image"])
        cosine = functional.cosine_similarity(prediction, batch["text_embedding"])
        rows = {"prediction": prediction, "target": functional.normalize(batch["text_embedding"], dim=-1)}
        return Validation(terms={"cosine_loss": self._term(cosine, batch["weight"])}, rows=rows)

    def summarise(self, rows: dict[str, Tensor]) -> dict[str, float]:
        """Mean cosine over all samples, the same for always predicting the mean target, and recall@k among the targets."""
        prediction, target = rows["prediction"].float(), rows["target"].float()
        baseline = functional.cosine_similarity(target.mean(0, keepdim=True), target)
        figures = {"cosine": float((prediction * target).sum(-1).mean()), "mean_target_cosine": float(baseline.mean())}
        same = torch.unique(target, dim=0, return_inverse=True)[1]
        return figures | {f"recall_at_{k}": share for k, share in recall_at(prediction, target, same).items()}

    def show(self, batch: Batch) -> Table | None:
        """How near each prediction is to its target, and how many targets of the batch are nearer."""
        kept = batch["weight"] > 0
        similarity = self.predict(batch["image"][kept]) @ functional.normalize(batch["text_embedding"][kept], dim=-1).T
        own = similarity.diagonal()
        nearer = (similarity > own[:, None]).sum(1)
        return Table(
            "Predicted embeddings",
            ["cosine", "targets nearer"],
            [[round(a, 4), b] for a, b in zip(own.tolist(), nearer.tolist(), strict=True)],
        )

    def predict(self, image: Tensor) -> Tensor:
        """uint8 `[B, H, W, 3]` → L2-normalised embeddings float32 `[B, D]`."""
        return functional.normalize(self.tower(self.pixels(image)).float(), dim=-1)

    def set_gradient_checkpointing(self) -> None:
        """Recompute each block in the backward pass."""
        self.tower.set_gradient_checkpointing()

    def example_batch(self, batch_size: int, seed: int = 0) -> Batch:
        """Random pixels and targets."""
        generator = torch.Generator().manual_seed(seed)
        side = self.config.image_size
        image = torch.randint(0, 256, (batch_size, side, side, 3), generator=generator, dtype=torch.uint8)
        target = torch.randn(batch_size, self.dim, generator=generator)
        return synthetic_rows(batch_size) | {"image": image, "text_embedding": target}

    @property
    def usage(self) -> str:
        """See `Task.usage`."""
        return self.tower.usage

    def export(self, folder: Path) -> None:
        """clip: what `CLIPVisionModel` loads, with `projection.safetensors`; timm: what `timm.create_model("local-dir:…")` loads."""
        folder.mkdir(parents=True, exist_ok=True)
        self.tower.export(folder)


def _report(cosine: Tensor, weight: Tensor) -> Term:
    return Term((cosine.detach() * weight).sum(), weight.sum())
