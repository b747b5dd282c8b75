"""What the chat programs share: a server, turns that are timed, idle gaps, and the table.

A program is a `sglang.lang` function and knows nothing of Krul. :func:`main` gives it a server
(``--url``, or one of its own whose KV pool holds about one conversation), runs it, and asks
afterwards what the turns that were restored would have cost: the same prompt once more, under a
fresh `cache_salt`, so that the server finds nothing and computes all of it.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
import sglang as sgl
from endpoint import Endpoint, ProgramError
from outcome import report, show
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from sglang.lang.chat_template import ChatTemplate, get_chat_template_by_model_path
from sglang.lang.chat_template import chat_template_registry as templates
from sglang.lang.global_config import global_config

from krul_sglang.live_server import LiveServer, ServerFailedError, faster_cpu_dtype, has_gpu
from krul_sglang.profile.base import ProfileError
from krul_sglang.profile.locate import ensure

MODEL = Path(__file__).resolve().parents[2] / "models" / "SmolLM2-135M-Instruct"


class Session:
    """What a program is given besides its own arguments."""

    def __init__(self, args: argparse.Namespace, url: str, out: Console) -> None:
        self.args = args
        self.url = url
        self._out = out
        self._others = random.Random()  # what they say is new each time: nothing of it returns
        self._stopped = threading.Event()
        info = self._get("/server_info")
        if not info.get("internal_states"):
            raise ProgramError(f"--url {url}: answers, but not as SGLang does")
        if "krul" not in info["internal_states"][0]:
            raise ProgramError(f"{url} runs without Krul; start it with --enable-krul")
        self.pool = int(info["max_total_num_tokens"])
        self.longest = int(info["max_req_input_len"])
        self.endpoint = Endpoint(url, self._template())
        sgl.set_default_backend(self.endpoint)

    # ---- asking the server -----------------------------------------------------

    def _get(self, path: str) -> dict[str, Any]:
        try:
            answer = requests.get(self.url + path, timeout=60)
            answer.raise_for_status()
            return answer.json()
        except (requests.RequestException, ValueError) as error:
            raise ProgramError(f"--url {self.url}: {_reason(error)}; is an SGLang up?") from None

    def krul(self) -> dict[str, Any]:
        """The `krul` block of /server_info, of the first replica."""
        return self._get("/server_info")["internal_states"][0]["krul"]

    def _template(self) -> ChatTemplate:
        """The one asked for; else as the frontend language picks it, by the model's path; where
        it knows none, ChatML if the model has a token for it."""
        named = self.args.chat_template
        if named is not None:
            if named not in templates:
                known = ", ".join(sorted(templates))
                raise ProgramError(f"--chat-template {named}: unknown; one of {known}")
            return templates[named]
        path = self._get("/model_info")["model_path"]
        found = get_chat_template_by_model_path(path)
        if found.name != "default":
            return found
        body = {"model": path, "prompt": "<|im_start|>", "add_special_tokens": False}
        answer = requests.post(f"{self.url}/tokenize", json=body, timeout=60)
        if answer.status_code == 200 and answer.json()["count"] == 1:
            return templates["chatml"]
        raise ProgramError(f"no chat template is known for {path}; give --chat-template NAME")

    # ---- the time between two turns ----------------------------------------------

    def stop(self, *_: object) -> None:
        """Ctrl-C: conversations in threads of their own end before their next turn."""
        self.endpoint.error = self.endpoint.error or ProgramError("interrupted")
        self._stopped.set()
        raise KeyboardInterrupt

    def think(self, seconds: float) -> None:
        """The user thinks for so long."""
        self._stopped.wait(seconds)

    def wait(self, state: Any) -> None:
        """Until a program's (or a branch's) answer is there. Raises what kept it from coming."""
        state.sync()
        if self.endpoint.error is not None:
            raise self.endpoint.error

    def away(self, state: Any) -> None:
        """The user reads the answer and goes away, and others use the server: enough of them to
        fill its KV pool, so that what was on the device no longer is. Returns when all that is
        stored is encoded."""
        self.wait(state)
        sent, most = 0, min(1024, self.pool // 2, self.longest - 8)
        with self._progress("others use the server") as advance:
            while sent < self.pool:
                ids = [self._others.randrange(1000, 30000) for _ in range(most)]
                body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 1}}
                answer = requests.post(f"{self.url}/generate", json=body, timeout=1200)
                if answer.status_code != 200:
                    raise ProgramError(f"{self.url}: memory pressure failed: {answer.text[:200]}")
                sent += len(ids)
                advance(f"others use the server: {min(sent, self.pool)} of {self.pool} tokens")
        self.settle()

    def settle(self, patience: float = 60) -> None:
        """Wait until the encoder has nothing left to do: it would share the cores."""
        until = time.monotonic() + patience
        while time.monotonic() < until:
            state = self.krul()
            if state["sealed_segments"] >= state["segments"]:
                return
            time.sleep(0.1)

    @contextmanager
    def _progress(self, what: str) -> Iterator[Callable[[str], None]]:
        with progress_line(self._out, what) as update:
            yield update

    # ---- without Krul ------------------------------------------------------------

    def recompute(self) -> None:
        """What each restored turn costs when its whole prompt is computed, one after the other."""
        hits = [turn for turn in self.endpoint.turns if turn.returns]
        with self._progress("the same turns without Krul") as update:
            for done, turn in enumerate(hits):
                update(f"the same turns without Krul: {done + 1} of {len(hits)}")
                self.settle()
                # Its grammar, too: that may cost more than the prompt.
                sampling = {**turn.sampling, "max_new_tokens": 1}
                turn.without, _, _ = self.endpoint.ask(turn.text, sampling, fresh=True)

    def run_again(self, program: Callable[[Session], None]) -> None:
        """The whole program once more, as many users at once, with every prompt computed."""
        endpoint, first = self.endpoint, self.endpoint.turns
        endpoint.turns, endpoint.fresh, endpoint._asked = [], True, Counter()
        try:
            with self._progress("the same users without Krul"):
                program(self)
        finally:
            again = {(t.conversation, t.number): t.ttft for t in endpoint.turns}
            endpoint.turns, endpoint.fresh = first, False
        for turn in first:
            if turn.returns:
                turn.without = again.get((turn.conversation, turn.number))


@contextmanager
def progress_line(out: Console, what: str) -> Iterator[Callable[[str], None]]:
    """One line that says what is being done, on a terminal; yields how to change it."""
    if not out.is_terminal:
        yield lambda text: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=out, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda text: progress.update(task, description=text)


def _reason(error: Exception) -> str:
    inner = getattr(error, "args", [None])[0]
    return str(getattr(inner, "reason", inner)).split(": ")[-1]


# ---- the command line --------------------------------------------------------------


def options(about: str, answer: int, pool: int) -> argparse.ArgumentParser:
    """The options that all programs have. pool: tokens of an own server's KV pool."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="a running server with --enable-krul; else one is started")
    parser.add_argument("--model", type=Path, default=MODEL, help="for a server of its own")
    parser.add_argument("--policy", default="predictive", help="--krul-policy of that server")
    parser.add_argument("--pool", type=int, default=pool, help="tokens its KV pool holds")
    parser.add_argument("--chat-template", help="by default chosen by the model")
    parser.add_argument("--answer", type=int, default=answer, help="tokens an answer may take")
    parser.add_argument("--turns", type=int, help="at most so many turns a conversation")
    parser.add_argument("--no-compare", action="store_true", help="do not ask what it saves")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    return parser


@contextmanager
def _server(args: argparse.Namespace, out: Console) -> Iterator[str]:
    """The address of the server to use; one of our own is stopped at the end."""
    if args.url is not None:
        url = args.url if "://" in args.url else f"http://{args.url}"
        yield url.rstrip("/")
        return
    if not (args.model / "config.json").is_file():
        raise ProgramError(f"--model {args.model}: no model there; run `make model`")
    profile = []
    if args.policy == "predictive":
        beside = args.model.with_name(f"{args.model.name}.krul.safetensors")
        found = beside if beside.is_file() else ensure(args.model, 1, out.print)
        profile = ["--krul-profile", str(found)]
    dtype = "auto" if has_gpu() else faster_cpu_dtype()
    flags = ["--enable-krul", "--krul-policy", args.policy, "--dtype", dtype, *profile]
    # One prefill a prompt, as the pool holds little more than one.
    flags += ["--max-total-tokens", str(args.pool), "--sleep-on-idle"]
    with progress_line(out, "starting the server"):
        server = LiveServer(args.model, flags, ready_seconds=600).start()
    try:
        yield server.url
    finally:
        server.stop()


def main(
    parser: argparse.ArgumentParser,
    program: Callable[[Session], None],
    *,
    together: bool = False,
) -> None:
    """Run ``program`` and print what it cost; ends the process, with code 0, 1 or 2.

    together: its conversations run side by side, so that what they cost without Krul is only
    seen with all of them running.
    """
    args = parser.parse_args()
    out = Console(stderr=args.json, highlight=False)
    if not out.is_terminal:
        out.width = 100
    # A worker's traceback, beside the line that says the same.
    warnings.filterwarnings("ignore", message="Error in stream_executor")
    # It would run the program once more, without a server.
    global_config.enable_precache_with_tracing = False
    title = Path(sys.argv[0]).stem
    try:
        for name in ("pool", "answer", "turns"):
            value = getattr(args, name)
            if value is not None and value < 1:
                raise ProgramError(f"--{name} {value}: at least 1")
        with _server(args, out) as url:
            session = Session(args, url, out)
            ends = (signal.SIGINT, signal.SIGTERM)
            before = [signal.signal(end, session.stop) for end in ends]
            try:
                program(session)
                if not args.no_compare:
                    session.run_again(program) if together else session.recompute()
            except Exception as error:
                raise session.endpoint.error or error from None
            finally:
                for end, handler in zip(ends, before, strict=True):
                    signal.signal(end, handler)
            found = report(title, session)
        if args.json:
            print(json.dumps(found))
        else:
            show(out, " ".join((parser.description or title).split()), found)
    except (ProgramError, ProfileError) as error:
        sys.exit(_fail(str(error), 2))
    except ServerFailedError as error:
        sys.exit(_fail(str(error), 1))
    except (requests.RequestException, OSError) as error:
        sys.exit(_fail(f"the server is gone: {_reason(error)}", 1))
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str, code: int) -> int:
    print(f"{Path(sys.argv[0]).stem}: error: {message}", file=sys.stderr)
    return code
