"""``krul inspect``: asks a running server and shows what it answers."""

from __future__ import annotations

import json as json_format
import re
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

PATIENCE = 60.0
"""Seconds that a server may take: it answers between two steps of its model."""


def run(
    url: str,
    name: str | None,
    *,
    detail: bool,
    json: bool,
    png: Path | None,
    limit: int,
    api_key: str | None,
) -> None:
    """Raises OSError and ValueError, each with a line for the user."""
    if png is not None:
        from krul_sglang.inspection.picture import require_matplotlib

        require_matplotlib()
    if name is not None and not re.fullmatch("[0-9a-f]{1,12}", name):
        raise ValueError(f"{name}: no conversation's id; `krul inspect` lists them")
    server = Server(url, api_key)
    if name is None:
        body = server.get(f"/krul/conversations?limit={limit}", "conversations", "total")
        name = _newest(body) if detail or png else None
    if name is not None:
        body = server.get(f"/krul/conversations/{name}", "segments", "layers")
    if png is not None:
        from krul_sglang.inspection.picture import draw

        draw(body, png)
    if json:
        print(json_format.dumps(body))
    else:
        _show(body, detail)


def _newest(body: dict[str, Any]) -> str:
    """The id of the newest conversation of which something is stored, else of the newest."""
    listed = body["conversations"]
    if not listed:
        raise ValueError("the server holds no conversation yet")
    return next((one for one in listed if one["stored_tokens"]), listed[0])["id"]


def _show(body: dict[str, Any], detail: bool) -> None:
    from krul_sglang.inspection import show

    out = show.console()
    if "conversations" in body:
        show.conversations(out, body)
        return
    show.conversation(out, body)
    if detail:
        show.layers(out, body)


class Server:
    """A server's HTTP address. Every failure is one line that names it and what to do."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        try:
            parts = urlsplit(self.url)
            known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            known = False
        if not known:
            raise ValueError(f"--url {url}: not an address such as http://127.0.0.1:30000")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def get(self, path: str, *names: str) -> dict[str, Any]:
        """The JSON object at ``path``, which has these ``names``. Raises OSError or ValueError."""
        request = Request(self.url + path, headers=self._headers)
        try:
            with urlopen(request, timeout=PATIENCE) as answer:
                body = json_format.load(answer)
            if not isinstance(body, dict) or not body.keys() >= set(names):
                raise ValueError
            return body
        except HTTPError as error:
            raise ValueError(self._refusal(error)) from None
        except TimeoutError:
            raise OSError(f"{self.url} did not answer within {PATIENCE:.0f} s") from None
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise OSError(f"{self.url} cannot be reached ({reason}); is it up?") from None
        except (HTTPException, ValueError):
            raise ValueError(f"{self.url} answers, but not as SGLang does") from None

    def _refusal(self, error: HTTPError) -> str:
        if error.code in (401, 403):
            return f"{self.url} wants a key: give it with --api-key"
        try:
            said = json_format.load(error)["error"]
        except (ValueError, KeyError, TypeError, OSError):
            said = None
        if isinstance(said, str):
            return said
        if error.code == 404:
            return f"{self.url} runs without Krul; start it with --enable-krul"
        return f"{self.url} answers with status {error.code}"
