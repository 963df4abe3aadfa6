"""GPT-2 on prompts and captions: configuration and recipes.

A causal language model learns the text of each sample, one prompt per example, its end included, so that generation
ends by itself. The model is transformers' `GPT2LMHeadModel` (Radford et al. 2019).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pydantic

from diptych.batches import Needs, TokenNeed
from diptych.config import Config, ConfigError, DataConfig, OptimConfig, RunConfig, TaskConfig, TrainConfig, ValidationConfig


class GPT2Architecture(Config):
    """Sizes of a GPT-2 of one's own, used where `task.model` is empty."""

    layers: int = pydantic.Field(12, ge=1)
    """Transformer blocks."""
    width: int = pydantic.Field(768, ge=8)
    """Width of the residual stream, in channels."""
    heads: int = pydantic.Field(12, ge=1)
    """Attention heads."""
    positions: int = pydantic.Field(1024, ge=2)
    """Longest text that the model can hold, in tokens."""


class LoraConfig(Config):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) through peft."""

    rank: int = pydantic.Field(0, ge=0)
    """Rank of the adapters; 0 = train all weights."""
    alpha: float = pydantic.Field(16.0, gt=0)
    """Scale of the adapters' output, divided by the rank."""
    dropout: float = pydantic.Field(0.0, ge=0, lt=1)
    """Dropout before the adapters."""
    targets: tuple[str, ...] = ("c_attn",)
    """Names of the layers that get an adapter."""


class GPT2Config(TaskConfig):
    """transformers' GPT-2: the next token of every prompt."""

    name: ClassVar[str] = "gpt2"

    model: str = ""
    """Weights: empty = fresh, of `task.architecture`; a hub name such as `gpt2`; or a local folder."""
    architecture: GPT2Architecture = GPT2Architecture()
    """Sizes of a fresh model."""
    tokenizer: str = ""
    """Empty = the model's own; a hub name; a folder with a Hugging Face tokenizer; or `train:<vocabulary size>` to train one
    on the run's prompts first."""
    length: int = pydantic.Field(128, ge=2)
    """Tokens of a prompt, its end token included; longer ones are cut. At most the model's positions."""
    batching: Literal["trim", "bucket", "pack"] = "trim"
    """Rows of a micro-batch: `trim` cuts them to its longest prompt; `bucket` also computes prompts of like lengths together, in
    `task.buckets` groups; `pack` joins several prompts in a row, none of which attends to another. The loss is the same."""
    buckets: int = pydantic.Field(4, ge=1)
    """Groups of like lengths per micro-batch under `task.batching=bucket`."""
    dropout: float = pydantic.Field(0.1, ge=0, lt=1)
    """Dropout of embeddings, attention and residual branches."""
    lora: LoraConfig = LoraConfig()
    """Adapters; off by default."""
    prefix: str = ""
    """What generation starts from where no prompt is given; also the start of the sample table's texts."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> GPT2Config:
        if self.tokenizer.startswith("train:"):
            if not self.tokenizer.removeprefix("train:").isdigit():
                raise ConfigError("task.tokenizer", self.tokenizer, "train:<vocabulary size>", "Example: train:4096")
            if self.model:
                raise ConfigError(
                    "task.tokenizer",
                    self.tokenizer,
                    f"the tokenizer of task.model={self.model}",
                    "A trained tokenizer needs a fresh model.",
                )
        if not self.model:
            if not self.tokenizer:
                raise ConfigError(
                    "task.tokenizer", "", "a hub name, a folder or train:<vocabulary size>", "A fresh model has no tokenizer of its own."
                )
            self._check_architecture()
        return self

    def _check_architecture(self) -> None:
        sizes = self.architecture
        if sizes.width % sizes.heads:
            raise ConfigError("task.architecture.width", sizes.width, f"a multiple of task.architecture.heads = {sizes.heads}")
        if self.length > sizes.positions:
            raise ConfigError(
                "task.length", self.length, f"at most task.architecture.positions = {sizes.positions}", "Longer prompts are cut to it."
            )

    def needs(self) -> Needs:
        """Token ids of the text."""
        return Needs(tokens=TokenNeed(self.tokenizer or self.model, self.length))

    def check_data(self, facts: dict[str, Any]) -> None:
        """Refuse shards without text."""
        if facts.get("captions") == 0:
            raise ConfigError(
                "data.shards", "samples without text", "samples with `txt` members", "`diptych pack` writes prompts into shards."
            )


def smoke() -> RunConfig:
    """A GPT-2 of 0.1 million parameters, for tests and first calls.

    Source: none. Command: diptych train gpt2 --recipe smoke data.shards=SHARDS
    Hardware: one CPU core, seconds. Expected: it runs; the loss falls.
    """
    sizes = GPT2Architecture(layers=2, width=64, heads=2, positions=64)
    return RunConfig(
        task=GPT2Config(architecture=sizes, tokenizer="train:512", length=32),
        data=DataConfig(validation_share=0.1),
        optim=OptimConfig(lr=1e-3),
        train=TrainConfig(steps=10, global_batch_size=8, precision="fp32", log_every=1),
        validation=ValidationConfig(samples=16),
    )


def prompts_small() -> RunConfig:
    """A GPT-2 of 5 million parameters on some thousand prompts, with a tokenizer trained on them.

    Source: none; sized for a laptop. Command: diptych pack prompts.txt SHARDS, then
    diptych train gpt2 --recipe prompts_small data.shards=SHARDS
    Hardware: 2 CPU cores, 12 minutes for 8,000 prompts. Expected, measured by benchmarks/prompts.py: held-out perplexity 52.3, beside
    634 of a unigram model and 66.9 of an interpolated trigram model over the same tokens:
    0.781 of the latter, where the goal is at most 0.8. On prompts that nothing was chosen by (data.split_seed=1) it is 0.734.
    """
    sizes = GPT2Architecture(layers=4, width=256, heads=4, positions=128)
    return RunConfig(
        task=GPT2Config(architecture=sizes, tokenizer="train:8192", length=128, batching="pack", dropout=0.1),
        data=DataConfig(validation_share=0.05),
        optim=OptimConfig(
            name="muon", lr=3e-3, betas=(0.9, 0.98), weight_decay=0.5, warmup_steps=100, schedule="cosine", min_lr=1e-5, clip_norm=1.0
        ),
        train=TrainConfig(steps=3_050, global_batch_size=16, precision="fp32"),
        validation=ValidationConfig(every_steps=500, samples=1_000, batch_size=100),
    )


def keyword_generator() -> RunConfig:
    """Fine-tune GPT-2 (124M) to complete a prompt's keywords.

    Source: the keyword-generator project on Gustavosta/Stable-Diffusion-Prompts: one prompt per example, bf16, batch 16, 10
    epochs (73,718 prompts), lr 4e-4. The end of each prompt is learned here, so completions end by themselves.
    Command: diptych train gpt2 --recipe keyword_generator data.shards=SHARDS
    Hardware: one GPU of 16 GB. Expected: accuracy without padding above 0.8, the project's figure; keyword-aligned
    ROUGE-L near 40 with one keyword and 49 with two.
    """
    return RunConfig(
        task=GPT2Config(model="gpt2", length=128, batching="bucket"),
        optim=OptimConfig(lr=4e-4, weight_decay=0.0, schedule="linear"),
        train=TrainConfig(steps=10 * 73_718 // 16, global_batch_size=16, precision="bf16", log_every=50),
        validation=ValidationConfig(every_steps=73_718 // 16, samples=8_192, batch_size=64),
    )


def reports() -> RunConfig:
    """Fine-tune GPT-2 (124M) on lines `'Label':report`, to write reports for a label.

    Source: the report-generation project: 2,000 steps, texts of 35 tokens at temperature 0.7 from the prefix "No Finding"
    (`diptych generate RUN --prompt "'No Finding':" max_new_tokens=35 sample=true temperature=0.7`).
    Command: diptych train gpt2 --recipe reports data.shards=SHARDS
    Hardware: one GPU of 8 GB. Expected: held-out perplexity falls below that of the published weights within 500 steps.
    """
    return RunConfig(
        task=GPT2Config(model="gpt2", length=256, batching="bucket", prefix="'No Finding':"),
        optim=OptimConfig(lr=1e-4, weight_decay=0.0),
        train=TrainConfig(steps=2_000, global_batch_size=8, log_every=20),
        validation=ValidationConfig(every_steps=200, samples=1_024, batch_size=32),
    )
