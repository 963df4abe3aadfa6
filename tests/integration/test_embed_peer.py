"""`embed --engine clip-retrieval` runs that package and takes over its rows by key, next to ours on the same tars."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diptych.config import ConfigError
from diptych.datasets import scenes
from diptych.datasets.embeddings import join
from diptych.datasets.manifest import open_manifest
from diptych.datasets.shards import ShardWriter
from diptych.pipelines import embed, embed_verify

TINY = Path(__file__).parents[2].parent / "shared" / "data" / "pomological" / "tiny_clip"
pytestmark = pytest.mark.skipif(not TINY.is_dir(), reason="../shared/data/pomological/tiny_clip is not here")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """60 scenes in three tars; one picture is broken, one caption missing."""
    folder = tmp_path_factory.mktemp("shards")
    rows: list[dict[str, Any]] = list(scenes.samples(0, 0, 60, size=64))
    rows[25]["jpg"] = b"broken"
    del rows[41]["txt"]
    ShardWriter(str(folder), 20).write_all(rows)
    return str(folder)


@pytest.mark.slow
def test_the_peer_itself_fills_the_same_layout_and_what_it_left_out_is_named(ray_session: Any, shards: str, tmp_path: Path) -> None:
    pytest.importorskip("clip_retrieval")
    options = {"model": str(TINY), "engine": "clip-retrieval", "actors": 1, "cpus_per_actor": 2, "partition_size": 40, "batch_size": 16}
    first = embed.run(shards, str(tmp_path / "peer"), options)
    assert (first["samples_in"], first["samples_out"], first["partitions"]) == (60, 58, 2)
    assert {(fault["key"], fault["kind"]) for fault in first["faults"]} == {
        ("0000105", "missing_embedding"),
        ("0000201", "missing_embedding"),
    }
    assert embed.run(shards, str(tmp_path / "peer"), options)["partitions_skipped"] == 2
    assert json.loads((tmp_path / "peer" / "embed.json").read_text())["engine"] == "clip-retrieval"
    assert embed_verify.run(shards, str(tmp_path / "peer"), 0, {"cpus_per_actor": 1})["faults"] == []
    ours = {"model": str(TINY), "actors": 1, "cpus_per_actor": 1, "precision": "fp32"}
    embed.run(shards, str(tmp_path / "ours"), ours)
    manifest = open_manifest(shards)
    one, other = (join(manifest, str(tmp_path / name)) for name in ("peer", "ours"))
    rows = np.flatnonzero(one.lookups["image"].file >= 0)
    for modality in ("image", "text"):
        np.testing.assert_allclose(one.read(rows, modality)[0], other.read(rows, modality)[0], atol=2e-3)
    with pytest.raises(ConfigError, match="Choose another folder"):
        embed.run(shards, str(tmp_path / "ours"), options | {"partition_size": 0})


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"modality": "text"}, "--modality"),
        ({"keep": "list.parquet"}, "--keep"),
        ({"model": "sentence:all-MiniLM-L6-v2"}, "--model"),
    ],
)
def test_what_the_peer_cannot_do_is_refused(shards: str, tmp_path: Path, options: dict[str, str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        embed.run(shards, str(tmp_path), {"model": str(TINY), "engine": "clip-retrieval"} | options)
