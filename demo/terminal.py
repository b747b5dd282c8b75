"""The demo in a terminal: conversations that are evicted and come back, turn by turn.

Starts a real SGLang server with Krul and a KV pool too small for the working set,
holds several multi-turn conversations that evict each other, and prints for every
turn where its tokens came from. It ends with the cost of bringing one long history
back, restored against recomputed, on the same server.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from krul_sglang.live_server import LiveServer, ServerFailedError, faster_cpu_dtype, has_gpu
from krul_sglang.profile.base import ProfileError
from krul_sglang.profile.locate import ensure

SYSTEM = "You are a helpful assistant. Answer briefly."
CONVERSATIONS = {
    "travel": [
        "I want to see Lisbon in spring. What should I not miss?",
        "Which of these is best on a rainy day?",
        "And where do I eat near it?",
        "Sum up my day in one sentence.",
    ],
    "cooking": [
        "How do I make a simple tomato soup?",
        "I have no cream. What else makes it smooth?",
        "What bread goes with it?",
        "Write the shopping list.",
    ],
    "python": [
        "What is a generator in Python?",
        "When would I use one instead of a list?",
        "Show me a short example.",
        "What happens when it is exhausted?",
    ],
}


@dataclass
class Conversation:
    """One chat: its messages so far, in the chat template's form."""

    name: str
    questions: Sequence[str]
    messages: list[dict[str, str]] = field(default_factory=list)


@dataclass
class Turn:
    """What one turn cost, as the server reports it (times in seconds, sizes in bytes)."""

    prompt: int
    device: int
    restored: int
    lossy: int
    ttft: float
    text: str

    @property
    def computed(self) -> int:
        """Prompt tokens that went through prefill."""
        return self.prompt - self.device - self.restored


def ask(server: LiveServer, input_ids: Sequence[int], max_new_tokens: int) -> Turn:
    """One streaming request; TTFT is measured at the client."""
    import requests

    began = time.perf_counter()
    ttft = None
    last: dict = {}
    with requests.post(
        f"{server.url}/generate",
        json={
            "input_ids": list(input_ids),
            "sampling_params": {"temperature": 0, "max_new_tokens": max_new_tokens},
            "stream": True,
        },
        stream=True,
        timeout=1200,
    ) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                ttft = ttft if ttft is not None else time.perf_counter() - began
                last = json.loads(line.removeprefix(b"data: "))
    details = last["meta_info"].get("cached_tokens_details") or {}
    return Turn(
        prompt=last["meta_info"]["prompt_tokens"],
        device=details.get("device", 0),
        restored=details.get("host", 0),
        lossy=details.get("lossy", 0),
        ttft=ttft or 0.0,
        text=last["text"],
    )


def start(server: LiveServer, console: Console, what: str) -> None:
    """Start a server under a progress line."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as progress:
        progress.add_task(what, total=None)
        server.start()


def converse(server: LiveServer, tokenizer, console: Console, max_new_tokens: int) -> None:
    """Interleave all conversations, one turn each in turn, and print the table."""
    chats = [
        Conversation(name, questions, [{"role": "system", "content": SYSTEM}])
        for name, questions in CONVERSATIONS.items()
    ]
    table = Table(title="Every turn: where its prompt tokens came from")
    for column in ("conversation", "turn"):
        table.add_column(column)
    for column in (
        "prompt",
        "on device",
        "restored",
        "computed",
        "TTFT",
        "stored",
        "raw",
        "ratio",
    ):
        table.add_column(column, justify="right")
    turns = max(len(chat.questions) for chat in chats)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("conversations", total=turns * len(chats))
        for index in range(turns):
            for chat in chats:
                chat.messages.append({"role": "user", "content": chat.questions[index]})
                ids = tokenizer.apply_chat_template(
                    chat.messages, add_generation_prompt=True, tokenize=True, return_dict=False
                )
                turn = ask(server, ids, max_new_tokens)
                chat.messages.append({"role": "assistant", "content": turn.text})
                state = server.krul()
                ratio = state["ratio"]
                table.add_row(
                    chat.name,
                    str(index + 1),
                    str(turn.prompt),
                    str(turn.device),
                    f"[green]{turn.restored}[/]" if turn.restored else "0",
                    str(turn.computed),
                    f"{turn.ttft:.2f} s",
                    f"{state['stored_bytes'] / 1e6:.1f} MB",
                    f"{state['raw_bytes'] / 1e6:.1f} MB",
                    f"{ratio:.2f}x" if ratio else "-",
                )
                progress.advance(task)
            table.add_section()
    console.print(table)


def measure(
    server: LiveServer, console: Console, history: int, pool: int, vocabulary: int, repeats: int
) -> float:
    """Restore one long history against recomputing it; returns the ratio of medians.

    Both are the same history with a new turn of 16 tokens, on the same server: one finds
    the evicted history in the store, the other follows a flush and finds nothing.
    """
    import random

    rng = random.Random(7)
    past = [rng.randrange(1000, vocabulary) for _ in range(history)]
    other = [rng.randrange(1000, vocabulary) for _ in range(pool - 64)]
    # Three new turns that differ from their first token on: each has its own 16 to compute.
    turns = [[first, *(rng.randrange(1000, vocabulary) for _ in range(15))] for first in (7, 8, 9)]
    restored, recomputed, on_device = [], [], []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"a history of {history} tokens", total=5 * repeats)

        def step(ids: Sequence[int]) -> Turn:
            out = ask(server, ids, 1)
            progress.advance(task)
            return out

        for _ in range(repeats):
            server.flush()
            recomputed.append(step(past + turns[0]))
            on_device.append(step(past + turns[1]))
            step(other)  # pushes the history out of the pool
            wait_until_sealed(server)
            restored.append(step(past + turns[2]))
            step(other)
    table = Table(title=f"A history of {history} tokens comes back (median of {repeats})")
    for column in ("", "restored tokens", "computed tokens", "TTFT"):
        table.add_column(column, justify="left" if not column else "right")
    for name, taken in (
        ("recomputed", recomputed),
        ("restored by Krul", restored),
        ("still on the device", on_device),
    ):
        table.add_row(
            name,
            str(taken[-1].restored),
            str(taken[-1].computed),
            f"{statistics.median(t.ttft for t in taken):.2f} s",
        )
    console.print(table)
    slow = statistics.median(t.ttft for t in recomputed)
    fast = statistics.median(t.ttft for t in restored)
    console.print(
        f"Restoring is [bold green]{slow / fast:.1f} times[/] faster to the first token than "
        f"recomputing ({fast:.2f} s against {slow:.2f} s)."
    )
    return slow / fast


def wait_until_sealed(server: LiveServer) -> None:
    """Wait until everything stored is encoded, so that a restore pays for decoding."""
    while (state := server.krul())["sealed_segments"] < state["segments"]:
        time.sleep(0.1)


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--policy", default="predictive", help="--krul-policy of the server")
    parser.add_argument("--pool", type=int, default=224, help="tokens the KV pool holds")
    parser.add_argument("--answer", type=int, default=24, help="tokens an answer may take")
    parser.add_argument("--history", type=int, default=4096, help="history to restore; 0 skips it")
    parser.add_argument("--repeats", type=int, default=1, help="repeats of that measurement")
    args = parser.parse_args()
    console = Console()
    if console.width < 100:  # the table needs the room; a narrow terminal wraps or scrolls
        console = Console(width=100)
    if not (args.model / "config.json").is_file():
        console.print(f"[red]error:[/] no model in {args.model}; run `make model`")
        return 1
    config = json.loads((args.model / "config.json").read_text())
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    try:
        # A server would do this by itself; here its progress bar can be seen.
        if args.policy == "predictive":
            ensure(args.model, 1, console.print)
    except ProfileError as error:
        console.print(f"[red]error:[/] {error}", highlight=False)
        return 1
    dtype = "auto" if has_gpu() else faster_cpu_dtype()
    flags = ["--enable-krul", "--krul-policy", args.policy, "--dtype", dtype]
    console.print(
        f"SGLang with [bold]--enable-krul --krul-policy {args.policy}[/], {dtype}, a KV pool of "
        f"{args.pool} tokens for {len(CONVERSATIONS)} conversations"
    )
    try:
        with_pool = [*flags, "--max-total-tokens", str(args.pool)]
        server = LiveServer(args.model, with_pool)
        start(server, console, "starting the server")
        try:
            converse(server, tokenizer, console, args.answer)
        finally:
            server.stop()
        if args.history:
            pool = args.history + 512
            server = LiveServer(
                args.model,
                [*flags, "--max-total-tokens", str(pool), "--chunked-prefill-size", "8192"],
            )
            start(server, console, "starting a server with a larger pool")
            try:
                measure(server, console, args.history, pool, config["vocab_size"], args.repeats)
            finally:
                server.stop()
    except (ServerFailedError, OSError) as error:  # requests' errors are OSErrors
        what = error if isinstance(error, ServerFailedError) else f"the server is gone: {error}"
        console.print(f"[red]error:[/] {what}", highlight=False)
        console.print("`krul doctor` checks the installation.")
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
