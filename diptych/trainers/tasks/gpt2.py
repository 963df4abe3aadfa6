"""GPT-2 on prompts: the next token of every text, its end included, with no mean over padding.

The loss is a sum over label tokens, so how a micro-batch is laid out (`prompt_layout`) does not change it. The vocabulary
projection is computed for label positions only, so padding costs nothing there.

Shapes: B prompts, L tokens, R rows of T tokens as laid out, N label tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from diptych.config import ConfigError
from diptych.recipes.gpt2 import GPT2Config
from diptych.trainers.completion import Completer
from diptych.trainers.decoding import Decoding
from diptych.trainers.gpt2_steps import GPT2Steps
from diptych.trainers.prompt_evaluation import evaluate_prefix, evaluate_prompts
from diptych.trainers.prompt_layout import Sheet, lay_out
from diptych.trainers.task import Batch, Evaluation, Output, Table, Task, Term, Validation, synthetic_rows
from diptych.vocabulary import Vocabulary, load_vocabulary

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase


class GPT2Task(Task):
    """transformers' `GPT2LMHeadModel`, fresh or pretrained, whole or with LoRA adapters."""

    name: ClassVar[str] = "gpt2"
    config: GPT2Config

    def __init__(self, config: GPT2Config, seed: int) -> None:
        """Raises `ConfigError` on a model that is not a GPT-2, or texts longer than its positions."""
        super().__init__(config, seed)
        if config.model:
            _check_model(config)
        self.vocabulary = _load_vocabulary(config.tokenizer or config.model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model: Any = _fused(self._pretrained() if config.model else self._fresh())
            if config.lora.rank:
                self.model = _with_adapters(self.model, config)

    @property
    def gpt2(self) -> GPT2LMHeadModel:
        """The model itself, inside peft's wrapper if there is one."""
        return self.model.get_base_model() if self.config.lora.rank else self.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the data."""
        assert self.vocabulary.tokenizer is not None, "the tokenizer is still to be trained"
        return self.vocabulary.tokenizer

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        """Label tokens: every token of a sample but its first."""
        return {"next_token": (_lengths(batch) - 1).clamp(min=0).sum().float()}

    def forward(self, batch: Batch) -> Output:
        """Cross-entropy of the label tokens; reports accuracy and the share of padding computed."""
        nll, correct, _, cells = self._label_tokens(batch)
        count = torch.tensor(float(len(nll)), device=nll.device)
        filled = _lengths(batch).sum().float()
        report = {"accuracy": Term(correct.sum().float(), count), "padding": Term(cells - filled, torch.full_like(filled, cells))}
        return Output(terms={"next_token": Term(nll.sum(), count)}, report=report)

    def validate(self, batch: Batch) -> Validation:
        """Terms as in training, and per sample the summed loss and the label tokens."""
        nll, correct, owner, _ = self._label_tokens(batch)
        zeros = torch.zeros(batch["weight"].shape[0], device=nll.device)
        count = torch.tensor(float(len(nll)), device=nll.device)
        terms = {"next_token": Term(nll.sum(), count), "accuracy": Term(correct.sum().float(), count)}
        rows = {"nll": zeros.index_add(0, owner, nll), "label_tokens": zeros.index_add(0, owner, torch.ones_like(nll))}
        return Validation(terms=terms, rows=rows)

    def summarise(self, rows: dict[str, Tensor]) -> dict[str, float]:
        """Perplexity: exp of the mean loss of a token over all texts."""
        mean = rows["nll"].detach().double().sum() / rows["label_tokens"].double().sum().clamp(min=1)
        return {"perplexity": float(mean.exp())}

    def set_gradient_checkpointing(self) -> None:
        """Recompute each block in the backward pass."""
        self.gpt2.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def completer(self) -> Completer:
        """Generation with this model and its tokenizer."""
        model = self.gpt2
        return Completer(GPT2Steps(model), self.tokenizer, model.config.n_positions, model.device)

    def show(self, batch: Batch) -> Table | None:
        """Held-out prompts continued greedily from their first words, beside what people wrote."""
        if self.vocabulary.tokenizer is None:
            return None
        texts = self._texts([batch])
        prompts = [" ".join(text.split()[:3]) for text in texts]
        completed = self.completer().complete(prompts, Decoding(max_new_tokens=self.config.length))
        return Table(
            "Prompts continued",
            ["given", "continued", "written"],
            [[p, c[0].text, t] for p, c, t in zip(prompts, completed, texts, strict=True)],
        )

    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        """The strategies table of the keyword generator where prompts have keywords, and scores of texts from `task.prefix`."""
        if self.vocabulary.tokenizer is None:
            return Evaluation()
        texts = self._texts(batches)
        evaluation = evaluate_prompts(self.completer(), texts)
        if self.config.prefix:
            from_prefix = evaluate_prefix(self.completer(), texts, self.config.prefix)
            evaluation = Evaluation(evaluation.metrics | from_prefix.metrics, evaluation.tables + from_prefix.tables)
        return evaluation

    def _texts(self, batches: Iterable[Batch]) -> list[str]:
        """The samples' texts, from their tokens."""
        return [
            self.tokenizer.decode(tokens[mask], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for batch in batches
            for tokens, mask, weight in zip(batch["tokens"], batch["token_mask"], batch["weight"], strict=True)
            if weight > 0
        ]

    @property
    def attention_tokens(self) -> int | None:
        """Tokens of a row."""
        return self.config.length

    def example_batch(self, batch_size: int, seed: int = 0) -> Batch:
        """Random tokens, prompts of unequal lengths."""
        generator = torch.Generator().manual_seed(seed)
        length = self.config.length
        tokens = torch.randint(0, self.gpt2.config.vocab_size, (batch_size, length), generator=generator)
        lengths = torch.randint(2, length + 1, (batch_size, 1), generator=generator)
        return synthetic_rows(batch_size) | {"tokens": tokens, "token_mask": torch.arange(length) < lengths}

    def export(self, folder: Path) -> None:
        """Write what `AutoModelForCausalLM` and `AutoTokenizer` load; adapters are merged into the weights."""
        model = copy.deepcopy(self.model).cpu().float()
        if self.config.lora.rank:
            model = model.merge_and_unload()
        model.save_pretrained(folder)
        if self.vocabulary.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    @property
    def usage(self) -> str:
        """See `Task.usage`."""
        return """from transformers import pipeline

print(pipeline("text-generation", "{folder}")("a castle on a hill,", max_new_tokens=64)[0]["generated_text"])"""

    def _label_tokens(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, float]:
        """Of every label token its loss [N], whether its argmax is right [N], its row [N]; and the cells computed."""
        losses, hits, owners, cells = [], [], [], 0
        for sheet in lay_out(batch["tokens"], _lengths(batch), self.config):
            hidden = self._hidden(sheet)
            labelled = (sheet.owner[:, 1:] >= 0) & (sheet.owner[:, 1:] == sheet.owner[:, :-1])
            logits = self.gpt2.lm_head(hidden[:, :-1][labelled]).float()
            labels = sheet.tokens[:, 1:][labelled]
            losses.append(functional.cross_entropy(logits, labels, reduction="none"))
            hits.append(logits.detach().argmax(-1) == labels)
            owners.append(sheet.owner[:, 1:][labelled])
            cells += sheet.tokens.numel()
        return torch.cat(losses), torch.cat(hits), torch.cat(owners), float(cells)

    def _hidden(self, sheet: Sheet) -> Tensor:
        """Last hidden states [R, T, D]. Padding stands behind the prompts, where causal attention never looks: no mask is needed."""
        transformer = self.gpt2.transformer
        # Embedded here, because transformers warns of padding without a mask where it sees the ids.
        embedded = transformer.wte(sheet.tokens)
        if sheet.positions is None:
            return transformer(inputs_embeds=embedded, use_cache=False).last_hidden_state
        causal = torch.ones(sheet.tokens.shape[1], sheet.tokens.shape[1], dtype=torch.bool, device=sheet.tokens.device).tril()
        mask = ((sheet.owner[:, :, None] == sheet.owner[:, None, :]) & causal)[:, None]
        return transformer(inputs_embeds=embedded, position_ids=sheet.positions, attention_mask=mask, use_cache=False).last_hidden_state

    def _fresh(self) -> GPT2LMHeadModel:
        from transformers import GPT2Config as ModelConfig
        from transformers import GPT2LMHeadModel

        sizes, dropout, vocabulary = self.config.architecture, self.config.dropout, self.vocabulary
        return GPT2LMHeadModel(
            ModelConfig(
                vocab_size=vocabulary.size,
                n_positions=sizes.positions,
                n_embd=sizes.width,
                n_layer=sizes.layers,
                n_head=sizes.heads,
                embd_pdrop=dropout,
                attn_pdrop=dropout,
                resid_pdrop=dropout,
                bos_token_id=vocabulary.start,
                eos_token_id=vocabulary.end,
                pad_token_id=vocabulary.pad,
            )
        )

    def _pretrained(self) -> GPT2LMHeadModel:
        from transformers import GPT2LMHeadModel

        dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), self.config.dropout)
        model, info = GPT2LMHeadModel.from_pretrained(self.config.model, dtype=torch.float32, output_loading_info=True, **dropout)
        missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
        if missing:
            raise ConfigError("task.model", self.config.model, "all weights of a GPT-2", f"Missing there: {', '.join(missing[:3])}.")
        if self.vocabulary.size > model.config.vocab_size:
            model.resize_token_embeddings(self.vocabulary.size)
        return model


def _check_model(config: GPT2Config) -> None:
    """Refuse a `task.model` that is not a GPT-2 or holds too few positions, before any weights are read."""
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(config.model)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError("task.model", config.model, "a hub name or a folder with config.json and weights", reason) from None
    if found.model_type != "gpt2":
        raise ConfigError("task.model", config.model, "a GPT-2", f"It is a {found.model_type}.")
    if config.length > found.n_positions:
        raise ConfigError(
            "task.length", config.length, f"at most the model's positions = {found.n_positions}", "Longer prompts are cut to it."
        )


def _load_vocabulary(name: str) -> Vocabulary:
    try:
        vocabulary = load_vocabulary(name)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = str(error).splitlines()[0]
        raise ConfigError("task.tokenizer", name, "a hub name or a folder with a Hugging Face tokenizer", reason) from None
    if vocabulary.tokenizer is not None and not vocabulary.folder:
        raise ConfigError("task.tokenizer", name, "a tokenizer of Hugging Face, which the exported model brings along")
    return vocabulary


def _fused(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """GPT-2's activation as PyTorch's one kernel: transformers writes the same function out in eight operations, each through memory."""
    if model.config.activation_function == "gelu_new":
        for block in model.transformer.h:
            block.mlp.act = nn.GELU(approximate="tanh")
    return model


def _with_adapters(model: GPT2LMHeadModel, config: GPT2Config) -> Any:
    from peft import LoraConfig, get_peft_model

    lora = config.lora
    adapters = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, adapters)
    except ValueError as error:
        raise ConfigError("task.lora.targets", lora.targets, "layers of GPT-2: c_attn, c_proj, c_fc", str(error)) from None


def _lengths(batch: Batch) -> Tensor:
    """Tokens of each sample, int64 [B]; 0 on rows of weight zero."""
    return batch["token_mask"].sum(1) * (batch["weight"] > 0)
