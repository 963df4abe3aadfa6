"""CoCa: losses equal open_clip's, its exports load in open_clip, captions are generated as its forward pass predicts."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch
from open_clip.loss import CoCaLoss
from PIL import Image

from diptych.config import ConfigError, apply_overrides, load_recipe
from diptych.datasets.tokens import load_tokenizer, train_tokenizer
from diptych.recipes.coca import CocaConfig
from diptych.trainers.captioning import CaptionSteps, generate_captions
from diptych.trainers.decoding import Decoding
from diptych.trainers.tasks.coca import CocaTask

CAPTIONS = ["a red circle above a blue star", "two dogs, running", "three green squares on a mint background"]


def make(*overrides: str) -> CocaTask:
    """The task of the recipe `smoke`."""
    return CocaTask(apply_overrides(load_recipe("coca", "smoke"), overrides).task, seed=0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tokenizer trained on `CAPTIONS`."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(CAPTIONS * 3, 64, folder)
    return str(folder)


def test_fifty_steps_equal_a_plain_loop_over_open_clip():
    ours, peer = make(), make()
    loss_of = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)
    optimizers = [torch.optim.AdamW(task.parameters(), lr=1e-3) for task in (ours, peer)]
    for step in range(50):
        batch = ours.example_batch(8, seed=step)
        output = ours(batch)
        terms = output.terms | ours.contrast(output.features, batch["weight"], slice(0, 8))
        loss = sum(ours.coefficients[name] * term.sum / term.weight for name, term in terms.items())
        theirs = peer.model(peer.pixels(batch["image"]), batch["tokens"])
        contrastive, caption = loss_of(
            theirs["image_features"], theirs["text_features"], theirs["logits"], theirs["labels"], theirs["logit_scale"]
        )
        tolerance = 1e-6 if step == 0 else 1e-5
        assert (terms["contrastive"].sum / 8).item() == pytest.approx(contrastive.item(), rel=tolerance), step
        assert 2 * (terms["caption"].sum / terms["caption"].weight).item() == pytest.approx(caption.item(), rel=tolerance), step
        for optimizer, value in zip(optimizers, (loss, contrastive + caption), strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()


def test_contrast_of_slices_adds_up_and_the_whole_batch_stands_against_each():
    task = make()
    batch = task.example_batch(9)
    batch["weight"][4] = 0
    features = task.features(batch)
    whole = task.contrast(features, batch["weight"], slice(0, 9))["contrastive"]
    parts = [task.contrast(features, batch["weight"], slice(start, start + 3))["contrastive"] for start in (0, 3, 6)]
    assert sum(part.sum.item() for part in parts) == pytest.approx(whole.sum.item(), rel=1e-6)
    present = batch["weight"] > 0
    without = {key: value[present] if value.ndim else value for key, value in features.items()}
    alone = task.contrast(without, batch["weight"][present], slice(0, 8))["contrastive"]
    assert alone.sum.item() == pytest.approx(whole.sum.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("overrides", "terms", "frozen"),
    [
        (("task.contrastive_weight=0",), {"caption"}, {"model.logit_scale", "model.visual.proj", "model.text.text_projection"}),
        (("task.caption_weight=0",), {"contrastive"}, {"model.text_decoder.text_projection"}),
        (("task.freeze_image=true",), {"contrastive", "caption"}, {"model.visual.conv1.weight"}),
        (("task.freeze_text=true",), {"contrastive", "caption"}, {"model.text.token_embedding.weight"}),
    ],
)
def test_what_no_loss_reaches_is_frozen_and_all_else_learns(overrides, terms, frozen):
    task = make(*overrides)
    batch = task.example_batch(4)
    output = task(batch)
    found = output.terms | task.contrast(output.features, batch["weight"], slice(0, 4))
    assert set(found) == set(task.weights(batch)) == terms
    torch.stack([term.sum for term in found.values()]).sum().backward()
    without = {key for key, parameter in task.named_parameters() if parameter.grad is None}
    assert frozen <= without
    assert without == {key for key, parameter in task.named_parameters() if not parameter.requires_grad}


def test_the_temperature_is_clamped_as_clip_does():
    task = make()
    with torch.no_grad():
        task.model.logit_scale.fill_(9.0)
        task.after_step()
    assert task.model.logit_scale.exp().item() == pytest.approx(100.0, rel=1e-5)


def test_flops_count_what_is_trained():
    whole, frozen, contrast = (
        make().flops_per_sample,
        make("task.freeze_image=true").flops_per_sample,
        make("task.caption_weight=0").flops_per_sample,
    )
    # 5 image tokens through one block of 12 · 32² weights: 4 operations less for each of them.
    assert whole - frozen == pytest.approx(4 * 5 * 12 * 32**2)
    assert contrast < frozen


def test_fresh_weights_are_initialised_everywhere():
    # open_clip leaves the decoder's projection as uninitialised memory: its caption loss starts far above log(vocabulary).
    task = make()
    batch = task.example_batch(16)
    loss, weight = task(batch).terms["caption"]
    assert torch.log(torch.tensor(256.0)) * 0.8 < loss / weight < torch.log(torch.tensor(256.0)) * 1.4


def test_step_logits_equal_the_forward_pass_of_open_clip():
    task = make("task.context_length=24").eval()
    batch = task.example_batch(5)
    pixels = task.pixels(batch["image"])
    tokens = torch.randint(3, 256, (5, 20), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = task.vocabulary.start
    with torch.no_grad():
        expected = task.model(pixels, tokens, output_labels=False)["logits"]
        image_tokens = task.model._encode_image(pixels)[1]
        at_once = CaptionSteps(task.model, image_tokens).logits(tokens)
        steps = CaptionSteps(task.model, image_tokens)
        one_by_one = [steps.start(tokens[:, :1], torch.ones(5, 1, dtype=torch.bool))] + [steps.step(tokens[:, at]) for at in range(1, 20)]
    assert torch.allclose(at_once, expected, atol=1e-5)
    assert torch.allclose(torch.stack(one_by_one, dim=1), expected, atol=1e-5)


@pytest.fixture(scope="module")
def learned(tokenizer: str) -> tuple[CocaTask, dict[str, torch.Tensor]]:
    """A task that has learned three captions by heart."""
    task = make(f"task.tokenizer={tokenizer}")
    tokens, mask = load_tokenizer(tokenizer).encode(CAPTIONS, 16)
    batch = task.example_batch(3) | {"tokens": torch.from_numpy(tokens), "token_mask": torch.from_numpy(mask)}
    optimizer = torch.optim.AdamW(task.parameters(), lr=5e-3)
    for _ in range(60):
        term = task(batch).terms["caption"]
        optimizer.zero_grad()
        (term.sum / term.weight).backward()
        optimizer.step()
    return task.eval(), batch


def test_greedy_with_the_cache_is_greedy_without_and_says_what_was_learned(learned):
    task, batch = learned
    pixels, vocabulary = task.pixels(batch["image"]), task.vocabulary
    cached = [captions[0] for captions in generate_captions(task.model, pixels, vocabulary, Decoding())]
    for row, expected in enumerate(cached):
        tokens = [vocabulary.start]
        while len(tokens) < 16:
            with torch.no_grad():
                logits = task.model(pixels[row : row + 1], torch.tensor([tokens]), output_labels=False)["logits"][0, -1]
            logits[[vocabulary.pad, vocabulary.start]] = -torch.inf
            tokens.append(int(logits.argmax()))
            if tokens[-1] == vocabulary.end:
                break
        assert [token for token in tokens[1:] if token != vocabulary.end] == expected
    assert task.captions(batch["image"]) == [[caption.replace(",", " ,")] for caption in CAPTIONS]
    assert task.captions(batch["image"], Decoding(num_beams=3)) == [[caption.replace(",", " ,")] for caption in CAPTIONS]


def test_sampling_is_reproducible_and_independent_of_the_batch(tokenizer):
    task = make(f"task.tokenizer={tokenizer}").eval()
    image = task.example_batch(4)["image"]
    decoding = Decoding(sample=True, top_k=20, top_p=0.9, temperature=1.3, num_samples=2, seed=7)
    whole = task.captions(image, decoding)
    assert whole == task.captions(image, decoding)
    assert whole[2:] == task.captions(image[2:], decoding, numbers=torch.tensor([2, 3]))
    assert whole != task.captions(image, decoding.model_copy(update={"seed": 8}))


def test_evaluation_and_shown_samples_of_a_model_that_knows_its_captions(learned):
    task, batch = learned
    batch = {key: torch.cat([value, value[:1]]) for key, value in batch.items()}
    batch["weight"][3] = 0
    evaluation = task.evaluate([batch])
    assert evaluation.metrics["exact_match"] == 1.0
    assert evaluation.metrics["bleu4"] == pytest.approx(100.0)
    assert evaluation.metrics["rouge_l"] == pytest.approx(100.0)
    assert len(evaluation.tables[1].rows) == 3
    assert task.show(batch).rows == evaluation.tables[1].rows
    assert make().show(batch) is None


@pytest.mark.parametrize("queries", [0, 5])
def test_an_export_loads_in_open_clip_with_the_same_output(tmp_path, tokenizer, queries):
    task = make(f"task.tokenizer={tokenizer}", f"task.architecture.image_queries={queries}").eval()
    task.export(tmp_path / "export")
    name = f"local-dir:{tmp_path / 'export'}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval()
    encode = open_clip.get_tokenizer(name)
    ours, _ = load_tokenizer(tokenizer).encode([*CAPTIONS, "a red " * 20], 16)
    tokens = encode([*CAPTIONS, "a red " * 20])
    assert torch.equal(tokens, torch.from_numpy(ours))
    image = task.example_batch(4)["image"]
    pixels = torch.stack([preprocess(Image.fromarray(one.numpy())) for one in image])
    assert torch.allclose(pixels, task.pixels(image), atol=1e-6)
    with torch.no_grad():
        loaded, here = model(pixels, tokens), task.model(task.pixels(image), tokens)
    for key in ("image_features", "text_features", "logits"):
        assert torch.allclose(loaded[key], here[key], atol=1e-5), key
    scope: dict = {}
    exec(task.usage.format(folder=tmp_path / "export"), scope)
    assert torch.equal(scope["tokenizer"](CAPTIONS), tokens[:3])


def test_an_export_is_a_start_for_the_next_run(tmp_path, tokenizer):
    task = make(f"task.tokenizer={tokenizer}")
    task.export(tmp_path / "export")
    folder, file = str(tmp_path / "export"), str(tmp_path / "export" / "open_clip_model.safetensors")
    for pretrained in (folder, file):
        again = make(f"task.tokenizer={folder}", f"task.pretrained={pretrained}")
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in task.state_dict().items())
    assert CocaTask(CocaConfig(pretrained=folder, tokenizer=folder, image_size=16, context_length=16), 0).model.context_length == 16


def test_images_of_another_size_interpolate_the_positions(tmp_path, tokenizer):
    make(f"task.tokenizer={tokenizer}").export(tmp_path / "export")
    task = CocaTask(CocaConfig(pretrained=str(tmp_path / "export"), tokenizer=tokenizer, image_size=32, context_length=16), 0)
    assert task.model.visual.positional_embedding.shape[0] == 17
    task(task.example_batch(2))


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"model": "coca_ViT-L-15"}, "task.model"),
        ({"model": "ViT-B-32", "context_length": 77}, "task.model"),
        ({"pretrained": "/nowhere/at/all"}, "task.pretrained"),
        ({"model": "coca_ViT-B-32", "pretrained": "no_such_tag"}, "task.pretrained"),
        ({"model": "coca_ViT-B-32", "context_length": 20}, "task.context_length"),
        ({"model": "custom", "pretrained": "weights.pt", "image_size": 32, "context_length": 16}, "task.pretrained"),
    ],
)
def test_what_does_not_belong_together_is_refused_by_key(fields, key):
    with pytest.raises(ConfigError) as caught:
        CocaTask(CocaConfig(**fields), 0)
    assert caught.value.key == key


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path, tokenizer):
    make(f"task.tokenizer={tokenizer}").export(tmp_path / "export")
    file = tmp_path / "export" / "open_clip_model.safetensors"
    with pytest.raises(ConfigError, match="architecture") as caught:
        make(f"task.tokenizer={tokenizer}", f"task.pretrained={file}", "task.architecture.text_layers=2")
    assert caught.value.key == "task.pretrained"
    config = json.loads((tmp_path / "export" / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["layers"] = 3
    (tmp_path / "export" / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError) as caught:
        CocaTask(CocaConfig(pretrained=str(tmp_path / "export"), tokenizer=tokenizer, image_size=16, context_length=16), 0)
    assert caught.value.key == "task.pretrained"


def test_a_folder_without_weights_is_refused(tmp_path, tokenizer):
    make(f"task.tokenizer={tokenizer}").export(tmp_path / "export")
    (tmp_path / "export" / "open_clip_model.safetensors").unlink()
    with pytest.raises(ConfigError) as caught:
        CocaTask(CocaConfig(pretrained=str(tmp_path / "export"), tokenizer=tokenizer, image_size=16, context_length=16), 0)
    assert caught.value.key == "task.pretrained"


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, tokenizer):
    make(f"task.tokenizer={tokenizer}").export(tmp_path / "export")
    with pytest.raises(ConfigError, match="ids") as caught:
        CocaTask(CocaConfig(pretrained=str(tmp_path / "export"), image_size=16, context_length=16), 0)
    assert caught.value.key == "task.tokenizer"


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["task.caption_weight=0", "task.contrastive_weight=0"], "task.caption_weight"),
        (["task.tokenizer=train:many"], "task.tokenizer"),
        (["task.image_size=20"], "task.image_size"),
        (["task.architecture.width=33"], "task.architecture.width"),
        (["task.architecture.image_queries=1"], "task.architecture.image_queries"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_refused_before_any_torch(overrides, key):
    recipe = load_recipe("coca", "smoke")
    with pytest.raises(ConfigError) as caught:
        apply_overrides(recipe, overrides)
    assert caught.value.key == key


@pytest.mark.parametrize("missing", ["images", "captions"])
def test_shards_without_images_or_captions_are_refused(missing):
    facts = {"samples": 5, "images": 5, "captions": 5} | {missing: 0}
    with pytest.raises(ConfigError, match=missing):
        load_recipe("coca", "smoke").task.check_data(facts)
