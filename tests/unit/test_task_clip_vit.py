"""CLIP-ViT: losses equal a plain loop over the peers' networks; frozen blocks stay; exports load in their libraries."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionModel

from diptych.config import ConfigError, build
from diptych.recipes.clip_vit import ClipVitConfig, VisionArchitecture, smoke
from diptych.trainers.tasks.clip_vit import ClipVitTask

SIZES = VisionArchitecture(layers=3, width=32, heads=2, patch_size=8)
TIMM = {"library": "timm", "model": "vit_tiny_patch16_224", "pretrained": False, "loss": "cosine_embedding"}


def make(**changes: object) -> ClipVitTask:
    """A tiny task; timm's has 5.6 million parameters, its smallest."""
    fields = {"model": "", "architecture": SIZES, "image_size": 32, "embed_dim": 16} | changes
    return ClipVitTask(ClipVitConfig(**fields), seed=0)


def compare(task: ClipVitTask, peer: nn.Module, peer_loss, steps: int) -> None:
    """Train both on the same batches and compare every loss."""
    ours, theirs = (torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4) for module in (task, peer))
    for step in range(steps):
        batch = task.example_batch(6, seed=step)
        total, weight = task(batch).terms["cosine_loss"]
        expected = peer_loss(peer(task.pixels(batch["image"])), batch["text_embedding"])
        assert (total / weight).item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-7), step
        for optimizer, value in ((ours, total / weight), (theirs, expected)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()


class PeerNet(nn.Module):
    """The network of the image-to-prompt project: CLIP's pooled output and a linear layer."""

    def __init__(self, vision: CLIPVisionModel, projection: nn.Linear) -> None:
        super().__init__()
        self.vision, self.fc = vision, projection

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.fc(self.vision(pixels).pooler_output)


def test_fifty_steps_equal_a_plain_loop_over_the_projects_network():
    task = make(unfreeze_from=1)
    peer = PeerNet(copy.deepcopy(task.tower.vision), copy.deepcopy(task.tower.projection))
    compare(task, peer, lambda output, target: -functional.cosine_similarity(output, target).mean(), steps=50)


def test_timm_steps_equal_a_plain_loop_with_cosine_embedding_loss():
    task = make(**TIMM, unfreeze_from=6)
    peer = copy.deepcopy(task.tower.model)
    loss = nn.CosineEmbeddingLoss()
    compare(task, peer, lambda output, target: loss(output, target, torch.ones(len(target))), steps=5)


@pytest.mark.parametrize("changes", [{}, TIMM], ids=["clip", "timm"])
def test_only_what_comes_after_the_frozen_blocks_learns(changes):
    count = 2 if not changes else 11
    task = make(**changes, unfreeze_from=count)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    batch = task.example_batch(4)
    task(batch).terms["cosine_loss"].sum.backward()
    torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=1.0).step()
    changed = {name for name, value in task.state_dict().items() if not torch.equal(value, before[name])}
    blocks = {name for name in before if ".layers." in name or ".blocks." in name}
    last = {name for name in blocks if f".{count}." in name}
    assert changed & blocks
    assert changed & blocks <= last
    assert not any("embed" in name or "cls_token" in name for name in changed)
    assert any("projection" in name or "head" in name for name in changed)


def test_padding_rows_contribute_nothing():
    task = make()
    batch = task.example_batch(5)
    cut = {key: value[:3] for key, value in batch.items()}
    padded = dict(batch, weight=torch.tensor([1.0, 1, 1, 0, 0]))
    expected, received = task(cut), task(padded)
    for name in ("terms", "report"):
        for one, two in zip(getattr(expected, name).values(), getattr(received, name).values(), strict=True):
            torch.testing.assert_close(two, one)
    assert task.weights(padded)["cosine_loss"] == 3


def test_validation_is_over_all_rows_beside_the_mean_target():
    task = make().eval()
    parts = [task.example_batch(size, seed=size) for size in (7, 2)]
    rows: dict[str, list[torch.Tensor]] = {}
    with torch.no_grad():
        for part in parts:
            for key, value in task.validate(part).rows.items():
                rows.setdefault(key, []).append(value)
        figures = task.summarise({key: torch.cat(values) for key, values in rows.items()})
        outputs = torch.cat([task.tower(task.pixels(part["image"])) for part in parts])
    targets = torch.cat([part["text_embedding"] for part in parts])
    assert figures["cosine"] == pytest.approx(functional.cosine_similarity(outputs, targets).mean().item(), abs=1e-6)
    mean = functional.normalize(targets, dim=-1).mean(0)
    assert figures["mean_target_cosine"] == pytest.approx(functional.cosine_similarity(mean[None], targets).mean().item(), abs=1e-6)
    assert 0 <= figures["recall_at_1"] <= figures["recall_at_5"] <= figures["recall_at_10"] == 1


def save_clip(folder, **vision: object) -> CLIPModel:
    """A tiny whole CLIP in the layout that is published on the hub."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tower | {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "projection_dim": 16}
    torch.manual_seed(5)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=tower | {"image_size": 32, "patch_size": 8} | vision, projection_dim=16))
    model.save_pretrained(folder)
    return model


def test_the_image_tower_of_a_published_clip_is_loaded(tmp_path):
    whole = save_clip(tmp_path)
    task = make(model=str(tmp_path)).eval()
    batch = task.example_batch(3)
    with torch.no_grad():
        expected = whole.vision_model(task.pixels(batch["image"])).pooler_output
        torch.testing.assert_close(task.tower.vision(task.pixels(batch["image"])).pooler_output, expected)
    larger = make(model=str(tmp_path), image_size=48)
    assert larger.predict(larger.example_batch(2)["image"]).shape == (2, 16)


def test_pixels_are_those_of_the_libraries_own_preprocessing(tmp_path):
    task = make()
    image = task.example_batch(2)["image"]
    task.export(tmp_path)
    peer = CLIPImageProcessor.from_pretrained(tmp_path)(list(np.asarray(image)), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(task.pixels(image), peer, rtol=1e-5, atol=1e-5)


def test_clip_export_loads_in_transformers_and_gives_the_same_output(tmp_path):
    task = make().eval()
    task.export(tmp_path)
    projection = nn.Linear(32, 16)
    projection.load_state_dict(load_file(tmp_path / "projection.safetensors"))
    peer = PeerNet(CLIPVisionModel.from_pretrained(tmp_path).eval(), projection)
    batch = task.example_batch(3)
    with torch.no_grad():
        torch.testing.assert_close(peer(task.pixels(batch["image"])), task.tower(task.pixels(batch["image"])))


def test_timm_export_loads_in_timm_and_in_a_new_run(tmp_path):
    task = make(**TIMM).eval()
    task.export(tmp_path)
    peer = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    again = make(**TIMM | {"model": str(tmp_path)}).eval()
    batch = task.example_batch(2)
    with torch.no_grad():
        expected = task.tower(task.pixels(batch["image"]))
        torch.testing.assert_close(peer(task.pixels(batch["image"])), expected)
        torch.testing.assert_close(again.tower(again.pixels(batch["image"])), expected)


@pytest.mark.parametrize("changes", [{}, TIMM], ids=["clip", "timm"])
def test_gradient_checkpointing_changes_no_gradient(changes):
    plain, saving = make(**changes), make(**changes)
    saving.set_gradient_checkpointing()
    batch = plain.example_batch(2)
    for task in (plain, saving):
        task.train()(batch).terms["cosine_loss"].sum.backward()
    for one, two in zip(plain.parameters(), saving.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(two.grad, one.grad)


def test_wrong_calls_name_key_and_remedy(tmp_path):
    with pytest.raises(ConfigError, match=r"task.unfreeze_from: received 4; allowed: at most 3"):
        make(unfreeze_from=4)
    with pytest.raises(ConfigError, match=r"task.model: received .*nowhere"):
        make(model=str(tmp_path / "nowhere"))
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match=r"a CLIP or its vision tower. It is a bert"):
        make(model=str(tmp_path / "bert"))
    with pytest.raises(ConfigError, match=r"task.model: received 'resnet18'"):
        make(library="timm", model="resnet18", pretrained=False)
    with pytest.raises(ConfigError, match=r"task.model: received 'vit_enormous'"):
        make(library="timm", model="vit_enormous", pretrained=False)
    with pytest.raises(ConfigError, match=r"task.image_size: received 30"):
        build(ClipVitConfig, {"model": "", "image_size": 30}, "task")
    with pytest.raises(ConfigError, match=r"task.embed_dim: received 384; allowed: 64"):
        build(ClipVitConfig, {"embed_dim": 384}, "task").check_data({"text_dim": 64})


def test_the_dimension_comes_from_the_data():
    assert smoke().task.resolve({"text_dim": 48}).embed_dim == 48
    assert ClipVitConfig(embed_dim=384).resolve({"text_dim": 48}).embed_dim == 384


@pytest.mark.parametrize("changes", [{}, TIMM], ids=["clip", "timm"])
def test_operations_are_those_that_torch_counts(changes):
    task = make(**changes, unfreeze_from=1)
    batch = task.example_batch(2)
    with FlopCounterMode(display=False) as counter:
        task(batch).terms["cosine_loss"].sum.backward()
    assert task.flops_per_sample == pytest.approx(counter.get_total_flops() / 2, rel=0.12)


def test_samples_show_how_near_each_prediction_is():
    task = make().eval()
    batch = dict(task.example_batch(4), weight=torch.tensor([1.0, 1, 1, 0]))
    table = task.show(batch)
    assert len(table.rows) == 3
    expected = functional.cosine_similarity(task.predict(batch["image"]), batch["text_embedding"])[:3]
    assert [row[0] for row in table.rows] == pytest.approx(expected.tolist(), abs=1e-3)
