"""What may be stored, logged or shown: URLs without user, password and signed queries. Credentials come from the environment."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

_SECRET = re.compile(
    r"(^|[_-])(auth|access)?tokens?($|[_-])|secret|passw|credential|signature|^sig$|(^|[_-])(api)?key($|[_-])|^x-amz-|^x-goog-|^awsaccesskey",
    re.IGNORECASE,
)


def is_secret_name(name: str) -> bool:
    """Whether a variable or a query's parameter of this name holds a secret, as far as names tell."""
    return bool(_SECRET.search(name))


def without_credentials(url: str) -> str:
    """`url` without user and password, and without its query if that is signed; other text is unchanged."""
    parts = urlsplit(url) if "://" in url else None
    if parts is None or not parts.scheme or not parts.netloc:
        return url
    signed = any(is_secret_name(name) for name, _ in parse_qsl(parts.query, keep_blank_values=True))
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "" if signed else parts.query, parts.fragment))


def clean_text(text: str) -> str:
    """`text`, such as an error's message, with every URL in it shown so."""
    return re.sub(r"[\w+.-]+://[^\s'\"<>]+", lambda found: without_credentials(found[0]), text)


def without_secrets(value: Any) -> Any:
    """The same for every text in nested mappings and lists."""
    if isinstance(value, dict):
        return {key: without_secrets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    return without_credentials(value) if isinstance(value, str) else value
