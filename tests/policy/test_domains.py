"""domains: one spelling for each name, and what is none."""

from __future__ import annotations

import pytest

from pellucid_policy.domains import canonical, pattern


@pytest.mark.parametrize(("text", "name"), [
    ("example.com", "example.com"), ("EXAMPLE.Com", "example.com"), ("example.com.", "example.com"), ("localhost", "localhost"),
    ("bücher.example", "xn--bcher-kva.example"), ("BÜCHER.example", "xn--bcher-kva.example"),
    ("xn--bcher-kva.example", "xn--bcher-kva.example"),
    ("faß.example", "xn--fa-hia.example"), ("例え.example", "xn--r8jz45g.example"), ("a_b.example", "a_b.example"),
    ("1.example", "1.example"), ("a" * 63 + ".example", "a" * 63 + ".example"), ("例え。example", "xn--r8jz45g.example"),
])  # fmt: skip
def test_a_name_has_one_spelling(text: str, name: str) -> None:
    assert canonical(text) == name


@pytest.mark.parametrize("text", [
    "", ".", "..", "a..b", ".example.com", "example.com..", "-a.example", "a-.example", "a b.example", "a/b", "a:443", "*.example.com", "*",
    "192.0.2.1", "192.0.2.1.", "1.2.3", "0x7f.1", "a.0x10", "2001:db8::1", "[2001:db8::1]", "::", "a" * 64 + ".example", "a." * 127 + "com",
    "xn--a.example", "xn--.example", "\u0000.example", "a\u200b\u0300\u05d0.example", "example.com\n", "١٢٧.0.0.1", "１２７.0.0.1",
])  # fmt: skip
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        canonical(text)


def test_a_wildcard_is_the_whole_first_label() -> None:
    assert pattern("*.Example.com.") == ("example.com", True)
    assert pattern("example.com") == ("example.com", False)
    for text in (
        "*",
        "*.",
        "a*.example.com",
        "*a.example.com",
        "a.*.example.com",
        "*.*.example.com",
        "**.example.com",
        "*.192.0.2.1",
    ):
        with pytest.raises(ValueError, match=r".+"):
            pattern(text)
