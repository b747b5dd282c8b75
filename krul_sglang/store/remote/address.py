"""Where the remote tier is: the value of ``--krul-remote``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit, urlunsplit

TTL_SECONDS = 7 * 86400
"""How long the server keeps what nobody stores or reads again, where the URL does not say."""

_SCHEMES = {"redis": "redis", "rediss": "rediss", "unix": "unix"} | {
    "valkey": "redis",
    "valkeys": "rediss",
}
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_EXPECTED = (
    "redis://[USER:PASSWORD@]HOST[:PORT][/DATABASE], rediss:// for TLS or unix:///SOCKET "
    "(valkey:// and valkeys:// mean the same), and ?ttl=7d if need be"
)


@dataclass(frozen=True)
class Address:
    """url: as the client takes it. ttl: seconds. shown: without the password."""

    url: str
    ttl: int
    shown: str


def parse_address(text: str) -> Address:
    """The address in a URL. Raises ValueError that says what is accepted."""
    try:
        parts = urlsplit(text.strip())
        port = parts.port
    except ValueError:
        raise ValueError(_EXPECTED) from None
    scheme = _SCHEMES.get(parts.scheme)
    path = parts.path.strip("/")
    if scheme is None or parts.fragment or port == 0:
        raise ValueError(_EXPECTED)
    if scheme == "unix" and (parts.netloc or not path):
        raise ValueError(_EXPECTED)
    if scheme != "unix" and (not parts.hostname or not re.fullmatch("[0-9]{0,4}", path)):
        raise ValueError(_EXPECTED)
    ttl = _ttl(parts.query)
    whole = urlunsplit((scheme, parts.netloc, parts.path, "", ""))
    if scheme == "unix":
        whole = f"unix://{parts.path}"  # urlunsplit leaves out what it takes for empty
    return Address(whole, ttl, without_password(whole))


def _ttl(query: str) -> int:
    if not query:
        return TTL_SECONDS
    options = parse_qs(query, keep_blank_values=True)
    found = re.fullmatch("([0-9]{1,9})([smhd]?)", options.pop("ttl", [""])[0])
    if options or found is None or int(found[1]) == 0:
        raise ValueError(_EXPECTED)
    return int(found[1]) * _UNITS[found[2]]


def without_password(text: str) -> str:
    """The text with what stands between ``//`` and ``@`` left out: it may hold a password."""
    return re.sub(r"//[^/]*@", "//***@", text)
