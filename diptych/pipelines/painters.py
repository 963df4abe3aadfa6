"""Runs that make pictures, opened as one `Painter`: a stable_diffusion run, or a dalle2_prior and a dalle2_decoder run together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from diptych.config import ConfigError, RunConfig

if TYPE_CHECKING:
    import numpy as np

    from diptych.trainers.clip_embedder import Embedder
    from diptych.trainers.pictures import Painter

PICTURE_TASKS = ("stable_diffusion", "dalle2_prior", "dalle2_decoder")
_COMBINATIONS = "one run of stable_diffusion, or one of dalle2_decoder, with one of dalle2_prior to paint prompts"


@dataclass(frozen=True)
class PainterSpec:
    """What makes pictures, by name; small and picklable, so that each process of a pool opens its own."""

    runs: tuple[str, ...]
    """Run folders, absolute."""
    tasks: tuple[str, ...]
    """Their tasks, in the same order."""
    clip: str = ""
    """The CLIP whose embeddings prior and decoder were trained on, as `model_name.parse_model` takes it."""
    checkpoint: str = "newest"
    averaged: bool = True
    device: str = "auto"
    base: bool = False
    """Open what the run started from instead of what it became (stable_diffusion)."""

    @property
    def name(self) -> str:
        """The runs' names joined, for people."""
        return " + ".join(Path(run).name for run in self.runs) + (" (base)" if self.base else "")

    def run_of(self, task: str) -> Path | None:
        """The folder of the run of `task`, if there is one."""
        return next((Path(run) for run, kind in zip(self.runs, self.tasks, strict=True) if kind == task), None)

    def of_base(self) -> PainterSpec | None:
        """The model that the run started from; None where it started from nothing that makes pictures."""
        run = self.run_of("stable_diffusion")
        started = run is not None and str(getattr(_config(run).task, "pretrained", ""))
        return replace(self, base=True) if started else None


def painter_spec(
    runs: Sequence[str], *, clip: str = "", checkpoint: str = "newest", averaged: bool = True, device: str = "auto"
) -> PainterSpec:  # fmt: skip
    """Understand `runs` (folders, or names under `runs`) without loading a model; `ConfigError` if they make no pictures together."""
    from diptych.pipelines.runs_folder import find_run

    folders = [find_run(run) for run in runs]
    tasks = tuple(_config(folder).task.name for folder in folders)
    if sorted(tasks) not in (["stable_diffusion"], ["dalle2_decoder"], ["dalle2_decoder", "dalle2_prior"]):
        raise ConfigError("RUN", " ".join(runs), _COMBINATIONS, f"These are runs of {', '.join(tasks)}.")
    if "dalle2_decoder" in tasks and not clip:
        remedy = "Name the model that `diptych embed` made their embeddings with."
        raise ConfigError("--clip", clip, "the CLIP whose embeddings prior and decoder were trained on", remedy)
    return PainterSpec(tuple(str(folder) for folder in folders), tasks, _whole_name(clip), checkpoint, averaged, device)


def painter_specs(
    runs: Sequence[str | Path], *, clip: str, checkpoint: str = "newest", averaged: bool = True, device: str = "auto"
) -> list[PainterSpec]:  # fmt: skip
    """Every painter among `runs`: each stable_diffusion run, and each decoder with the one prior. `ConfigError` if there is none."""
    kinds: dict[str, list[str]] = {}
    for run in map(str, runs):
        kinds.setdefault(_config(Path(run)).task.name, []).append(run)
    priors, decoders = kinds.get("dalle2_prior", []), kinds.get("dalle2_decoder", [])
    if decoders and len(priors) != 1:
        raise ConfigError(
            "RUN", f"{len(priors)} priors", "one dalle2_prior beside the decoders", "Evaluate the others in calls of their own."
        )
    groups = [[run] for run in kinds.get("stable_diffusion", [])] + [[priors[0], decoder] for decoder in decoders]
    if not groups:
        raise ConfigError("RUN", " ".join(map(str, runs)), _COMBINATIONS, "Without --clip no pictures are made.")
    return [painter_spec(group, clip=clip, checkpoint=checkpoint, averaged=averaged, device=device) for group in groups]


def _whole_name(clip: str) -> str:
    """A folder's absolute path, so that processes elsewhere find it; a coca run's export; any other name as it is."""
    folder = Path(clip)
    if clip and (folder / "config.json").is_file() and (folder / "checkpoints").is_dir():
        if not (folder / "export").is_dir():
            raise ConfigError("--clip", clip, "an exported model", f"Export the run first: diptych export {clip}")
        folder = folder / "export"
    return str(folder.absolute()) if clip and folder.is_dir() else clip


def painter_config(spec: PainterSpec) -> RunConfig:
    """The configuration of the run that paints: of the decoder, or of Stable Diffusion."""
    return _config(spec.run_of("dalle2_decoder") or Path(spec.runs[0]))


def checkpoint_names(spec: PainterSpec) -> str:
    """The checkpoints that `spec` opens, joined; empty for a base."""
    from diptych.trainers.checkpoint import newest_whole
    from diptych.trainers.runfolder import RunFolder

    if spec.base:
        return ""
    names = [newest_whole(RunFolder(run)) or "" if spec.checkpoint == "newest" else spec.checkpoint for run in spec.runs]
    return " + ".join(names)


def _config(folder: Path) -> RunConfig:
    return RunConfig.from_json((folder / "config.json").read_text())


def resolve_device(name: str) -> str:
    """`auto` → cuda where there is a GPU, else cpu. In the process that will hold the model."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def open_embedder(clip: str, device: str = "auto") -> Embedder:
    """The CLIP `clip` (a name, a folder, or a coca run with an export), in fp32, so that scores do not depend on the machine."""
    from diptych.trainers.clip_embedder import Embedder
    from diptych.trainers.model_name import parse_model

    embedder = Embedder(parse_model(_whole_name(clip)), resolve_device(device), "fp32")
    if "image" not in embedder.modalities:
        raise ConfigError("--clip", clip, "a model of pictures and texts", "A sentence model sees no pictures.")
    return embedder


def open_painter(spec: PainterSpec) -> Painter:
    """Load the models of `spec` in this process. Raises `ConfigError` where weights and configuration do not belong together."""
    from diptych.pipelines.trained import load_trained

    device = resolve_device(spec.device)
    if run := spec.run_of("stable_diffusion"):
        return _open_stable_diffusion(run, spec, device)
    tasks = {
        task: load_trained(Path(run), spec.checkpoint, spec.averaged, device).task for run, task in zip(spec.runs, spec.tasks, strict=True)
    }
    from diptych.datasets.tokens import load_tokenizer
    from diptych.trainers.dalle2_painter import Dalle2Painter
    from diptych.trainers.tasks.dalle2_decoder import Dalle2DecoderTask
    from diptych.trainers.tasks.dalle2_prior import Dalle2PriorTask

    prior, decoder = tasks.get("dalle2_prior"), tasks["dalle2_decoder"]
    assert prior is None or isinstance(prior, Dalle2PriorTask)
    assert isinstance(decoder, Dalle2DecoderTask)

    def tokenize(name: str, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        return load_tokenizer(name).encode(texts, length)

    return Dalle2Painter(prior, decoder, open_embedder(spec.clip, device), tokenize)


def _open_stable_diffusion(run: Path, spec: PainterSpec, device: str) -> Painter:
    from diptych.pipelines.trained import load_trained
    from diptych.recipes.stable_diffusion import StableDiffusionConfig
    from diptych.trainers.sd_painter import SdPainter
    from diptych.trainers.tasks.stable_diffusion import StableDiffusionTask

    if spec.base:
        config = _config(run)
        assert isinstance(config.task, StableDiffusionConfig)
        # A LoRA's adapters start at zero, but they may go on from a file: without them the base is the base.
        task = StableDiffusionTask(config.task, config.seed).to(device).eval()
        return SdPainter(task, base=config.task.train == "lora")
    found = load_trained(run, spec.checkpoint, spec.averaged, device).task
    assert isinstance(found, StableDiffusionTask)
    return SdPainter(found)
