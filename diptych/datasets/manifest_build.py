"""Brings a manifest up to date: walks new and changed shards in parallel, keeps the rest, and commits.

What a walk finds is written as a part of its own at once, so that an interrupted build goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import asdict
from tempfile import mkdtemp

import pyarrow.parquet as pq

from diptych.batches import Fault
from diptych.config import ConfigError
from diptych.datasets import storage
from diptych.datasets.manifest import Manifest, common_root
from diptych.datasets.manifest_writer import FORMAT, ManifestWriter
from diptych.datasets.survey import Survey, sidecars, survey_shard

PROCESS_BYTES = 1 << 28
"""Bytes of tars from which on walks run in processes; starting those takes longer than walking less."""
REMOTE_JOBS = 16
"""Walks at a time where the network, not the processor, is what they wait for."""

Progress = Callable[[int, int], None]


class Builder:
    """The shards as they lie there now; builds or updates their manifest in a folder."""

    def __init__(self, urls: Sequence[str]) -> None:
        self.root = common_root(urls)
        named = sorted((url[len(self.root) :].lstrip("/"), url) for url in urls)
        self.names, self.urls = [name for name, _ in named], [url for _, url in named]
        self.sizes, self.stamps = _stamps(self.urls)

    def fresh(self, folder: str) -> Manifest | None:
        """The manifest in `folder`, if there is one and no shard has changed since."""
        manifest = self._load(folder)
        same = manifest is not None and manifest.shard_names == self.names and manifest.shards["stamp"].to_pylist() == self.stamps
        return manifest if same else None

    def bring_up_to_date(self, folder: str, jobs: int | None, progress: Progress | None, reuse: bool) -> Manifest:
        """The manifest in `folder`. With `reuse`, shards whose size and time stamp are known are not walked again."""
        folder = storage.absolute(folder)
        manifest = self.fresh(folder) if reuse else None
        if manifest is not None:
            return manifest
        with _locked(folder):
            manifest = self.fresh(folder) if reuse else None  # another process may have built it meanwhile
            return manifest or self._build(folder, jobs, progress, reuse)

    def _load(self, folder: str) -> Manifest | None:
        try:
            return Manifest.load(folder, self.root)
        except (FileNotFoundError, ConfigError):
            return None  # damaged or older: it is only derived data, and is built again

    def _build(self, folder: str, jobs: int | None, progress: Progress | None, reuse: bool) -> Manifest:
        previous = self._load(folder) if reuse else None
        known: dict[str, int] = {}
        if previous is not None:
            current = dict(zip(self.names, self.stamps, strict=True))
            before = zip(previous.shard_names, previous.shards["stamp"].to_pylist(), strict=True)
            known = {name: index for index, (name, stamp) in enumerate(before) if current.get(name) == stamp}
        with _parts_folder(folder, reuse) as parts:
            paths = {name: os.path.join(parts, _part_name(name, stamp)) for name, stamp in zip(self.names, self.stamps, strict=True)}
            todo = [
                (url, name, size, stamp, paths[name])
                for url, name, size, stamp in zip(self.urls, self.names, self.sizes, self.stamps, strict=True)
                if name not in known and not os.path.exists(paths[name])
            ]
            _walk_all(todo, jobs, progress)
            with ManifestWriter(folder) as writer:
                for name in self.names:
                    writer.add(previous.survey(known[name]) if previous is not None and name in known else _read_part(paths[name]))
                writer.commit(self.root)
        return Manifest.load(folder, self.root)


def _stamps(urls: Sequence[str]) -> tuple[list[int], list[str]]:
    beside = [sidecars(url) for url in urls]
    found = storage.stat_many([*urls, *(stats for stats, _ in beside), *(parquet for _, parquet in beside)])
    count = len(urls)
    sizes, stamps = [], []
    for index, url in enumerate(urls):
        facts = found[index]
        if facts is None:
            raise ConfigError("shards", url, "files that exist", "Check the pattern.")
        if facts.size < 0:
            raise ConfigError("shards", url, "files whose size the server states", "Serve the shards from one that sends Content-Length.")
        sizes.append(facts.size)
        others = (found[count + index], found[2 * count + index])
        stamps.append(";".join(f"{one.size}:{one.stamp}" if one else "-" for one in (facts, *others)))
    return sizes, stamps


def _walk_all(todo: Sequence[tuple[str, str, int, str, str]], jobs: int | None, progress: Progress | None) -> None:
    if progress:
        progress(0, len(todo))
    if not todo:
        return
    remote = not storage.is_local(todo[0][0])
    workers = min(jobs or (REMOTE_JOBS if remote else os.cpu_count() or 1), len(todo))
    if workers == 1:
        for done, task in enumerate(todo):
            survey_to_part(*task)
            if progress:
                progress(done + 1, len(todo))
        return
    with _pool(remote or sum(task[2] for task in todo) < PROCESS_BYTES, workers) as pool:
        futures = [pool.submit(survey_to_part, *task) for task in todo]
        try:
            for done, future in enumerate(as_completed(futures)):
                future.result()
                if progress:
                    progress(done + 1, len(todo))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _pool(threads: bool, workers: int) -> Executor:
    # A fork would copy the locks of whatever threads the caller runs.
    return ThreadPoolExecutor(workers) if threads else ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))


def survey_to_part(url: str, name: str, size: int, stamp: str, path: str) -> None:
    """Walk one shard and write what it found to `path`."""
    survey = survey_shard(url, name, size, stamp)
    about = {
        "name": name,
        "bytes": survey.bytes,
        "digest": survey.digest,
        "counts": survey.counts,
        "stamp": stamp,
        "faults": [asdict(fault) for fault in survey.faults],
    }
    temporary = storage.temporary_path(path)
    try:
        pq.write_table(survey.table.replace_schema_metadata({"survey": json.dumps(about)}), temporary)
        storage.replace_file(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _read_part(path: str) -> Survey:
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"survey"])
    faults = [Fault(**fault) for fault in about["faults"]]
    return Survey(
        about["name"], about["bytes"], table.replace_schema_metadata(None), faults, about["digest"], about["counts"], about["stamp"]
    )


def _part_name(name: str, stamp: str) -> str:
    return hashlib.blake2b(f"{FORMAT}\n{name}\n{stamp}".encode(), digest_size=16).hexdigest() + ".parquet"


@contextlib.contextmanager
def _parts_folder(folder: str, reuse: bool) -> Iterator[str]:
    if not storage.is_local(folder):
        parts = mkdtemp(prefix="diptych-parts-")
        try:
            yield parts
        finally:
            shutil.rmtree(parts, ignore_errors=True)
        return
    parts = os.path.join(folder, "parts")
    if not reuse:
        shutil.rmtree(parts, ignore_errors=True)
    os.makedirs(parts, exist_ok=True)
    yield parts
    shutil.rmtree(parts, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if storage.is_local(folder):
            try:
                stack.enter_context(storage.locked(storage.local_path(folder)))
            except OSError as error:
                raise ConfigError("data.manifest", folder, "a folder that can be written", f"{error.strerror}.") from None
        yield
