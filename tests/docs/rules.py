"""What makes a command of the pages a right one: a rule a program.

A rule raises :class:`WrongError` with a line for whoever wrote the command. What needs SGLang's
parser, a script's own or a live server is not decided here: rules hand it on as
:class:`Options` to be looked up by the slow tests.
"""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from urllib.parse import urlsplit

import typer
from pages import PAGES, ROOT, Command, blocks, calls, inline_code, logical_lines, name_of

from krul_sglang.cli import app
from krul_sglang.config import settings

SGLANG = "sglang"
PORT = 30000
"""Where the pages' server listens, as SGLang's does by default."""
ANYTHING = {"cd", "cat", "head", "grep", "jq", "sed", "kill", "export", "mkdir", "rm"}
"""What a reader's shell has; nothing to check."""
ELSEWHERE = {"redis-server", "redis-cli", "prometheus", "git", "sudo", "apt-get"}
"""Programs of others that a page starts; nothing of ours to check."""
UNKNOWN = (
    "no rule in tests/docs/rules.py checks {0!r}: add one to RULES, or name it in ELSEWHERE when "
    "nothing of ours can be wrong about it"
)
FOREIGN = {"docker", "podman", "kubectl", "helm", "systemctl", "conda", "uv", "ssh", "rsync"}
"""Programs that no page uses yet: a block that begins with one is one of commands."""
BUILD_TOOLS = {"pre-commit", "build", "pip"}
LOG_LINES = {("krul", "evict"), ("krul", "restore")}
"""How lines of a server's log begin: no commands."""
BARE = {"make", "krul", "python", "pip", "curl", "sglang", "pytest"}
"""Programs that are looked for in the text, too."""


class WrongError(Exception):
    """A command that does not work, and why."""


@dataclass(frozen=True)
class Options:
    """Flags that ``of`` must know: a script's path, or :data:`SGLANG`."""

    command: Command
    of: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Address:
    """A path that the server must serve."""

    command: Command
    method: str
    path: str


Later = Options | Address
Found = Iterator[Later]


def flags_of(words: tuple[str, ...]) -> tuple[str, ...]:
    """The long options among them, without values."""
    return tuple(word.partition("=")[0] for word in words if re.match(r"--\w", word))


# ---- programs ----------------------------------------------------------------------


HANDED_ON = ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "ARGS")


@cache
def makefile() -> tuple[frozenset[str], frozenset[str]]:
    """Targets and variables."""
    text = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z][\w-]*):(?!=)", text, re.MULTILINE)
    variables = re.findall(r"^([A-Z]+)\s*[?:]?=", text, re.MULTILINE)
    return frozenset(targets), frozenset([*variables, "ARGS"])


@cache
def _dry_run(*words: str) -> str:
    """What make would run. Raises :class:`WrongError`."""
    # `make test ARGS=...` hands its own arguments on to whatever runs below it.
    env = {name: value for name, value in os.environ.items() if name not in HANDED_ON}
    dry = subprocess.run(
        ["make", "-n", *words], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    if dry.returncode:
        raise WrongError(dry.stderr.strip())
    return dry.stdout


def make(command: Command) -> Found:
    """Targets and variables exist, and what they would run is right."""
    targets, variables = makefile()
    for word in command.words[1:]:
        name, given, _ = word.partition("=")
        if name not in (variables if given else targets):
            raise WrongError(f"the Makefile has no {'variable' if given else 'target'} {name!r}")
    for _, line in logical_lines(1, _dry_run(*command.words[1:]).splitlines()):
        for call in calls(command.where, line):
            if call.program in ("python", "krul") and "$" not in line:
                yield from RULES[call.program](call)


def krul(command: Command) -> Found:
    """The command and its options exist, and its values are of their kind."""
    group, (_, *words) = typer.main.get_command(app), command.words
    if not words or words[0] in ("--version", "--help"):
        return
    usage = typer.BadParameter.__mro__[1]
    name, *rest = words
    if name not in group.commands:
        raise WrongError(f"krul has no command {name!r}")
    if "--help" in rest:
        return
    if command.inline:  # in the text it may be told without what it needs
        known = {option for own in group.commands[name].params for option in own.opts}
        for flag in flags_of(tuple(rest)) if name != "serve" else ():
            if flag not in known:
                raise WrongError(f"krul {name} has no {flag}")
        return
    try:
        context = group.commands[name].make_context(name, list(rest))
    except usage as error:
        raise WrongError(error.format_message()) from None
    if name == "serve":
        yield Options(command, SGLANG, flags_of(tuple(context.args)))


def python(command: Command) -> Found:
    """The script or module exists; its flags are looked up later."""
    first, *rest = command.words[1:] or ["-c"]
    if first == "-c":
        return
    if first == "-m":
        module, *rest = rest
        if module in ("sglang.launch_server", "sglang.bench_serving"):
            if module == "sglang.launch_server":
                yield Options(command, SGLANG, flags_of(tuple(rest)))
        elif module == "pytest":
            yield from pytest(Command(command.where, (), ("pytest", *rest)))
        elif module == "pip":
            yield from pip(Command(command.where, (), ("pip", *rest)))
        elif module not in ("venv", "build", "json.tool", "http.server"):
            raise WrongError(UNKNOWN.format(f"python -m {module}"))
        return
    if not (ROOT / first).is_file():
        raise WrongError(f"there is no {first}")
    flags = flags_of(tuple(rest))
    if first.startswith(("benchmarks/", "demo/", "kernels/")) and flags:
        yield Options(command, first, flags)


def sglang(command: Command) -> Found:
    """`sglang serve`: its flags are SGLang's."""
    if len(command.words) > 1 and command.words[1] == "serve":
        yield Options(command, SGLANG, flags_of(command.words[2:]))


def pytest(command: Command) -> Found:
    """Named files exist."""
    for word in command.words[1:]:
        if word.startswith("tests") and not (ROOT / word.partition("::")[0]).exists():
            raise WrongError(f"there is no {word}")
    return iter(())


@cache
def packages() -> tuple[dict[str, str], frozenset[str]]:
    """Packages that pyproject.toml names, with their pins, and its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    environment = project["tool"]["krul"]["environment"]
    found = project["project"]["dependencies"]
    for more in (*extras.values(), *environment.values()):
        found = [*found, *more]
    named = (re.match(r"([\w.-]+)(?:\[[^]]*\])?(.*)", one) for one in found)
    return {one[1].lower(): one[2] for one in named if one}, frozenset(extras)


def pip(command: Command) -> Found:
    """Extras exist; packages are those of pyproject.toml, pinned as there."""
    known, extras = packages()
    words = [word for word in command.words[1:] if not word.startswith("-")]
    if words[:1] != ["install"]:
        raise WrongError(UNKNOWN.format(" ".join(command.words[:2])))
    for word in words[1:]:
        match = re.fullmatch(r"([\w./-]+?)(?:\[([\w,]+)\])?((?:==|>=).*)?", word)
        if match is None:
            raise WrongError(f"{word!r} is no package")
        name, wanted, pin = match.groups()
        for extra in (wanted or "").split(","):
            if extra and name in (".", "krul-sglang") and extra not in extras:
                raise WrongError(f"pyproject.toml has no extra {extra!r}")
        ours = name in (".", "krul-sglang") or name.endswith(".whl")
        if not ours and name.lower() not in known and name not in BUILD_TOOLS:
            raise WrongError(f"pyproject.toml does not name {name!r}")
        if pin and name in known and known[name] != pin:
            raise WrongError(f"pyproject.toml pins {name}{known[name]}, not {name}{pin}")
    return iter(())


def curl(command: Command) -> Found:
    """The path is looked up on a live server."""
    words = command.words[1:]
    data = any(word in ("-d", "--data", "--json") for word in words)
    method = "POST" if data else "GET"
    for before, word in zip(("", *words), words, strict=False):
        if before in ("-X", "--request"):
            method = word
        parts = urlsplit(word if "://" in word else f"http://{word}")
        if parts.hostname in ("localhost", "127.0.0.1") and before not in ("-d", "-H"):
            if parts.port != PORT:
                raise WrongError(f"the pages' server listens on port {PORT}, not {parts.port}")
            yield Address(command, method, parts.path)
            return
    raise WrongError("it asks no server on this machine")


RULES: dict[str, Callable[[Command], Found]] = {
    "make": make,
    "krul": krul,
    "python": python,
    "sglang": sglang,
    "pytest": pytest,
    "pip": pip,
    "curl": curl,
    "pre-commit": lambda command: iter(()),
}
PROGRAMS = {*RULES, *ANYTHING, *ELSEWHERE, *FOREIGN}


# ---- the pages ---------------------------------------------------------------------


def begins_with_program(line: str) -> bool:
    """Whether a shell would find one of :data:`PROGRAMS` there."""
    try:
        first = next(calls("", line), None)
    except ValueError:
        return False
    return first is not None and first.program in PROGRAMS and first.words[:2] not in LOG_LINES


def commands() -> list[Command]:
    """Every command of the pages, those in the text too where they are whole."""
    found: list[Command] = []
    for page in PAGES:
        text, name = page.read_text(), name_of(page)
        for first, language, lines in blocks(text):
            told = [(n, line) for n, line in logical_lines(first, lines) if line[0] != "#"]
            if not told or language in ("python", "json", "yaml", "text"):
                continue
            if language not in ("sh", "bash", "console", "shell") and not begins_with_program(
                told[0][1]
            ):
                continue
            for number, line in told:
                found += calls(f"{name}:{number}", line)
        for number, code in inline_code(text):
            program = code.split(" ")[0].rpartition("/")[2].removesuffix("3")
            whole = program in BARE and " " in code and not re.search(r"\.\.\.|…|[<>]", code)
            if whole and begins_with_program(code):
                found += calls(f"{name}:{number}", code, inline=True)
    return found


def judged(command: Command) -> list[Later]:
    """What remains to be looked up. Raises :class:`WrongError`."""
    known = {setting.env for setting in settings()}
    for setting in command.env:
        env = setting.partition("=")[0]
        if env.startswith("KRUL_") and env not in known:
            raise WrongError(f"{env} is no setting")
    if command.program in ANYTHING | ELSEWHERE:
        return []
    if command.program not in RULES:
        raise WrongError(UNKNOWN.format(command.program))
    return list(RULES[command.program](command))
