"""How text is generated: strategy, limits and stops. No torch here: the command line reads it too."""

from __future__ import annotations

import pydantic

from diptych.config import Config, ConfigError


class Decoding(Config):
    """One strategy. Greedy by default; `num_beams` searches, `sample` draws."""

    max_new_tokens: int = pydantic.Field(128, ge=1)
    """Longest continuation, in tokens; less where the model's positions end."""
    num_beams: int = pydantic.Field(1, ge=1)
    """Hypotheses of beam search; 1 = none."""
    length_penalty: float = 1.0
    """Beam scores are divided by (new tokens)^length_penalty."""
    sample: bool = False
    """Draw tokens instead of taking the likeliest."""
    temperature: float = pydantic.Field(1.0, gt=0)
    """Logits are divided by it before sampling."""
    top_k: int = pydantic.Field(0, ge=0)
    """Draw from this many likeliest tokens; 0 = all."""
    top_p: float = pydantic.Field(1.0, gt=0, le=1)
    """Draw from the likeliest tokens that together reach this probability."""
    repetition_penalty: float = pydantic.Field(1.0, gt=0)
    """Scores of tokens that stand in the text already are weakened by this factor; 1 = not."""
    no_repeat_ngram: int = pydantic.Field(0, ge=0)
    """No sequence of this many tokens appears twice; 0 = any may."""
    num_samples: int = pydantic.Field(1, ge=1)
    """Texts per prompt: draws, or the best beams."""
    keywords: int = pydantic.Field(0, ge=0)
    """Stop once the text holds this many comma-separated keywords, the prompt's included; 0 = no limit."""
    stop: str = ""
    """Stop before this string appears in the continuation; empty = none."""
    with_prompt: bool = True
    """Texts begin with their prompt; false gives the continuation alone."""
    seed: int = 0
    """Seed of the draws; a text depends on (seed, its number) alone."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> Decoding:
        if self.sample and self.num_beams > 1:
            raise ConfigError("num_beams", self.num_beams, "1 where sample=true", "Beam search takes the likeliest; sampling draws.")
        if not self.sample and self.num_samples > self.num_beams:
            remedy = "Set sample=true, or num_beams to at least num_samples."
            raise ConfigError("num_samples", self.num_samples, f"at most num_beams = {self.num_beams} where sample=false", remedy)
        if not self.sample:
            for key in ("temperature", "top_k", "top_p"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ConfigError(key, getattr(self, key), "its default where sample=false", "Set sample=true to draw.")
        return self


STRATEGIES: dict[str, Decoding] = {
    "greedy": Decoding(),
    "no-repeat-3": Decoding(no_repeat_ngram=3),
    "no-repeat-3 + beam 3": Decoding(no_repeat_ngram=3, num_beams=3),
    "temperature 0.7": Decoding(sample=True, temperature=0.7),
    "top-k 50": Decoding(sample=True, top_k=50),
    "top-p 0.9": Decoding(sample=True, top_p=0.9),
}
"""The strategies that the keyword generator compares, in its order."""
