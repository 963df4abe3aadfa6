"""Texts from prompts: tokens in and out of `text_generation`, and the stops that a reader sees (keywords, a string).

Prompts are computed in batches of like lengths and returned in their own order; the text of prompt i depends on its number and the
seed, not on its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from diptych.trainers.decoding import Decoding
from diptych.trainers.text_generation import Continuation, Prompts, StepModel, generate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Completion:
    """One text."""

    text: str
    """With or without its prompt, as `Decoding.with_prompt` says."""
    tokens: int
    """New tokens, before the cut at a keyword or a string."""
    ended: bool
    """Whether the model ended the text itself."""


class Completer:
    """Completes prompts with one model and its tokenizer."""

    def __init__(self, model: StepModel, tokenizer: PreTrainedTokenizerBase, positions: int, device: torch.device) -> None:
        self.model, self.tokenizer, self.positions, self.device = model, tokenizer, positions, device
        self._commas: dict[int, int] = {}

    def complete(
        self, prompts: Sequence[str], decoding: Decoding, *, numbers: Sequence[int] | None = None, batch_size: int = 64,
        advance: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:  # fmt: skip
        """`decoding.num_samples` texts for each prompt.

        Args:
            prompts: Beginnings; an empty one needs a tokenizer with a start token.
            decoding: Strategy and limits.
            numbers: Number of each prompt, which keys its draws: a part of a file gets the whole file's texts. By default their places.
            batch_size: Prompts computed together.
            advance: Called with the number of prompts done, for a progress bar.

        Raises:
            ValueError: A prompt is empty, or fills the model's positions.
        """
        numbers = range(len(prompts)) if numbers is None else numbers
        encoded = [self._encode(prompt, number) for number, prompt in zip(numbers, prompts, strict=True)]
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
        results: list[list[Completion]] = [[] for _ in prompts]
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            texts = self._batch([encoded[index] for index in part], [numbers[index] for index in part], decoding)
            for index, continuations in zip(part, texts, strict=True):
                results[index] = [self._finish(prompts[index], encoded[index], one, decoding) for one in continuations]
            if advance is not None:
                advance(len(part))
        return results

    def fault(self, prompt: str) -> str:
        """Why `prompt` cannot be continued, or an empty string."""
        try:
            self._encode(prompt, 0)
        except ValueError as error:
            return str(error).removeprefix("prompt 0 ")
        return ""

    def _encode(self, prompt: str, number: int) -> list[int]:
        """Ids as training saw them: the start token, if there is one, then the text without the space at its end."""
        start = self.tokenizer.bos_token_id
        text = self.tokenizer(prompt.rstrip(), add_special_tokens=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        if end in text:
            raise ValueError(f"prompt {number} holds {self.tokenizer.convert_ids_to_tokens(end)}, which ends a text: leave it out")
        ids = ([] if start is None else [start]) + text
        if not ids:
            raise ValueError(f"prompt {number} is empty and the tokenizer has no start token; give it at least one word")
        if len(ids) >= self.positions:
            raise ValueError(f"prompt {number} has {len(ids)} tokens, the model holds {self.positions}: shorten it to continue it")
        return ids

    def _batch(self, ids: list[list[int]], numbers: list[int], decoding: Decoding) -> list[list[Continuation]]:
        width = max(map(len, ids))
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        tokens = torch.tensor([[pad] * (width - len(row)) + row for row in ids], device=self.device)
        lengths = torch.tensor([len(row) for row in ids], device=self.device)
        mask = torch.arange(width, device=self.device) >= width - lengths[:, None]
        # Sampled texts each end at the model's positions; beams of a batch share its longest prompt's limit.
        room = self.positions - (width if decoding.num_beams > 1 else min(map(len, ids)))
        decoding = decoding.model_copy(update={"max_new_tokens": min(decoding.max_new_tokens, room)})
        budgets = [decoding.keywords - self._count_commas(row) if decoding.keywords else 0 for row in ids]

        def stop(prompt: int, new: list[int]) -> bool:
            if len(ids[prompt]) + len(new) >= self.positions:
                return True
            if decoding.keywords and self._count_commas(new) >= budgets[prompt]:
                return True
            # The string may span tokens: look at as many as it has characters.
            return bool(decoding.stop) and decoding.stop in self._decode(new[-len(decoding.stop) - 1 :])

        return generate(
            self.model, Prompts(tokens, mask, torch.tensor(numbers, device=self.device)), self.tokenizer.eos_token_id, decoding, stop
        )

    def _finish(self, prompt: str, ids: list[int], one: Continuation, decoding: Decoding) -> Completion:
        """Tokens to text. They are decoded behind their prompt, because a token's spaces depend on what stands before it."""
        text = self._decode(ids + one.tokens)[len(self._decode(ids)) :]
        if decoding.stop:
            text = text.partition(decoding.stop)[0]
        if decoding.keywords:
            text = ",".join(text.split(",")[: max(decoding.keywords - prompt.count(","), 0)])
        return Completion(prompt.rstrip() + text if decoding.with_prompt else text.strip(), len(one.tokens), one.ended)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _count_commas(self, ids: list[int]) -> int:
        for token in ids:
            if token not in self._commas:
                self._commas[token] = self._decode([token]).count(",")
        return sum(self._commas[token] for token in ids)


class PromptWorker:
    """Completes blocks of prompts; made once in each process of a pool."""

    def __init__(self, make: Callable[[], Completer], decoding: str) -> None:
        """`make` loads the model in this process; `decoding` is a `Decoding` as JSON."""
        self.completer, self.decoding = make(), Decoding.model_validate_json(decoding)

    def __call__(self, block: dict[str, Any]) -> dict[str, list[Any]]:
        """Block of `number` and `prompt` → a row per text: `number, prompt, sample, text, tokens, ended, fault`."""
        rows = self.rows([int(number) for number in block["number"]], [str(prompt) for prompt in block["prompt"]])
        return {column: [row[column] for row in rows] for column in ("number", "prompt", "sample", "text", "tokens", "ended", "fault")}

    def rows(self, numbers: Sequence[int], prompts: Sequence[str]) -> list[dict[str, Any]]:
        """The texts of prompts with their numbers; a prompt that cannot be continued gives one row with its fault."""
        faults = [self.completer.fault(prompt) for prompt in prompts]
        good = [index for index, fault in enumerate(faults) if not fault]
        texts = self.completer.complete([prompts[index] for index in good], self.decoding, numbers=[numbers[index] for index in good])
        found = dict(zip(good, texts, strict=True))
        rows = []
        for index, (number, prompt) in enumerate(zip(numbers, prompts, strict=True)):
            about = {"number": number, "prompt": prompt, "fault": faults[index]}
            for sample, one in enumerate(found.get(index, [Completion("", 0, False)])):
                rows.append(about | {"sample": sample, "text": one.text, "tokens": one.tokens, "ended": one.ended})
        return rows
