"""How partitions are spread over actors, without Ray; and what the processes of `embed` do not import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diptych.datasets import scenes
from diptych.datasets.manifest import open_manifest
from diptych.datasets.shards import ShardWriter
from diptych.pipelines.embed_pool import _spread
from diptych.pipelines.embed_worker import PARTITIONS_IN_FLIGHT


class Call:
    """`method.remote`, which only notes what was asked; a reference is the tuple of it."""

    def __init__(self, ray: FakeRay, actor: str, ready: bool) -> None:
        self.ray, self.actor, self.ready = ray, actor, ready

    def remote(self, partition: int = -1) -> tuple[str, int]:
        if not self.ready:
            self.ray.under_way[self.actor] = self.ray.under_way.get(self.actor, 0) + 1
            self.ray.most = max(self.ray.most, self.ray.under_way[self.actor])
        return self.actor, partition


class Actor:
    def __init__(self, ray: FakeRay, name: str) -> None:
        self.__ray_ready__ = Call(ray, name, ready=True)
        self.compute = Call(ray, name, ready=False)


class FakeRay:
    """Finishes references in the order in which they were asked for, those of an actor that is `late` never."""

    def __init__(self, late: str = "", broken: int | None = None) -> None:
        self.late, self.broken, self.under_way, self.most, self.by = late, broken, dict[str, int](), 0, dict[str, int]()

    def wait(self, references: list[tuple[str, int]], num_returns: int) -> tuple[list[Any], list[Any]]:
        assert num_returns == 1
        found = next(reference for reference in references if reference[0] != self.late)
        return [found], [reference for reference in references if reference != found]

    def get(self, reference: tuple[str, int]) -> int | bool:
        actor, partition = reference
        if partition == self.broken:
            raise RuntimeError("the actor failed")
        if partition < 0:
            return True
        self.under_way[actor] -= 1
        self.by[actor] = self.by.get(actor, 0) + 1
        return partition


def test_each_partition_is_computed_once_and_no_actor_has_more_than_overlap_in_it() -> None:
    ray = FakeRay()
    pool = [Actor(ray, name) for name in "ab"]
    assert sorted(_spread(ray, pool, [*range(3, 12)])) == [*range(3, 12)]
    assert ray.most == PARTITIONS_IN_FLIGHT
    assert set(ray.by) == {"a", "b"}


def test_an_actor_that_never_comes_delays_nothing() -> None:
    ray = FakeRay(late="b")
    assert sorted(_spread(ray, [Actor(ray, name) for name in "ab"], [*range(5)])) == [*range(5)]
    assert ray.by == {"a": 5}


def test_fewer_partitions_than_fit() -> None:
    ray = FakeRay()
    assert list(_spread(ray, [Actor(ray, name) for name in "ab"], [7])) == [7]


def test_an_error_of_an_actor_is_raised() -> None:
    ray = FakeRay(broken=2)
    with pytest.raises(RuntimeError, match="the actor failed"):
        list(_spread(ray, [Actor(ray, "a")], [1, 2, 3]))


def test_the_driver_imports_neither_torch_nor_pandas_nor_ray_data(tmp_path: Path) -> None:
    """A manifest that stands is opened without pandas, which most of pyarrow's conveniences import."""
    shards, model = tmp_path / "shards", tmp_path / "model"
    ShardWriter(str(shards), 10).write_all(scenes.samples(0, 0, 10, size=32))
    open_manifest(str(shards))
    model.mkdir()
    (model / "atom.json").write_text('{"vision_cfg": {}}')
    (model / "atom.safetensors").touch()
    code = (
        "import sys; from diptych.pipelines import embed; from diptych.pipelines.embed_worker import EmbedWorker\n"
        f"spec = embed.prepare({str(shards)!r}, {str(tmp_path / 'out')!r}, embed.EmbedOptions(model={str(model)!r}))\n"
        "print(spec.samples, sorted({'torch', 'pandas', 'ray.data', 'open_clip', 'transformers'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert found == "10 []\n"
