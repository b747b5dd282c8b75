"""URLs of the remote tier."""

from __future__ import annotations

import pytest

from krul_sglang.store.remote.address import TTL_SECONDS, parse_address


@pytest.mark.parametrize(
    ("text", "url", "ttl"),
    [
        ("redis://h", "redis://h", TTL_SECONDS),
        (" redis://h:1234/3 ", "redis://h:1234/3", TTL_SECONDS),
        ("valkey://h?ttl=90", "redis://h", 90),
        ("valkeys://u:p@h:1/0?ttl=12h", "rediss://u:p@h:1/0", 12 * 3600),
        ("rediss://[::1]:6379?ttl=2d", "rediss://[::1]:6379", 2 * 86400),
        ("unix:///run/r.sock", "unix:///run/r.sock", TTL_SECONDS),
    ],
)
def test_urls(text, url, ttl) -> None:
    address = parse_address(text)
    assert (address.url, address.ttl) == (url, ttl)


@pytest.mark.parametrize(
    "text",
    [
        "", "h:6379", "http://h", "redis://", "redis:///0", "redis://h:port", "redis://h:99999",
        "redis://h:0", "redis://h/zero", "redis://h#x", "redis://h?ttl=", "redis://h?ttl=0",
        "redis://h?ttl=1w", "redis://h?timeout=3", "unix://", "unix://h/run/r.sock",
    ],
)  # fmt: skip
def test_what_is_no_url(text) -> None:
    with pytest.raises(ValueError, match=r"^redis://\[USER:PASSWORD@\]HOST"):
        parse_address(text)


@pytest.mark.parametrize("password", ["secret", "sec:r@t", "%2Fsecret"])
def test_passwords_are_not_shown(password) -> None:
    address = parse_address(f"redis://user:{password}@h:1/0")
    assert address.shown == "redis://***@h:1/0"
    assert password in address.url
