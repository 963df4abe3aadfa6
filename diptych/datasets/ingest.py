"""One shard of a URL list → one tar, by img2dataset itself, put in place whole; and a second pass over its failed URLs.

img2dataset 1.47 (Romain Beaumont) downloads, resizes and writes; what it lacks is around it: the shard is made in a
scratch folder and committed by renames that a later call can finish, a shard whose Parquet lacks rows is an error and not a
shorter shard, and URLs that failed can be tried again without touching the samples that are there.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pydantic

from diptych.config import Config, ConfigError
from diptych.datasets import folders, storage

SHARD_DIGITS = 5
ENDINGS = (".tar", ".parquet", "_stats.json")
"""Files of a shard, in the order in which they are put in place: it is done once the last is there."""


class IngestOptions(Config):
    """What img2dataset does to each image. Defaults are its own."""

    url_column: str = ""
    """Column with the URL; empty = the first usual name."""
    caption_column: str = ""
    """Column with the caption; empty = the first usual name, if there is one; `none` = no captions."""
    save_columns: tuple[str, ...] = ()
    """Further columns that go into the samples' JSON."""
    samples_per_shard: int = pydantic.Field(10_000, ge=2)
    """URLs per tar."""
    size: int = pydantic.Field(256, ge=1)
    """Side of the stored image, in pixels."""
    resize: Literal["border", "no", "keep_ratio", "keep_ratio_largest", "center_crop"] = "border"
    """`border` pads with white, `keep_ratio` fits the shorter side, `keep_ratio_largest` the longer one, `no` stores as it came."""
    only_if_bigger: bool = False
    """Leave smaller images at their size."""
    image_format: Literal["jpg", "png", "webp"] = "jpg"
    """Format of the stored image."""
    quality: int = pydantic.Field(95, ge=0, le=100)
    """JPEG and WebP quality; for PNG the compression, 0 to 9."""
    skip_reencode: bool = False
    """Store the downloaded bytes where no resize is needed."""
    min_image_size: int = pydantic.Field(0, ge=0)
    """Smaller images are refused, in pixels of the shorter side."""
    max_image_area: float = pydantic.Field(math.inf, gt=0)
    """Larger images are refused, in pixels."""
    max_aspect_ratio: float = pydantic.Field(math.inf, ge=1)
    """Longer images are refused: longer side / shorter side."""
    compute_hash: Literal["none", "md5", "sha256", "sha512"] = "sha256"
    """Hash of the downloaded bytes that is stored."""
    verify_hash_column: str = ""
    """Column with the hash that the downloaded bytes must have, of the kind `compute_hash`."""
    disallowed_header_directives: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    """Images whose `X-Robots-Tag` header holds one of these are not taken."""
    user_agent_token: str = ""
    """Name under which directives for one user agent apply, and that is sent to servers."""
    timeout_seconds: int = pydantic.Field(10, ge=1)
    """Of one download."""
    retries: int = pydantic.Field(0, ge=0)
    """Repetitions of one download, at once."""
    threads: int = pydantic.Field(64, ge=1)
    """Downloads at a time, per shard."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> IngestOptions:
        if self.image_format == "png" and self.quality > 9 and "quality" in self.model_fields_set:
            raise ConfigError("quality", self.quality, "0 to 9, the compression, with image_format=png")
        if self.verify_hash_column and self.compute_hash == "none":
            raise ConfigError("verify_hash_column", self.verify_hash_column, "a kind of hash in compute_hash", "Set compute_hash.")
        return self


@dataclass(frozen=True)
class ShardJob:
    """One shard to make or to mend."""

    shard: int
    feather: str
    """img2dataset's Arrow file with the shard's rows."""
    out: str
    columns: tuple[str, ...]
    """Columns of the Arrow file that are used, as img2dataset's reader lists them."""
    options: IngestOptions
    retry: bool = False
    """Only download again what failed."""


@dataclass
class ShardOutcome:
    """Counts of a shard, as img2dataset's `_stats.json` has them."""

    shard: int
    count: int
    successes: int
    failed_to_download: int
    failed_to_resize: int
    status: dict[str, int] = field(default_factory=dict)
    """Error message, or `success` → how often."""
    recovered: int = 0
    """Samples that a second pass added."""


def shard_path(out: str, shard: int, ending: str) -> str:
    """Where a file of a shard stands."""
    return storage.join(out, f"{shard:0{SHARD_DIGITS}d}{ending}")


def read_outcome(out: str, shard: int) -> ShardOutcome:
    """What `_stats.json` of a finished shard says. Raises `FileNotFoundError`."""
    stats = json.loads(storage.read_bytes(shard_path(out, shard, ENDINGS[-1])))
    return ShardOutcome(
        shard, stats["count"], stats["successes"], stats["failed_to_download"], stats["failed_to_resize"], stats["status_dict"]
    )


def run_shard(job: ShardJob) -> ShardOutcome:
    """Make the shard, or mend it. Raises `RuntimeError` where img2dataset lost rows; nothing of the shard is put in place then."""
    with _scratch(job) as scratch:
        made = scratch / "made"
        made.mkdir()
        if job.retry:
            recovered = _mend(job, made)
        else:
            recovered = 0
            _download(job, job.feather, str(made), None)
        _commit(job, made)
    outcome = read_outcome(job.out, job.shard)
    outcome.recovered = recovered
    if storage.exists(job.feather):
        storage.remove(job.feather)
    return outcome


def recover(out: str) -> None:
    """Finish the renames of shards that a killed call had ready, and remove what it had not."""
    temporary = os.path.join(storage.local_path(out), "_tmp")
    if not storage.is_local(out) or not os.path.isdir(temporary):
        return
    for entry in sorted(os.scandir(temporary), key=lambda entry: entry.name):
        if entry.is_dir() and entry.name.endswith(".ready"):
            try:
                _move_in(Path(entry.path), out, int(entry.name.partition(".")[0]))
            except OSError:
                continue  # what hinders the rename made the shard a fault; a later call finds it ready
        elif entry.is_dir():
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)
    if not os.listdir(temporary):
        os.rmdir(temporary)


class _scratch:  # noqa: N801 - used as a function
    """A local folder for one shard: inside `OUT/_tmp` if that is local, so that files can be renamed into place."""

    def __init__(self, job: ShardJob) -> None:
        self._local = storage.is_local(job.out)
        base = os.path.join(storage.local_path(job.out), "_tmp") if self._local else None
        if base:
            os.makedirs(base, exist_ok=True)
        self._path = Path(tempfile.mkdtemp(prefix=f"{job.shard}.", dir=base))

    def __enter__(self) -> Path:
        return self._path

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._path, ignore_errors=True)


def _download(job: ShardJob, feather: str, folder: str, rename: dict[str, str] | None) -> None:
    """Run img2dataset's downloader on one Arrow file; keys are replaced by `rename` if given."""
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer
    from img2dataset.writer import WebDatasetSampleWriter

    options = job.options
    resizer = Resizer(
        image_size=options.size, resize_mode=options.resize, resize_only_if_bigger=options.only_if_bigger,
        encode_quality=_encode_quality(options), encode_format=options.image_format, skip_reencode=options.skip_reencode,
        min_image_size=options.min_image_size, max_image_area=options.max_image_area, max_aspect_ratio=options.max_aspect_ratio,
    )  # fmt: skip
    Downloader(
        sample_writer_class=WebDatasetSampleWriter if rename is None else _renaming_writer(WebDatasetSampleWriter, rename),
        resizer=resizer, thread_count=options.threads, save_caption="caption" in job.columns, extract_exif=True, output_folder=folder,
        column_list=list(job.columns), timeout=options.timeout_seconds, number_sample_per_shard=options.samples_per_shard,
        oom_shard_count=SHARD_DIGITS, compute_hash=None if options.compute_hash == "none" else options.compute_hash,
        verify_hash_type=options.compute_hash if options.verify_hash_column else None, encode_format=options.image_format,
        retries=options.retries, user_agent_token=options.user_agent_token or None,
        disallowed_header_directives=list(options.disallowed_header_directives) or None,
    ).download_shard((job.shard, _copy(feather, folder)))  # fmt: skip
    with folders.open_input(feather) as stream:
        expected = pa.ipc.open_file(stream).read_all().num_rows
    found = pq.read_metadata(os.path.join(folder, f"{job.shard:0{SHARD_DIGITS}d}.parquet")).num_rows
    if found != expected:
        raise RuntimeError(f"img2dataset wrote {found} of {expected} rows of shard {job.shard}; its messages stand in the worker's log")


def _encode_quality(options: IngestOptions) -> int:
    return 6 if options.image_format == "png" and options.quality > 9 else options.quality


def _copy(feather: str, folder: str) -> str:
    """A copy, since img2dataset deletes its input when it is done, and a retry needs it."""
    path = os.path.join(folder, "rows.feather")
    Path(path).write_bytes(storage.read_bytes(feather))
    return path


def _renaming_writer(base: type[Any], rename: dict[str, str]) -> Callable[..., Any]:
    class Renaming(base):
        def write(self, img_str: bytes | None, key: str, caption: str | None, meta: dict[str, Any]) -> None:
            super().write(img_str, rename[key], caption, meta | {"key": rename[key]})

    return Renaming


def _mend(job: ShardJob, made: Path) -> int:
    """Download the shard's failed URLs again and write the shard with what came back; returns how many did."""
    name = f"{job.shard:0{SHARD_DIGITS}d}"
    for ending in ENDINGS:
        (made / f"{name}{ending}").write_bytes(storage.read_bytes(shard_path(job.out, job.shard, ending)))
    former = pq.read_table(made / f"{name}.parquet")
    width = math.ceil(math.log10(job.options.samples_per_shard))
    failed = sorted(row["key"] for row in former.select(["key", "status"]).to_pylist() if row["status"] == "failed_to_download")
    if not failed:
        return 0
    with folders.open_input(job.feather) as stream:
        rows = pa.ipc.open_file(stream).read_all()
    again = made / "again"
    again.mkdir()
    feather = str(again / "failed.feather")
    chosen = rows.take([int(key[-width:]) for key in failed])
    with pa.ipc.new_file(feather, chosen.schema) as writer:
        writer.write_table(chosen)
    first = job.shard * 10**width
    _download(job, feather, str(again), {f"{first + index:0{width + SHARD_DIGITS}d}": key for index, key in enumerate(failed)})
    fresh = pq.read_table(again / f"{name}.parquet")
    _append_samples(made / f"{name}.tar", again / f"{name}.tar")
    kept = [status != "failed_to_download" for status in former["status"].to_pylist()]
    merged = pa.concat_tables([former.filter(pa.array(kept)), fresh.select(former.column_names)], promote_options="permissive")
    pq.write_table(merged, made / f"{name}.parquet")
    _write_stats(made / f"{name}_stats.json", again / f"{name}_stats.json", merged)
    shutil.rmtree(again)
    return fresh["status"].to_pylist().count("success")


def _append_samples(target: Path, source: Path) -> None:
    """Append the members of one tar to another, except those that stand there already."""
    with tarfile.open(target, "a") as tar, tarfile.open(source) as added:
        present = set(tar.getnames())
        for member in added:
            if member.name not in present:
                tar.addfile(member, added.extractfile(member))


def _write_stats(path: Path, added: Path, rows: pa.Table) -> None:
    former, later = json.loads(path.read_text()), json.loads(added.read_text())
    status = Counter(rows["status"].to_pylist())
    messages = zip(rows["status"].to_pylist(), rows["error_message"].to_pylist(), strict=True)
    stats = {
        "count": rows.num_rows,
        "successes": status["success"],
        "failed_to_download": status["failed_to_download"],
        "failed_to_resize": status["failed_to_resize"],
        "duration": former["duration"] + later["duration"],
        "start_time": former["start_time"],
        "end_time": later["end_time"],
        "status_dict": dict(Counter("success" if kind == "success" else message for kind, message in messages)),
    }
    path.write_text(json.dumps(stats, indent=4))


def _commit(job: ShardJob, made: Path) -> None:
    for leftover in set(os.listdir(made)) - {f"{job.shard:0{SHARD_DIGITS}d}{ending}" for ending in ENDINGS}:
        (made / leftover).unlink()
    storage.sync_files(str(made))
    if not storage.is_local(job.out):
        for ending in ENDINGS:
            target = shard_path(job.out, job.shard, ending)
            storage.upload(str(made / target.rpartition("/")[2]), target)
        return
    ready = made.parent.parent / f"{job.shard}.ready"
    shutil.rmtree(ready, ignore_errors=True)
    # From here on a killed call is finished by `recover`, so an old tar never stands beside a new Parquet.
    made.rename(ready)
    _move_in(ready, job.out, job.shard)


def _move_in(ready: Path, out: str, shard: int) -> None:
    for ending in ENDINGS:
        target = Path(storage.local_path(shard_path(out, shard, ending)))
        if (ready / target.name).exists():
            os.replace(ready / target.name, target)
    storage.sync_files(str(ready))
    ready.rmdir()


def finished_shards(out: str) -> Iterator[int]:
    """Numbers of the shards that are done."""
    for url in folders.list_files(out, ENDINGS[-1]):
        digits = url.rpartition("/")[2].removesuffix(ENDINGS[-1])
        if digits.isdigit():
            yield int(digits)
