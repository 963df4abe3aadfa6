"""Named sets: where the list of URLs comes from, its columns, and what to expect. Shown by `diptych ingest --list-sets`.

Sizes, times and columns are those of img2dataset's `dataset_examples`, measured by its authors on a machine of 16 cores and 2 Gbit/s
unless said otherwise; links die, so a later call finds fewer images.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class NamedSet:
    """One set."""

    samples: str
    """How many pairs of image and caption."""
    source: str
    """Where the list comes from."""
    prepare: str
    """Commands that make the list; the file that `diptych ingest` is then given is `urls`."""
    urls: str
    expect: str
    """Time and size of the result."""
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of `IngestOptions`."""
    note: str = ""

    def command(self, name: str) -> str:
        """The call of `diptych ingest`; for DiffusionDB, which has no URLs of images, of `diptych pack`."""
        if not self.options:
            return f"diptych pack {self.urls} shards/{name}"
        flags = []
        for key, value in self.options.items():
            text = ",".join(value) if isinstance(value, tuple) else str(value)
            flags.append(f"--{key.replace('_', '-')}" + ("" if value is True else f" {text}"))
        return f"diptych ingest {self.urls} shards/{name} {' '.join(flags)}"


SETS: dict[str, NamedSet] = {
    "mscoco": NamedSet(
        "600 thousand",
        "https://huggingface.co/datasets/ChristophSchuhmann/MS_COCO_2017_URL_TEXT",
        "wget https://huggingface.co/datasets/ChristophSchuhmann/MS_COCO_2017_URL_TEXT/resolve/main/mscoco.parquet",
        "mscoco.parquet",
        "10 minutes at 800 images/s, 20 GB",
        {"url_column": "URL", "caption_column": "TEXT", "size": 256, "threads": 64},
    ),
    "sbucaptions": NamedSet(
        "860 thousand",
        "https://www.cs.rice.edu/~vo9/sbucaptions/",
        "wget https://www.cs.rice.edu/~vo9/sbucaptions/sbu-captions-all.tar.gz && tar -xzf sbu-captions-all.tar.gz",
        "sbu-captions-all.json",
        "no published figures; about 15 minutes at 1,000 images/s",
        {"url_column": "image_urls", "caption_column": "captions", "size": 256, "threads": 64},
    ),
    "cc3m": NamedSet(
        "3 million",
        "https://ai.google.com/research/ConceptualCaptions/download",
        "sed -i '1s/^/caption\\turl\\n/' cc3m.tsv",
        "cc3m.tsv",
        "1 hour at 850 images/s",
        {"url_column": "url", "caption_column": "caption", "size": 256, "threads": 64},
        "The download (a form) has no header; the command adds one.",
    ),
    "laion400m": NamedSet(
        "400 million",
        "https://laion.ai/laion-400-open-dataset/",
        "wget -l1 -r --no-parent https://the-eye.eu/public/AI/cah/laion400m-met-release/laion400m-meta/",
        "the-eye.eu/public/AI/cah/laion400m-met-release/laion400m-meta",
        "3.5 days at 1,300 images/s, 10 TB",
        {
            "url_column": "URL",
            "caption_column": "TEXT",
            "save_columns": ("NSFW", "similarity", "LICENSE"),
            "size": 256,
            "threads": 128,
        },
        "With systemd-resolved take 64 threads, or its DNS stops.",
    ),
    "laion5b": NamedSet(
        "5.86 billion, in three parts",
        "https://huggingface.co/datasets/laion/laion2B-en, …/laion2B-multi, …/laion1B-nolang",
        "hf download laion/laion2B-en --repo-type dataset --local-dir laion2B-en",
        "laion2B-en",
        "a week on 10 machines of 16 cores at 1,000 images/s each; 220 TB at 384, 50 TB at 256",
        {
            "url_column": "URL",
            "caption_column": "TEXT",
            "save_columns": ("NSFW", "similarity", "LICENSE"),
            "size": 384,
            "resize": "keep_ratio",
            "only_if_bigger": True,
            "skip_reencode": True,
            "threads": 64,
        },
        "Access is granted on request. One call per part.",
    ),
    "diffusiondb": NamedSet(
        "14 million pictures, 2 million in the usual part",
        "https://huggingface.co/datasets/poloclub/diffusiondb",
        "hf download poloclub/diffusiondb images/part-000001.zip --repo-type dataset --local-dir db && unzip db/images/part-000001.zip "
        "-d db/part-000001",
        "db",
        "1.6 TB for 2 million pictures of 512²",
        note="Pictures come in archives of 1,000 with their prompts, not as URLs: they are packed, not ingested.",
    ),
}
"""Name → set."""
