"""SQL over the manifest: which samples a condition keeps. Pixels are never rewritten; the result is rows for a keep-list.

DuckDB reads the manifest's Parquet in streams, so memory does not grow with the data. The condition is parsed as one
expression, on a connection without access to files, network or settings: it can only look at the samples.
"""

from __future__ import annotations

import difflib
import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from diptych.config import ConfigError
from diptych.datasets.manifest import Manifest

if TYPE_CHECKING:
    import duckdb

    from diptych.datasets.embeddings import EmbeddingJoin

COLUMNS: dict[str, str] = {
    "shard": "name of the tar",
    "key": "key of the sample",
    "caption": "text; NULL if there is none",
    "width": "pixels; NULL if unknown",
    "height": "pixels; NULL if unknown",
    "aspect": "width / height",
    "caption_length": "characters of the caption; 0 if there is none",
    "word_count": "words of the caption; 0 if there is none",
    "members": "extensions of the sample's files, as a list: list_contains(members, 'jpg')",
    "bytes": "size of all members",
    "meta": "the sample's JSON: meta->>'$.url'",
    "row": "row of the manifest",
}
"""Columns of every manifest. Fields of the samples' JSON are columns too, and `similarity` if embeddings are given."""

_META_ROWS = 2000
_MOST_FIELDS = 200
_SIMILARITY_ROWS = 1 << 16
_TYPES = {bool: "BOOLEAN", int: "BIGINT", float: "DOUBLE", str: "VARCHAR"}


def filter_rows(manifest: Manifest, where: str, similarity: np.ndarray | None = None) -> np.ndarray:
    """int64, sorted: the manifest rows for which the SQL condition `where` is true.

    `similarity` is float32 [N] with NaN where unknown (`similarities` makes it). Raises `ConfigError` for a condition that is
    not SQL, or names a column that there is not.
    """
    fields = {} if not manifest.samples else meta_fields(manifest)
    names = [*COLUMNS, *fields] + ["similarity"] * (similarity is not None)
    if not where.strip():
        raise ConfigError("--where", where, 'a condition such as "width >= 256 AND caption IS NOT NULL"', f"Columns: {', '.join(names)}.")
    if not manifest.samples:
        return np.empty(0, np.int64)
    import duckdb

    connection = duckdb.connect()
    try:
        view = _view(connection, manifest, fields, similarity)
        found = view.filter(f"(\n{where}\n)").project("row").fetchnumpy()["row"]
    except duckdb.Error as error:
        raise _explain(where, error, names) from None
    finally:
        connection.close()
    return np.sort(np.asarray(found, np.int64))


def _view(
    connection: duckdb.DuckDBPyConnection, manifest: Manifest, fields: dict[str, str], similarity: np.ndarray | None
) -> duckdb.DuckDBPyRelation:
    import pyarrow as pa

    path = manifest.samples_path.replace("'", "''")
    connection.execute("CREATE TABLE shard_names (number INTEGER, name VARCHAR)")
    connection.register("given_names", pa.table({"number": range(len(manifest.shard_names)), "name": manifest.shard_names}))
    connection.execute("INSERT INTO shard_names SELECT * FROM given_names")
    connection.unregister("given_names")
    extra = "".join(
        f", TRY_CAST(json_extract_string(TRY_CAST(s.meta AS JSON), {_path(name)}) AS {kind}) AS {_quoted(name)}"
        for name, kind in fields.items()
    )
    join = ""
    if similarity is not None:
        connection.register("similarities", pa.table({"number": np.arange(len(similarity)), "value": similarity}))
        extra += ", CASE WHEN isnan(e.value) THEN NULL ELSE e.value END AS similarity"
        join = " JOIN similarities e ON e.number = s.file_row_number"
    connection.execute(f"SET allowed_paths=['{path}']")
    for setting in ("enable_external_access=false", "autoinstall_known_extensions=false", "lock_configuration=true"):
        connection.execute(f"SET {setting}")
    return connection.sql(
        "SELECT n.name AS shard, s.key, s.caption, s.width, s.height, s.width / s.height AS aspect, "
        "coalesce(length(s.caption), 0) AS caption_length, "
        "CASE WHEN trim(coalesce(s.caption, '')) = '' THEN 0 ELSE len(regexp_split_to_array(trim(s.caption), '\\s+')) END AS word_count, "
        "list_transform(s.members, lambda m: m.ext) AS members, list_sum(list_transform(s.members, lambda m: m.size)) AS bytes, "
        f"TRY_CAST(s.meta AS JSON) AS meta, s.file_row_number AS row{extra} "
        f"FROM read_parquet('{path}', file_row_number=true) s JOIN shard_names n ON n.number = s.shard{join}"
    )


def meta_fields(manifest: Manifest) -> dict[str, str]:
    """Fields of the samples' JSON that may be used as columns → SQL type, from rows spread over the data."""
    rows = np.unique(np.linspace(0, manifest.samples - 1, min(manifest.samples, _META_ROWS)).astype(np.int64))
    # Whole row groups are decompressed for `meta`, so few shards are looked at.
    shards = manifest.shard_of(rows)
    rows = rows[np.isin(shards, np.unique(shards)[:: max(1, len(np.unique(shards)) // 8)])]
    kinds: dict[str, set[type]] = {}
    for text in manifest.rows(rows, ["meta"])["meta"].to_pylist():
        try:
            fields = json.loads(text or "{}")
        except ValueError:
            continue
        for name, value in fields.items() if isinstance(fields, dict) else ():
            if value is not None:
                kinds.setdefault(name, set()).add(type(value))
            else:
                kinds.setdefault(name, set())
    # SQL does not tell apart names by case: the manifest's own columns come first, then the first of two fields.
    taken = {*COLUMNS, "similarity"}
    chosen: dict[str, str] = {}
    for name, found in kinds.items():
        if name and "\0" not in name and name.lower() not in taken and len(chosen) < _MOST_FIELDS:
            taken.add(name.lower())
            chosen[name] = _sql_type(found)
    return chosen


def similarities(join: EmbeddingJoin, samples: int) -> np.ndarray:
    """float32 [N]: cosine of each sample's image and text embedding; NaN where one is missing, zero or not finite."""
    found = np.full(samples, np.nan, np.float32)
    for start in range(0, samples, _SIMILARITY_ROWS):
        rows = np.arange(start, min(start + _SIMILARITY_ROWS, samples))
        image, bad_image = join.read(rows, "image")
        text, bad_text = join.read(rows, "text")
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            norms = np.linalg.norm(image, axis=1) * np.linalg.norm(text, axis=1)
            values = (image * text).sum(axis=1) / norms
        values[[index for index, _, _ in (*bad_image, *bad_text)]] = np.nan
        found[rows] = values
    return found


def _sql_type(found: set[type]) -> str:
    if found <= {int, float} and found:
        return "DOUBLE" if float in found else "BIGINT"
    return _TYPES.get(next(iter(found)), "VARCHAR") if len(found) == 1 else "VARCHAR"


def _path(name: str) -> str:
    return "'$.\"" + name.replace("'", "''").replace('"', '\\"') + "\"'"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _explain(where: str, error: Any, names: list[str]) -> ConfigError:
    message = str(error).split("\n")[0]
    unknown = re.search(r'Referenced column "([^"]*)" not found', str(error))
    if unknown:
        near = difflib.get_close_matches(unknown.group(1).lower(), names, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]}? " if near else ""
        return ConfigError("--where", unknown.group(1), f"the columns {', '.join(names)}", f"{hint}Texts stand in single quotes.")
    return ConfigError("--where", where, f"an SQL condition over the columns {', '.join(names)}", message)
