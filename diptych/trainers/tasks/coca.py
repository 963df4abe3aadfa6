"""CoCa: contrastive loss over the global batch and caption loss over its tokens, with open_clip's model.

Losses equal open_clip's `CoCaLoss` on the whole global batch (Yu et al. 2022, arXiv:2205.01917; open_clip 3.3).
Shape legend: B rows, N rows of the global batch, L tokens, D feature dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.clip_library import open_clip
from diptych.recipes.coca import CocaConfig
from diptych.trainers.caption_metrics import caption_metrics
from diptych.trainers.captioning import generate_captions
from diptych.trainers.coca_model import build_coca, export_coca, freeze_unused
from diptych.trainers.decoding import Decoding
from diptych.trainers.flops import matrix_flops
from diptych.trainers.retrieval import retrieval_metrics
from diptych.trainers.task import Batch, Evaluation, Output, Table, Task, Term, Validation, synthetic_rows
from diptych.vocabulary import load_vocabulary

_LARGEST_LOGIT_SCALE = math.log(100)
_SHOWN = 32
"""Samples in the table of an evaluation."""


class CocaTask(Task):
    """Image tower, text tower and caption decoder, trained by both losses."""

    name: ClassVar[str] = "coca"
    config: CocaConfig

    def __init__(self, config: CocaConfig, seed: int) -> None:
        """Raises `ConfigError` where weights, architecture and tokenizer do not belong together."""
        super().__init__(config, seed)
        self.vocabulary = load_vocabulary(config.tokenizer)
        self.built = build_coca(config, self.vocabulary, seed)
        self.model = self.built.model
        freeze_unused(self.model, config)
        # Counted now: sharded parameters have no shape later.
        self._flops = self._count_flops()
        self.mean: Tensor
        self.std: Tensor
        for name, values in (("mean", self.built.mean), ("std", self.built.std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    @property
    def coefficients(self) -> dict[str, float]:
        """The two weights of the configuration."""
        return {"contrastive": self.config.contrastive_weight, "caption": self.config.caption_weight}

    def pixels(self, image: Tensor) -> Tensor:
        """uint8 `[B, H, W, 3]` → float32 `[B, 3, H, W]`, normalised as the weights expect."""
        scaled = image.permute(0, 3, 1, 2).to(self.mean.dtype) / 255
        return (scaled - self.mean) / self.std

    def _caption_mask(self, batch: Batch) -> Tensor:
        """`[B, L-1]`: 1 where the next token is to be predicted, 0 on padding tokens and padding rows."""
        return (batch["tokens"][:, 1:] != self.vocabulary.pad) * batch["weight"][:, None]

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        """Samples for the contrast, caption tokens (without the start token) for the captions."""
        weights = {}
        if self.config.contrastive_weight:
            weights["contrastive"] = batch["weight"].sum()
        if self.config.caption_weight:
            weights["caption"] = self._caption_mask(batch).sum()
        return weights

    def _tokens(self, batch: Batch) -> Tensor:
        """Token ids; rows of padding get a first token, since attention over padding alone is undefined."""
        empty = (batch["weight"] == 0)[:, None] & (torch.arange(batch["tokens"].shape[1], device=batch["tokens"].device) == 0)
        return torch.where(empty, self.vocabulary.start, batch["tokens"])

    def _encode(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Features `[B, D]` for the contrast, image tokens and text states `[B, L, D]` for the decoder."""
        image, image_tokens = self.model._encode_image(self.pixels(batch["image"]))
        text, text_states = self.model._encode_text(self._tokens(batch))
        features = {"image": image.float(), "text": text.float(), "logit_scale": self.model.logit_scale.exp()}
        return features, image_tokens, text_states

    def forward(self, batch: Batch) -> Output:
        """Caption loss of the rows, and their features for the contrast."""
        features, image_tokens, text_states = self._encode(batch)
        output = Output(terms={}, features=features if self.config.contrastive_weight else {})
        if self.config.caption_weight:
            output.terms["caption"], output.report["caption_accuracy"] = self._caption_terms(batch, image_tokens, text_states)
        return output

    def _caption_terms(self, batch: Batch, image_tokens: Tensor, text_states: Tensor) -> tuple[Term, Term]:
        """Cross-entropy of the next tokens, and how often the likeliest one is right."""
        mask, labels = self._caption_mask(batch), batch["tokens"][:, 1:]
        logits = self.model.text_decoder(image_tokens, text_states[:, :-1]).float()
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
        right = (logits.detach().argmax(dim=-1) == labels) * mask
        return Term((loss * mask).sum(), mask.sum()), Term(right.sum(), mask.sum())

    def features(self, batch: Batch) -> dict[str, Tensor]:
        """`image` and `text` `[B, D]`, L2-normalised, and the scalar `logit_scale`."""
        return self._encode(batch)[0] if self.config.contrastive_weight else {}

    def contrast(self, features: dict[str, Tensor], weight: Tensor, rows: slice) -> dict[str, Term]:
        """Cross-entropy of the right partner among the global batch, image to text and text to image, averaged."""
        if not features:
            return {}
        image, text, present = features["image"], features["text"], weight > 0
        targets = torch.arange(len(weight), device=weight.device)[rows]
        losses = []
        for queries, candidates in ((image, text), (text, image)):
            logits = features["logit_scale"] * queries[rows] @ candidates.T
            # A row of padding is nobody's negative; its own loss is cut off below.
            own = targets[:, None] == torch.arange(len(weight), device=weight.device)
            losses.append(F.cross_entropy(logits.masked_fill(~(present | own), -torch.inf), targets, reduction="none"))
        loss = (losses[0] + losses[1]) / 2
        return {"contrastive": Term((loss * weight[rows]).sum(), weight[rows].sum())}

    def after_step(self) -> None:
        """Clamp the temperature as CLIP does."""
        self.model.logit_scale.clamp_(0, _LARGEST_LOGIT_SCALE)

    @property
    def flops_per_sample(self) -> float | None:
        """Of the three towers; None where one of them is not open_clip's own."""
        return self._flops

    @property
    def attention_tokens(self) -> int | None:
        """Patches or words, whichever are more; None where the image tower is not open_clip's own."""
        visual = self.model.visual
        return (
            max(visual.positional_embedding.shape[0], self.config.context_length + 1)
            if isinstance(visual, open_clip.transformer.VisionTransformer)
            else None
        )

    def _count_flops(self) -> float | None:
        visual, text, length = self.model.visual, self.model.text, self.config.context_length
        if not isinstance(visual, open_clip.transformer.VisionTransformer) or not isinstance(text, open_clip.transformer.TextTransformer):
            return None
        flops = visual.positional_embedding.shape[0] * matrix_flops(visual.transformer) + (length + 1) * matrix_flops(text.transformer)
        return float(flops + (length - 1) * matrix_flops(self.model.text_decoder) * (self.config.caption_weight > 0))

    def set_gradient_checkpointing(self) -> None:
        """Recompute each block of the three towers."""
        self.model.set_grad_checkpointing(True)

    def validate(self, batch: Batch) -> Validation:
        """Loss terms, and the features that retrieval is measured on."""
        features, image_tokens, text_states = self._encode(batch)
        validation = Validation(features=features if self.config.contrastive_weight else {})
        if self.config.caption_weight:
            validation.terms["caption"], validation.terms["caption_accuracy"] = self._caption_terms(batch, image_tokens, text_states)
        validation.rows = {"image": features["image"], "text": features["text"], "tokens": batch["tokens"]}
        return validation

    def summarise(self, rows: dict[str, Tensor]) -> dict[str, float]:
        """Retrieval among the validation set: R@1, 5 and 10, both ways."""
        return retrieval_metrics(rows["image"], rows["text"], rows["tokens"])

    def example_batch(self, batch_size: int, seed: int = 0) -> Batch:
        """Random pixels, and captions of random words and unequal lengths."""
        generator = torch.Generator().manual_seed(seed)
        side, length = self.config.image_size, self.config.context_length
        tokens = torch.full((batch_size, length), self.vocabulary.pad)
        special = {self.vocabulary.pad, self.vocabulary.start, self.vocabulary.end}
        words = torch.tensor([token for token in range(min(self.vocabulary.size, 1000)) if token not in special])
        for row in range(batch_size):
            count = int(torch.randint(1, length - 1, (), generator=generator))
            tokens[row, 0], tokens[row, count + 1] = self.vocabulary.start, self.vocabulary.end
            tokens[row, 1 : count + 1] = words[torch.randint(len(words), (count,), generator=generator)]
        image = torch.randint(0, 256, (batch_size, side, side, 3), generator=generator, dtype=torch.uint8)
        mask = tokens != self.vocabulary.pad
        return synthetic_rows(batch_size) | {"image": image, "tokens": tokens, "token_mask": mask}

    def captions(self, image: Tensor, decoding: Decoding | None = None, numbers: Tensor | None = None) -> list[list[str]]:
        """Captions of uint8 images `[B, H, W, 3]`, as many for each as `decoding.num_samples`; greedy by default.

        `numbers` `[B]` keys the draws of each image. Call it in `eval()`.
        """
        tokens = generate_captions(self.model, self.pixels(image), self.vocabulary, decoding or Decoding(), numbers)
        return [[self.vocabulary.decode(caption) for caption in captions] for captions in tokens]

    def show(self, batch: Batch) -> Table | None:
        """The caption made for each image beside the true one."""
        if not self._captions_images:
            return None
        true, made = self._captioned([batch])
        return Table("Captions of held-out images", ["true", "made"], [list(row) for row in zip(true, made, strict=True)])

    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        """Greedy captions of the images against the true ones: BLEU-4, ROUGE-L, CIDEr, exact match."""
        if not self._captions_images:
            return Evaluation()
        true, made = self._captioned(batches)
        metrics = caption_metrics(made, [[caption] for caption in true])
        figures: list[list[Any]] = [[name, value] for name, value in metrics.items()]
        if "cider" not in metrics:
            figures.append(["cider", "not computed: pip install diptych[text-metrics]"])
        samples = [list(row) for row in zip(true, made, strict=True)][:_SHOWN]
        return Evaluation(
            metrics,
            [Table(f"Captions of {len(true)} held-out images", ["figure", "value"], figures), Table("Captions", ["true", "made"], samples)],
        )

    @property
    def _captions_images(self) -> bool:
        """Whether there is a trained decoder, and a tokenizer to read its ids."""
        return self.config.caption_weight > 0 and self.vocabulary.load is not None

    def _captioned(self, batches: Iterable[Batch]) -> tuple[list[str], list[str]]:
        """True and greedily made captions of all samples."""
        true, made = [], []
        for batch in batches:
            rows = batch["weight"] > 0
            true += [self.vocabulary.decode(tokens) for tokens in batch["tokens"][rows].tolist()]
            made += [texts[0] for texts in self.captions(batch["image"][rows])]
        return true, made

    def export(self, folder: Path) -> None:
        """Write the layout that `open_clip.create_model_and_transforms("local-dir:<folder>")` loads."""
        export_coca(self.built, self.vocabulary, folder)

    @property
    def usage(self) -> str:
        """See `Task.usage`."""
        return (
            "import open_clip\n\n"
            'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{folder}")\n'
            'tokenizer = open_clip.get_tokenizer("local-dir:{folder}")'
        )
