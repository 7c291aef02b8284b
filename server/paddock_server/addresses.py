"""Addresses as they may be shown."""

from __future__ import annotations

from urllib.parse import urlsplit, urlunsplit


def without_credentials(url: str) -> str:
    """Return an address without a user, a password, a query and a fragment in it; also of what is none."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "not an address"
    if not parts.netloc:  # a slash or the scheme is missing, so that what is a user cannot be told
        return url.rpartition("@")[2].partition("?")[0].partition("#")[0]
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))
