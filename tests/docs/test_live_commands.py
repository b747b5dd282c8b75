"""Commands of the pages, run: the quick start as it stands there, what asks a server, what works
on a directory, and what needs neither. One live server.

Only what a command names of the reader's own is replaced: the port, a conversation's id, a
directory, the model.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
from pages import ROOT, Command
from rules import PORT, Address, WrongError, commands, judged

from krul_sglang.live_server import LiveServer

pytestmark = pytest.mark.server

QUICK_START = "docs/quick_start.md"
ASK = {"inspect", "trace", "top"}
AN_ID = re.compile("[0-9a-f]{4,12}|ID")
"""How a page names a conversation; one of the reader's own takes its place."""
UPKEEP = ("verify", "gc", "inspect", "forget")
"""In this order: the last one removes."""


@dataclass
class Desk:
    """Where a reader sits: a server that listens, a working folder, the disk tier's directory."""

    server: LiveServer
    folder: Path
    directory: Path

    def run(self, line: str, **options: object) -> subprocess.CompletedProcess[str]:
        """Run a shell line here, with this environment's `krul` and `python3`."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "-c", line.replace(f":{PORT}", f":{self.server.port}")],
            cwd=self.folder,
            env={**os.environ, "PATH": path, "COLUMNS": "160"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            **options,
        )

    def krul(self, *words: str) -> str:
        """Run `krul`, ask this server; what it says. Fails unless it succeeds."""
        asks = [] if set(words) & {"--url", "--dir", *UPKEEP[:2], "forget"} else ["--url"]
        where = [f"http://127.0.0.1:{self.server.port}"] if asks else []
        done = self.run(shlex.join(["krul", *words, *asks, *where]))
        assert done.returncode == 0, f"krul {shlex.join(words)}: {done.stderr}{done.stdout}"
        return done.stdout


@pytest.fixture(scope="module")
def desk(serve, chat_profile: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """The quick start's server."""
    if shutil.which("curl") is None:
        pytest.skip("the pages ask with curl, which is not installed")
    folder = tmp_path_factory.mktemp("reader")
    flags = ["--enable-krul", "--krul-profile", str(chat_profile), "--enable-metrics"]
    flags += ["--max-total-tokens", "2048", "--krul-dir", str(folder / "kv")]
    with serve(*flags) as server:
        yield Desk(server, folder, folder / "kv")


@pytest.fixture(scope="module")
def answers(desk: Desk) -> list[dict]:
    """What the quick start's conversations were answered: its own lines, in their order."""
    told = []
    for line in lines_of(QUICK_START, "Watch a conversation leave and come back"):
        if line.startswith(("python3 -c", "sed ", "curl ")):
            done = desk.run(line)
            assert done.returncode == 0, f"{line}: {done.stderr}"
            if line.startswith("curl "):
                told.append(json.loads(done.stdout))
    return told


def lines_of(page: str, heading: str) -> list[str]:
    """The lines of code below a heading."""
    text = (ROOT / page).read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return [line.strip() for line in text.splitlines() if line.startswith("    ")]


def of_krul(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Calls of these `krul` commands on the pages, each once, without `krul`."""
    whole = (command for command in commands() if not command.inline)
    found = (command.words[1:] for command in whole if command.program == "krul")
    once = dict.fromkeys(words for words in found if words and words[0] in names)
    return sorted(once, key=lambda words: names.index(words[0]))


def test_the_quick_start_restores(answers: list[dict]) -> None:
    """And is told so as the page says, give or take a hundredth: timings decide."""
    first, second, again = (one["meta_info"]["cached_tokens_details"] for one in answers)
    assert (first or {}).get("host", 0) == (second or {}).get("host", 0) == 0
    assert again["host"] > 1400
    lines = lines_of(QUICK_START, "Watch a conversation leave and come back")
    told = next(line for line in lines if line.startswith('"cached_tokens_details"'))
    figures = json.loads(f"{{{told}}}")["cached_tokens_details"]
    assert figures == {name: pytest.approx(again[name], abs=16) for name in again}


def test_what_asks_a_server_is_answered(desk: Desk, answers: list[dict], record_property) -> None:
    listed = requests.get(f"{desk.server.url}/krul/conversations", timeout=60).json()
    ids = {one["id"] for one in listed["conversations"] if one["stored_tokens"]}
    asked = [words for words in of_krul(sorted(ASK)) if "--dir" not in words]
    for words in asked:
        mine = [min(ids) if AN_ID.fullmatch(word) else word for word in words]
        kept, skip = [], False
        for word in mine:
            if not skip and word not in ("--url", "--api-key"):
                kept.append(word)
            skip = word in ("--url", "--api-key")
        if kept[0] == "top" and "--once" not in kept:
            kept.append("--once")
        said = desk.krul(*kept)
        assert said.strip(), kept
    assert len(asked) >= 6
    record_property("counts", {"krul_asked_a_server": len(asked)})


def test_addresses_are_served(desk: Desk, record_property) -> None:
    """Every `curl` asks for a route of this server, with its method."""
    paths = requests.get(f"{desk.server.url}/openapi.json", timeout=60).json()["paths"]
    assert "/krul/conversations" in paths
    asked: list[Address] = []
    for command in commands():
        try:
            asked += [later for later in judged(command) if isinstance(later, Address)]
        except WrongError:
            continue
    for one in asked:
        known = (re.sub(r"\{[^}]*\}", "[^/]+", path) for path in paths)
        path = next((p for p in known if re.fullmatch(p, one.path.rstrip("/"))), None)
        if path is None:  # mounted, as /metrics is
            status = requests.get(f"{desk.server.url}{one.path}", timeout=60).status_code
            assert status == 200, f"{one.command}: status {status}"
        elif path in paths:
            assert one.method.lower() in paths[path], str(one.command)
    assert len(asked) >= 4
    record_property("counts", {"addresses_served": len(asked)})


def test_what_works_on_a_directory_does(desk: Desk, answers: list[dict], record_property) -> None:
    """On a copy of a running server's directory: `krul forget` removes what it is told to."""
    copy = desk.folder / "copy"
    shutil.copytree(desk.directory, copy)
    listed = json.loads(desk.krul("inspect", "--dir", str(copy), "--json"))
    mine = listed["conversations"][0]["id"]
    found = [words for words in of_krul(UPKEEP) if words[0] != "inspect" or "--dir" in words]
    for words in found:
        at = words.index("--dir") + 1 if "--dir" in words else 1
        before = (mine if AN_ID.fullmatch(word) else word for word in words[:at])
        desk.krul(*before, str(copy), *words[at + 1 :])
    assert len(found) >= 3
    record_property("counts", {"krul_on_a_directory": len(found)})


def test_what_needs_no_server(desk: Desk, chat_model: Path, tmp_path: Path) -> None:
    """`krul doctor`, `krul docs`, and help of everything."""
    assert "plugin loaded" in desk.run("krul doctor").stdout
    # A budget that is free also where other tests' servers hold most of the memory.
    told = desk.run(f"KRUL_HOST_MEMORY=64MB krul doctor --model {shlex.quote(str(chat_model))}")
    assert told.returncode == 0, told.stdout
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    done = desk.run(f"krul docs --folder {shlex.quote(str(tmp_path / 'docs'))}")
    assert done.returncode == 0, done.stderr
    for page in sorted((ROOT / "docs").glob("*.md")):
        assert (tmp_path / "docs" / page.name).read_text() == page.read_text(), "run `make docs`"


def test_make_help_names_every_target() -> None:
    told = subprocess.run(
        ["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    named = {command.words[1] for command in commands() if is_plain_make(command)}
    assert named <= set(re.findall(r"make ([\w-]+)", told)) | {"profile", "help"}


def is_plain_make(command: Command) -> bool:
    """`make TARGET`."""
    return command.program == "make" and len(command.words) > 1 and "=" not in command.words[1]
