"""Domain names: one spelling for each, so that comparing is equality."""

from __future__ import annotations

import ipaddress
import re

import idna

_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")


def canonical(domain: str) -> str:
    """Return domain as A-labels in lower case, one trailing dot dropped.

    Raises ValueError, saying why, for what is no name of a host: an IP literal, a wildcard, an empty or overlong label. RFC 1123 §2.1,
    RFC 5891; underscores are let pass because clients send them.
    """
    text = domain.removesuffix(".")
    if not text:
        raise ValueError("is empty")
    if not text.isascii():
        try:
            text = idna.encode(text, uts46=True).decode("ascii")
        except idna.IDNAError as err:
            raise ValueError(f"is no internationalised name: {err}") from err
    text = text.lower()
    if _is_address(text):
        raise ValueError("is an IP address, not a name")
    if len(text) > 253:
        raise ValueError("is longer than 253 characters")
    for label in text.split("."):
        if not _LABEL.fullmatch(label):
            raise ValueError(f"has a label that is none: {label!r}")
        if label.startswith("xn--"):
            try:
                idna.decode(label)
            except (idna.IDNAError, UnicodeError) as err:
                raise ValueError(f"has a label that is no A-label: {label!r}") from err
    return text


def pattern(text: str) -> tuple[str, bool]:
    """Read a domain of a policy: (canonical name, False), or (name under the wildcard, True) for "*.name".

    Raises ValueError where canonical does, or where a wildcard is not the whole first label.
    """
    wildcard = text.startswith("*.")
    name = text[2:] if wildcard else text
    if "*" in name:
        raise ValueError("has a wildcard that is not its whole first label")
    return canonical(name), wildcard


def _is_address(text: str) -> bool:
    """Also what some resolvers take for an IPv4 address: a last label that is a number (WHATWG URL §3.6)."""
    if _NUMBER.fullmatch(text.rpartition(".")[2]):
        return True
    try:
        ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return False
    return True
