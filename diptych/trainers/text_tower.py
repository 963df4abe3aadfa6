"""The text tower of a CLIP, frozen: token states of captions as a condition, as dalle2-pytorch's adapters give them.

Shape legend: B captions, L tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.batches import Needs
from diptych.config import ConfigError
from diptych.trainers.clip_embedder import Embedder
from diptych.trainers.model_name import parse_model


class TextTower:
    """Token states by a CLIP. Not an `nn.Module`, so that its weights are in no checkpoint and no optimizer of the task that reads it."""

    def __init__(self, name: str) -> None:
        """`name` as for `diptych embed --model`. Raises `ConfigError` if it cannot be loaded or has no text tower."""
        try:
            parsed = parse_model(name)
            if parsed.kind == "sentence":
                raise ConfigError("--model", name, "a CLIP: sentence models keep no token states")
            self.model = Embedder(parsed, precision="fp32").model.requires_grad_(requires_grad=False)
        except ConfigError as error:
            raise ConfigError("task.text_tower", name, error.allowed, error.remedy) from error
        self._states = _hugging_face_states(self.model) if parsed.kind == "hf" else _open_clip_states(self.model)

    @cached_property
    def width(self) -> int:
        """D."""
        probe = torch.ones(1, 4, dtype=torch.long)
        return int(self.states(probe, probe.bool()).shape[2])

    @torch.no_grad()
    def states(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """int64 `[B, L]`, bool `[B, L]` → float32 `[B, L, D]`, zeros where the mask is False: that says padding to dalle2-pytorch."""
        if next(self.model.parameters()).device != tokens.device:
            self.model.to(tokens.device)
        # In fp32, as when pictures are made: whatever the task that reads them computes in.
        with torch.autocast(tokens.device.type, enabled=False):
            return self._states(tokens, mask).float().masked_fill(~mask[..., None], 0.0)


def text_tower(name: str, width: int | None, key: str) -> TextTower | None:
    """The tower `name`, None for an empty one. Raises `ConfigError` where its states have other channels than `width`, which `key` says."""
    if not name:
        return None
    tower = TextTower(name)
    if width not in (None, tower.width):
        raise ConfigError("task.text_tower", f"{name}, with states of {tower.width} channels", f"{width} channels, as {key} says")
    return tower


def text_states(tower: TextTower | None, batch: dict[str, Tensor]) -> Tensor:
    """float32 `[B, L, D]`: by the tower from the batch's tokens, or what a cache held."""
    return batch["text_states"].float() if tower is None else tower.states(batch["tokens"], batch["token_mask"])


def example_text(needs: Needs, width: int, generator: torch.Generator, size: int) -> dict[str, Tensor]:
    """What an example batch of `size` captions holds of text: token ids, states of `width` channels, or nothing."""
    if needs.tokens is not None:
        length = needs.tokens.length
        lengths = torch.randint(3, length + 1, (size, 1), generator=generator)
        mask = torch.arange(length) < lengths
        return {"tokens": torch.randint(1, 9, (size, length), generator=generator) * mask, "token_mask": mask}
    if needs.cached is not None:
        return {"text_states": torch.randn(size, 8, width, generator=generator).half()}
    return {}


def _hugging_face_states(model: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda tokens, mask: model.text_model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state


def _open_clip_states(model: Any) -> Callable[[Tensor, Tensor], Tensor]:
    if hasattr(model, "text_decoder"):
        # A CoCa normalises its class token alone; its decoder reads these same states.
        return lambda tokens, _: model._encode_text(tokens)[1]
    final = model.ln_final if hasattr(model, "ln_final") else model.text.ln_final
    whole = int(model.context_length)

    def states(tokens: Tensor, _: Tensor) -> Tensor:
        caught: list[Tensor] = []
        length = tokens.shape[1]
        handle = final.register_forward_hook(lambda _module, _inputs, output: caught.append(output))
        try:
            # Some towers take their whole length alone; dalle2-pytorch's adapter always gives them that, padded with zeros.
            model.encode_text(F.pad(tokens, (0, max(0, whole - length))))
        finally:
            handle.remove()
        return caught[0][:, :length]

    return states
