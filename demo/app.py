"""The web demo: `make demo`. Starts a real SGLang server with Krul, and a page in front of it.

The server's KV pool is small, so that a few other visitors are enough to evict a conversation.
With --server-url a running server is used instead. Ctrl-C ends both.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from urllib.parse import urlsplit

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
sys.path.insert(0, str(Path(__file__).resolve().parent))

MODEL = Path("models/SmolLM2-135M-Instruct")
PORT = 7860
START_SECONDS = 600
"""A busy machine takes minutes; a server that ends is noticed at once."""


class DemoError(RuntimeError):
    """What keeps the demo from starting: one line for whoever started it."""


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of the chat model")
    parser.add_argument("--profile", type=Path, help="its profile, by `krul calibrate`")
    parser.add_argument("--policy", default="predictive", help="--krul-policy of the server")
    parser.add_argument("--pool", type=int, default=2048, help="tokens the KV pool holds")
    parser.add_argument("--answer", type=int, default=96, help="tokens an answer may take")
    parser.add_argument("--server-url", help="use this running server instead of starting one")
    parser.add_argument("--api-key", help="of that server, if it wants one")
    parser.add_argument("--host", default="127.0.0.1", help="address the page listens on")
    parser.add_argument("--port", type=int, default=PORT, help="port the page listens on")
    chosen = parser.parse_args(arguments)
    if not chosen.pool >= 512:
        parser.error(f"--pool {chosen.pool}: at least 512 tokens, or no conversation fits")
    if not 1 <= chosen.answer <= chosen.pool // 4:
        parser.error(f"--answer {chosen.answer}: from 1 to a quarter of --pool")
    if not 1 <= chosen.port <= 65535:
        parser.error(f"--port {chosen.port}: from 1 to 65535")
    return chosen


def check_port(host: str, port: int) -> None:
    """Raise :class:`DemoError` where the page could not listen."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise DemoError(
                f"--port {port}: {error.strerror} on {host}; give another with --port"
            ) from None


def server_flags(chosen: argparse.Namespace, policy: str) -> list[str]:
    """Flags of a server for a policy; ``recompute`` is plain SGLang."""
    from krul_sglang.live_server import faster_cpu_dtype, has_gpu

    flags = ["--max-total-tokens", str(chosen.pool), "--enable-metrics", "--sleep-on-idle"]
    flags += ["--dtype", "auto" if has_gpu() else faster_cpu_dtype()]
    if policy != "recompute":
        flags += ["--enable-krul", "--krul-policy", policy]
        if policy == "predictive" and chosen.profile is not None:
            flags += ["--krul-profile", str(chosen.profile.resolve())]
    return flags


def started(chosen: argparse.Namespace, console, stack: ExitStack) -> str:
    """Start the demo's own server and have it watched; returns its address."""
    from web.own_server import OwnServer

    from krul_sglang.live_server import LiveServer, ServerFailedError
    from krul_sglang.profile.base import ProfileError
    from krul_sglang.profile.locate import ensure

    if not (chosen.model / "config.json").is_file():
        raise DemoError(f"--model {chosen.model}: no model there; `make model` prepares one")
    if chosen.policy == "predictive" and chosen.profile is None:
        try:
            ensure(chosen.model, 1, console.print)
        except ProfileError as error:
            raise DemoError(str(error)) from None
    server = LiveServer(
        chosen.model, server_flags(chosen, chosen.policy), ready_seconds=START_SECONDS
    )
    own = OwnServer(server, lambda text: console.print(text, highlight=False, markup=False))
    stack.callback(own.stop)
    # Seconds of imports that would else follow the server's start.
    threading.Thread(target=import_module, args=("web.layout",), daemon=True).start()
    with console.status("starting the server") as status:
        try:
            server.start(lambda s: status.update(f"starting the server, {s:.0f} s"))
        except ServerFailedError as error:
            raise DemoError(str(error)) from None
    own.watch()
    return server.url


def address(url: str) -> str:
    """An http address, completed. Raises :class:`DemoError`."""
    full = (url if "://" in url else f"http://{url}").rstrip("/")
    try:
        parts = urlsplit(full)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        known = False
    if not known:
        raise DemoError(f"--server-url {url}: not an address such as http://127.0.0.1:30000")
    return full


def run(chosen: argparse.Namespace) -> None:
    """Serve until interrupted. Raises :class:`DemoError`."""
    from rich.console import Console

    console = Console()
    check_port(chosen.host, chosen.port)
    beside = chosen.model.with_suffix(".krul.safetensors")  # where `make profile` puts it
    if chosen.profile is None and beside.is_file():
        chosen.profile = beside
    with ExitStack() as stack:
        url = (
            address(chosen.server_url)
            if chosen.server_url
            else started(chosen, console, stack)
        )  # fmt: skip
        from web.client import Client
        from web.compare import Comparison
        from web.layout import HEAD, STYLE, build, theme
        from web.observer import Observer
        from web.page import Page

        client = Client(url, chosen.api_key)
        observer = stack.enter_context(Observer(client))
        comparison = Comparison(chosen.model, lambda policy: server_flags(chosen, policy))
        stack.callback(comparison.stop)
        observer.look()
        app = build(Page(client, observer, chosen.answer), comparison)
        app.launch(
            server_name=chosen.host,
            server_port=chosen.port,
            theme=theme(),
            css_paths=STYLE,
            head=HEAD,
            footer_links=[],
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
        )
        stack.callback(app.close, verbose=False)
        console.print(f"server: {url}", highlight=False)
        page = f"http://{chosen.host}:{chosen.port}"
        console.print(f"The demo is at [bold]{page}[/]; Ctrl-C ends it.")
        threading.Event().wait()


def main() -> int:
    """Returns the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it stops its server as Ctrl-C does
    try:
        run(options())
    except DemoError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nended")
    return 0


if __name__ == "__main__":
    sys.exit(main())
