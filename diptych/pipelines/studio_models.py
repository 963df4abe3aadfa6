"""What the studio's runs can do, and the models that do it: loaded once, in this process or in replicas of Ray Serve."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from diptych.config import ConfigError, RunConfig

if TYPE_CHECKING:
    from diptych.pipelines.painters import PainterSpec
    from diptych.trainers.pictures import PictureRequest, PictureSettings


@dataclass(frozen=True)
class StudioSpec:
    """The runs by what they do; small and picklable. Empty = the studio cannot do it."""

    painter: PainterSpec | None = None
    writer: str = ""
    """gpt2."""
    captioner: str = ""
    """coca."""
    prompter: str = ""
    """clip_vit."""
    clip: str = ""
    """Scores each picture."""
    checkpoint: str = "newest"
    averaged: bool = True
    device: str = "auto"


@dataclass(frozen=True)
class PainterFacts:
    """What the app must know of the painter before it paints."""

    modes: frozenset[str]
    stages: tuple[str, ...]
    guidance: tuple[float, ...]
    """Its own, of each stage."""
    size: int


class Engine(Protocol):
    """The models' work as the app asks for it."""

    def facts(self) -> PainterFacts | None:
        """Of the painter, if there is one."""

    def paint(self, requests: Sequence[PictureRequest], settings: PictureSettings) -> tuple[np.ndarray, list[float | None]]:
        """uint8 [B, H, W, 3], and the CLIP score of each where a CLIP is there and the request has a prompt."""

    def complete(self, prompt: str, keywords: int, strategy: str, seed: int) -> str:
        """`prompt` with `keywords` comma-separated keywords in all, its own included."""

    def caption(self, image: bytes) -> str:
        """What the captioner says of a picture's file."""

    def nearest(self, image: bytes, count: int) -> list[tuple[str, float]]:
        """Known prompts nearest to a picture's file, with their cosines."""


def studio_spec(
    runs: Sequence[str], *, clip: str = "", checkpoint: str = "newest", averaged: bool = True, device: str = "auto"
) -> StudioSpec:  # fmt: skip
    """Sort `runs` (folders, or names under `runs`) by what they do. `ConfigError` for two that do the same, and for ones that cannot work."""
    from diptych.pipelines.painters import PICTURE_TASKS, painter_spec
    from diptych.pipelines.runs_folder import find_run

    kinds: dict[str, str] = {}
    for name in runs:
        folder = find_run(name)
        task = RunConfig.from_json((folder / "config.json").read_text()).task.name
        if task in kinds:
            raise ConfigError("RUN", name, "one run of each task", f"{Path(kinds[task]).name} is one of {task} too.")
        if task not in ("gpt2", "coca", "clip_vit", *PICTURE_TASKS):
            raise ConfigError("RUN", name, "runs of tasks that the studio knows", f"It is one of {task}.")
        kinds[task] = str(folder)
    painting = [kinds[task] for task in PICTURE_TASKS if task in kinds]
    painter = painter_spec(painting, clip=clip, checkpoint=checkpoint, averaged=averaged, device=device) if painting else None
    writer, captioner, prompter = kinds.get("gpt2", ""), kinds.get("coca", ""), kinds.get("clip_vit", "")
    return StudioSpec(painter, writer, captioner, prompter, clip if painter else "", checkpoint, averaged, device)


class StudioModels:
    """`Engine` on models in this process; each serves one call at a time, and all are loaded when it is made."""

    def __init__(self, spec: StudioSpec) -> None:
        """Raises `ConfigError` for a run without a whole checkpoint, or a CLIP that cannot be loaded."""
        from diptych.pipelines.generate_text import load_completer
        from diptych.pipelines.painters import open_embedder, open_painter, resolve_device
        from diptych.pipelines.trained import load_trained

        self.spec, self.turn = spec, threading.Lock()
        common = (spec.checkpoint, spec.averaged, resolve_device(spec.device))
        self.painter = open_painter(spec.painter) if spec.painter else None
        self.embedder = open_embedder(spec.clip, spec.device) if spec.clip else None
        self.completer = load_completer(spec.writer, *common) if spec.writer else None
        self.captioner = load_trained(Path(spec.captioner), *common) if spec.captioner else None
        self.prompter = load_trained(Path(spec.prompter), *common) if spec.prompter else None
        self.prompts: Any = None

    def facts(self) -> PainterFacts | None:
        """See `Engine`."""
        painter = self.painter
        if painter is None:
            return None
        return PainterFacts(frozenset(painter.modes), tuple(painter.stages), tuple(painter.guidance), painter.size)

    def paint(self, requests: Sequence[PictureRequest], settings: PictureSettings) -> tuple[np.ndarray, list[float | None]]:
        """See `Engine`."""
        from diptych.trainers.picture_metrics import prompt_scores

        assert self.painter is not None
        with self.turn:
            images = self.painter.paint(requests, settings)
            return images, prompt_scores(self.embedder, list(images), [request.prompt for request in requests])

    def complete(self, prompt: str, keywords: int, strategy: str, seed: int) -> str:
        """See `Engine`."""
        from diptych.trainers.decoding import STRATEGIES

        assert self.completer is not None
        fault = self.completer.fault(prompt)
        if fault:
            raise ValueError(f"The prompt {fault}.")
        decoding = STRATEGIES[strategy].model_copy(update={"keywords": keywords, "seed": seed})
        with self.turn:
            return self.completer.complete([prompt], decoding, numbers=[0])[0][0].text

    def caption(self, image: bytes) -> str:
        """See `Engine`."""
        import torch

        from diptych.pipelines.generate_from_images import decode_alone
        from diptych.trainers.decoding import Decoding
        from diptych.trainers.tasks.coca import CocaTask

        assert self.captioner is not None
        task = self.captioner.task
        assert isinstance(task, CocaTask)
        assert task.needs.image is not None
        pixels = torch.from_numpy(decode_alone(image, task.needs.image)[None]).to(next(task.parameters()).device)
        with self.turn:
            return task.captions(pixels, Decoding(num_beams=3), torch.zeros(1, dtype=torch.int64, device=pixels.device))[0][0]

    def nearest(self, image: bytes, count: int) -> list[tuple[str, float]]:
        """See `Engine`. The prompts are those of the run's data, whose embeddings are joined at the first call."""
        import torch

        from diptych.pipelines.generate_from_images import decode_alone, known_prompts
        from diptych.trainers.tasks.clip_vit import ClipVitTask

        assert self.prompter is not None
        task = self.prompter.task
        assert isinstance(task, ClipVitTask)
        assert task.needs.image is not None
        pixels = torch.from_numpy(decode_alone(image, task.needs.image)[None]).to(next(task.parameters()).device)
        with self.turn, torch.no_grad():
            if self.prompts is None:
                self.prompts = known_prompts(self.prompter)
            return self.prompts.nearest(task.predict(pixels).cpu().numpy(), count)[0]


class ServedModels:
    """`Engine` on replicas of Ray Serve, which start and stop with the load."""

    def __init__(self, spec: StudioSpec, replicas: int, gpus: float = 0.0) -> None:
        """Start between one and `replicas` replicas on the Ray that is running."""
        from ray import serve

        scaling = {"min_replicas": 1, "max_replicas": replicas, "target_ongoing_requests": 1}
        deployment = serve.deployment(
            StudioModels,
            name="studio",
            autoscaling_config=scaling,
            max_ongoing_requests=2,
            ray_actor_options={"num_cpus": 1, "num_gpus": gpus},
        )
        self.handle: Any = serve.run(deployment.bind(spec), name="diptych-studio", route_prefix=None)

    def facts(self) -> PainterFacts | None:
        """See `Engine`."""
        return self.handle.facts.remote().result()

    def paint(self, requests: Sequence[PictureRequest], settings: PictureSettings) -> tuple[np.ndarray, list[float | None]]:
        """See `Engine`."""
        return self.handle.paint.remote(list(requests), settings).result()

    def complete(self, prompt: str, keywords: int, strategy: str, seed: int) -> str:
        """See `Engine`."""
        return self.handle.complete.remote(prompt, keywords, strategy, seed).result()

    def caption(self, image: bytes) -> str:
        """See `Engine`."""
        return self.handle.caption.remote(image).result()

    def nearest(self, image: bytes, count: int) -> list[tuple[str, float]]:
        """See `Engine`."""
        return self.handle.nearest.remote(image, count).result()

    def close(self) -> None:
        """Stop the replicas; the Ray stays."""
        from ray import serve

        serve.delete("diptych-studio")
