"""Samples per second of training beside the peers' own trainers: same model, data, batch, precision and cores.

    .venv/bin/python benchmarks/trainers.py OUT --starts 2 --repeat 6 --seconds 3.5

* coca: `open_clip_train.train.train_one_epoch` on its own webdataset loader, open_clip's model and `CoCaLoss`.
* dalle2_prior: `DiffusionPriorTrainer` on DALLE2-pytorch's `PriorEmbeddingDataset` (embedding-reader), with its averaged weights.
* dalle2_decoder: `DecoderTrainer` on its `create_image_embedding_dataloader` and embeddings in its own layout, with averaged weights.
* clip_vit: the loop of the image-to-prompt project: pictures as files, torchvision's transforms, a DataLoader, AdamW, a cosine schedule.

GPT-2 stands beside transformers' Trainer in `text.py`, Stable Diffusion beside diffusers' script in `sd_steps.py`. Peers get one loader process beside
one training thread, which was their best on 2 cores; ours trains in one thread too, and Ray reads with one CPU. Both train without end and are let run in
turns, each stopped while the other one runs (`_alternate.py`), `--repeat` turns of `--seconds` in each of `--starts` starts. A peer that is not
installed is left out aloud; `--peers FOLDER` is searched first. Exit status 1 if ours is slower.
"""

from __future__ import annotations

import argparse
import os
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _alternate import Ends, Program, StepLog, alternate_starts, logged_steps, read_steps
from _fresh import add_peers_option, can_import, environment
from _results import Results, Row, add_option
from scene_shards import write_embeddings, write_scenes

from diptych.config import RunConfig, apply_overrides, load_recipe

DIM, INDEX_WIDTH = 96, 3
TASKS = {
    "coca": ("demo", "open_clip_train", "open_clip_train"),
    "dalle2_prior": ("demo", "dalle2_pytorch", "DALLE2-pytorch's DiffusionPriorTrainer"),
    "dalle2_decoder": ("scenes", "dalle2_pytorch", "DALLE2-pytorch's DecoderTrainer"),
    "clip_vit": ("scenes", "transformers", "the image-to-prompt project's loop"),
}
"""Task → recipe, the peer's package, the peer's name."""


EVERY = {"coca": 5, "dalle2_prior": 5, "dalle2_decoder": 2, "clip_vit": 5}
"""Steps between two lines of our log, so that a turn has several."""
ENDLESS = 100_000_000


def watched(batches: Iterable[Any], log: StepLog) -> Iterator[Any]:
    """`batches`; a step ends where the next one is asked for."""
    for batch in batches:
        yield batch
        log.ended()


def config_of(task: str, out: Path) -> RunConfig:
    """The run of both sides."""
    found = [f"data.shards={out / 'shards'}", f"train.steps={ENDLESS}", f"train.log_every={EVERY[task]}", "workers=1"]
    found += ["train.precision=fp32", "validation.samples=0"]
    found += ["checkpoint.every_steps=0", "data.validation_share=0", "optim.name=adamw"]  # as the peers' trainers
    if task != "coca":
        found.append(f"data.embeddings={out / 'embeddings'}")
    if task == "clip_vit":  # the project clips nothing
        found.append("optim.clip_norm=0")
    return apply_overrides(load_recipe(task, TASKS[task][0]), found)


def ours(task: str, out: Path, run_dir: Path) -> None:
    """Our loop in this process, with logging, and reading in Ray's, as in a worker of `diptych train`."""
    from _runs import train

    from diptych.datasets.ray_stream import RayStream
    from diptych.pipelines.ray_context import ray_session

    with ray_session(cpus=1):
        train(config_of(task, out), run_dir, partial(RayStream, cpus=1))


def prepared_config(task: str, out: Path) -> RunConfig:
    """With tokenizer and dimensions, as the data say."""
    from diptych.pipelines.prepare import prepare

    folder = out / f"peer-{os.getpid()}"
    folder.mkdir()
    return prepare(config_of(task, out), folder).config


def endless(make: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        yield from make()


def coca(out: Path, log: StepLog, loaders: int) -> None:
    """open_clip_train's loop and loader."""
    import functools

    import open_clip
    import torch
    from open_clip_train import data as peer_data
    from open_clip_train.data import get_wds_dataset
    from open_clip_train.train import train_one_epoch

    from diptych.datasets.tokens import load_tokenizer
    from diptych.trainers.tasks.coca import CocaTask

    config = prepared_config("coca", out)
    recipe: Any = config.task
    task = CocaTask(recipe, config.seed)
    tokenizer = load_tokenizer(recipe.tokenizer)
    batch, optim = config.train.global_batch_size, config.optim
    args = argparse.Namespace(
        train_data=shards(out), train_num_samples=ENDLESS * batch, dataset_resampled=False, train_data_upsampling_factors=None, seed=0,
        batch_size=batch, workers=loaders, world_size=1, rank=0, local_rank=0, distributed=False, horovod=False, device="cpu", precision="fp32",
        distill=False, accum_freq=1, skip_scheduler=True, grad_clip_norm=optim.clip_norm, log_every_n_steps=config.train.log_every, wandb=False,
    )  # fmt: skip
    # Its grouping of members does not know the mark that newer webdatasets put at the end of each tar.
    peer_data.tar_file_expander = functools.partial(peer_data.tar_file_expander, eof_value=None)
    data = get_wds_dataset(
        args,
        open_clip.image_transform(recipe.image_size, is_train=False, mean=task.built.mean, std=task.built.std),
        is_train=True,
        tokenizer=lambda text: torch.from_numpy(tokenizer.encode([text], recipe.context_length)[0]),
    )
    data.dataloader = Watched(data.dataloader, log)
    loss = open_clip.CoCaLoss(recipe.caption_weight, recipe.contrastive_weight, pad_id=task.vocabulary.pad)
    # As open_clip_train's main: gains and biases are not decayed.
    named = [(name, value) for name, value in task.model.named_parameters() if value.requires_grad]
    plain = [value for name, value in named if value.ndim < 2 or "bn" in name or "ln" in name or "bias" in name or "logit_scale" in name]
    decayed = [value for _, value in named if all(value is not other for other in plain)]
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": optim.weight_decay}]
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
    train_one_epoch(task.model, {"train": data}, loss, 0, optimizer, None, None, None, args)


class Watched:
    """A data loader of open_clip_train whose steps are timed."""

    def __init__(self, loader: Any, log: StepLog) -> None:
        self.loader, self.log = loader, log
        self.num_batches, self.num_samples = loader.num_batches, loader.num_samples

    def __iter__(self) -> Iterator[Any]:
        return watched(self.loader, self.log)


def shards(out: Path) -> str:
    """The tars as a brace pattern."""
    tars = sorted((out / "shards").glob("*.tar"))
    return f"{out / 'shards'}/{{{tars[0].stem}..{tars[-1].stem}}}.tar"


def dalle2_prior(out: Path, log: StepLog, _: int) -> None:
    """The lines of DALLE2-pytorch's train_diffusion_prior.py between its loader and its trainer."""
    from accelerate import Accelerator
    from dalle2_pytorch.dataloaders.prior_loader import PriorEmbeddingDataset, get_reader
    from dalle2_pytorch.trainer import DiffusionPriorTrainer

    from diptych.trainers.prior_model import build_prior

    config = prepared_config("dalle2_prior", out)
    optim, batch, recipe = config.optim, config.train.global_batch_size, config.task
    prior, _section = build_prior(recipe, config.seed)  # type: ignore[arg-type]
    trainer = DiffusionPriorTrainer(
        prior, accelerator=Accelerator(cpu=True), lr=optim.lr, wd=optim.weight_decay, max_grad_norm=optim.clip_norm, use_ema=True,
        warmup_steps=optim.warmup_steps, cosine_decay_max_steps=ENDLESS, ema_beta=optim.ema_decay, ema_update_every=1, ema_update_after_step=0,
    )  # fmt: skip
    readers = get_reader(text_conditioned=False, img_url=str(out / "embeddings" / "img_emb"), txt_url=str(out / "embeddings" / "text_emb"))
    image, text = readers[0], readers[1]
    whole = len(np.load(next((out / "embeddings" / "img_emb").glob("*.npy")), mmap_mode="r")) // batch * batch
    dataset = PriorEmbeddingDataset(text_conditioned=False, batch_size=batch, start=0, stop=whole, image_reader=image, text_reader=text)
    trainer.train()
    for images, texts in watched(endless(lambda: dataset), log):
        trainer(text_embed=texts.float(), image_embed=images.float())
        trainer.update()


def dalle2_decoder(out: Path, log: StepLog, loaders: int) -> None:
    """The lines of DALLE2-pytorch's train_decoder.py between its loader and its trainer."""
    from accelerate import Accelerator
    from dalle2_pytorch.dataloaders.decoder_loader import create_image_embedding_dataloader
    from dalle2_pytorch.trainer import DecoderTrainer
    from torchvision import transforms

    from diptych.trainers.decoder_model import create_decoder, decoder_section, effective_config

    config = prepared_config("dalle2_decoder", out)
    optim, batch = config.optim, config.train.global_batch_size
    recipe, _files = effective_config(config.task)  # type: ignore[arg-type]
    trainer = DecoderTrainer(
        create_decoder(decoder_section(recipe)), accelerator=Accelerator(cpu=True), lr=optim.lr, wd=optim.weight_decay, max_grad_norm=optim.clip_norm,
        use_ema=True, warmup_steps=optim.warmup_steps, cosine_decay_max_steps=ENDLESS, ema_beta=optim.ema_decay, ema_update_every=1,
        ema_update_after_step=0,
    )  # fmt: skip
    side = recipe.image_sizes[0]
    loader = create_image_embedding_dataloader(
        tar_url=shards(out),
        num_workers=loaders,
        batch_size=batch,
        img_embeddings_url=str(out / "reordered" / "img_emb"),
        index_width=INDEX_WIDTH,
        img_preproc=transforms.Compose([transforms.Resize((side, side)), transforms.ToTensor()]),
    )
    trainer.train()
    # Each loader process ends its epoch with what is left; short batches are not trained on.
    for image, embedding in watched((batch_ for batch_ in endless(lambda: loader) if len(batch_[0]) == batch), log):
        trainer(image, image_embed=embedding["img"].float(), unet_number=1)
        trainer.update(unet_number=1)


def clip_vit(out: Path, log: StepLog, loaders: int) -> None:
    """The image-to-prompt project's loop: pictures opened by Pillow, transforms, DataLoader, AdamW, cosine schedule, one line of loss."""
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    from diptych.trainers.tasks.clip_vit import ClipVitTask

    config = prepared_config("clip_vit", out)
    recipe: Any = config.task
    task, batch, optim = ClipVitTask(recipe, config.seed), config.train.global_batch_size, config.optim
    files = sorted((out / "pictures").glob("*.jpg"))
    targets = torch.from_numpy(np.load(next((out / "embeddings" / "text_emb").glob("*.npy"))).astype(np.float32))
    side = recipe.image_size
    steps_of = [transforms.Resize(side), transforms.CenterCrop(side), transforms.ToTensor()]
    transform = transforms.Compose([*steps_of, transforms.Normalize(task.tower.mean, task.tower.std)])

    class Pictures(Dataset[tuple[torch.Tensor, torch.Tensor]]):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            return transform(Image.open(files[index]).convert("RGB")), targets[index]

    loader = DataLoader(Pictures(), batch_size=batch, shuffle=True, num_workers=loaders, drop_last=True, persistent_workers=loaders > 0)
    model = task.tower.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=ENDLESS, eta_min=optim.min_lr)
    for images, wanted in watched(endless(lambda: loader), log):
        optimizer.zero_grad()
        loss = -torch.nn.functional.cosine_similarity(model(images), wanted).mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        loss.item()


PEERS: dict[str, Callable[[Path, StepLog, int], None]] = {
    "coca": coca,
    "dalle2_prior": dalle2_prior,
    "dalle2_decoder": dalle2_decoder,
    "clip_vit": clip_vit,
}


def data(out: Path, scenes: int) -> None:
    """Shards, embeddings in both layouts, and pictures as files; made once."""
    from diptych.pipelines import reorder

    write_scenes(out / "shards", scenes, 64)
    write_embeddings(out / "embeddings", out / "shards", DIM)
    if not (out / "reordered").is_dir():
        reorder.run(str(out / "embeddings"), str(out / "shards"), str(out / "reordered"), jobs=1)
    if not (out / "pictures").is_dir():
        (out / "pictures").mkdir()
        for path in sorted((out / "shards").glob("*.tar")):
            with tarfile.open(path) as tar:
                for member in tar:
                    if member.name.endswith(".jpg"):
                        (out / "pictures" / member.name).write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]


def programs(task: str, options: argparse.Namespace) -> dict[str, Program]:
    """Both sides, in processes of their own."""
    mark = time.time_ns()
    run_dir, steps = options.out / f"run-{mark}", options.out / f"peer-{mark}.steps"
    ends: dict[str, tuple[Path, Callable[[], Ends]]] = {
        "peer": (steps, lambda: read_steps(steps)),
        "ours": (run_dir, lambda: logged_steps(run_dir)),
    }
    words = [sys.executable, __file__, str(options.out), "--loaders", str(options.loaders), "--threads", str(options.threads)]
    around = environment(options.peers, options.threads)
    return {
        side: Program([*words, "--train", f"{side}/{task}", "--where", str(where)], found, options.out / f"{side}.log", around)
        for side, (where, found) in ends.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seconds", type=float, default=3.5, help="of a turn")
    parser.add_argument("--scenes", type=int, default=4000)
    parser.add_argument("--repeat", type=int, default=6, help="turns of a start")
    parser.add_argument("--starts", type=int, default=2, help="of both sides, one after the other")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on each side")
    parser.add_argument("--loaders", type=int, default=1, help="loader processes of the peers")
    add_peers_option(parser)
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--where", type=Path, help=argparse.SUPPRESS)
    add_option(parser)
    options = parser.parse_args()
    options.out = options.out.resolve()
    if options.train:
        import torch

        torch.set_num_threads(options.threads)
        side, task = options.train.split("/")
        if side == "ours":
            ours(task, options.out, options.where)
        else:
            PEERS[task](options.out, StepLog(options.where), options.loaders)
        return
    data(options.out, options.scenes)
    results = Results(__file__, options.results)
    for task in options.tasks:
        recipe, package, peer = TASKS[task]
        if not can_import(package, options.peers):
            print(f"{task}: {package} is not installed, nothing is measured", flush=True)
            continue
        batch = load_recipe(task, recipe).train.global_batch_size
        found = alternate_starts(lambda task=task: programs(task, options), options.starts, options.repeat, options.seconds)
        rates = {side: [turn.rate * batch for turn in turns] for side, turns in found.items()}
        what = f"{task}/{recipe} trains, batch {batch}, fp32, {options.threads} thread{'s' if options.threads > 1 else ''}"
        row = results.add(Row(what, "samples/s", rates["ours"], peer, rates["peer"], at_least=1.0, headline=True))
        print(f"{what}: {row.median['ours'] / row.median['peer']:.2f} × {peer}", flush=True)
    sys.exit(0 if results.finish() else 1)


if __name__ == "__main__":
    main()
