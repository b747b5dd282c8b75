"""What the pages say: their commands, links, headings and names of settings.

A *block* is fenced, or indented by four spaces or more behind an empty line. It is one of commands
when its first line begins with a program that :mod:`rules` knows; then every line of it is one.
Commands in the text count too: what stands between backticks and begins so.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

_FENCE = re.compile(r"\s*(```+|~~~+)\s*(\w*)")
_ENVIRONMENT = re.compile(r"[A-Z_][A-Z0-9_]*=.*")
_SEPARATORS = {"|", "||", "&&", ";", "&"}
_REDIRECTIONS = {">", ">>", "<", "2>"}


@dataclass(frozen=True)
class Command:
    """One program's call. where: page and line. env: settings before it. words: with the program
    first. inline: whether it stands in the text."""

    where: str
    env: tuple[str, ...]
    words: tuple[str, ...]
    inline: bool = False

    @property
    def program(self) -> str:
        """Its name without a folder; `python3` is `python`."""
        name = self.words[0].rpartition("/")[2]
        return "python" if re.fullmatch(r"python3?(\.\d+)?", name) else name

    def __str__(self) -> str:
        return f"{self.where}: {shlex.join(self.words)}"


def blocks(text: str) -> Iterator[tuple[int, str, list[str]]]:
    """``(line number, language, lines)`` of each block; the language of an indented one is ""."""
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        begin = number
        if fence:
            number += 1
            while number < len(lines) and not lines[number].strip().startswith(fence[1]):
                number += 1
            yield begin + 2, fence[2], lines[begin + 1 : number]
            number += 1
        elif lines[number].startswith("    ") and (not number or not lines[number - 1].strip()):
            while number < len(lines) and (lines[number].startswith("    ") or not lines[number]):
                number += 1
            yield begin + 1, "", lines[begin:number]
        else:
            number += 1


def logical_lines(first: int, lines: list[str]) -> Iterator[tuple[int, str]]:
    """Lines with what continues them, as a shell joins them: a backslash, an open quote."""
    waiting = ""
    began = first
    for number, line in enumerate(lines, first):
        if not waiting:
            began = number
        waiting += line.strip().removeprefix("$ ")
        if waiting.endswith("\\"):
            waiting = waiting[:-1]
            continue
        try:
            shlex.split(waiting, comments=True)
        except ValueError:  # an open quote
            waiting += "\n"
            continue
        if waiting:
            yield began, waiting
        waiting = ""
    if waiting:
        yield began, waiting


def calls(where: str, line: str, inline: bool = False) -> Iterator[Command]:
    """The programs that a shell line calls, without comments, redirections and loops of its own.

    Raises ValueError where a quote is left open.
    """
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    tokens = [*lexer, ";"]
    while tokens:
        token = tokens.pop(0)
        if token in _REDIRECTIONS:
            tokens.pop(0)
        elif token not in _SEPARATORS:
            words.append(token)
        elif words:
            settings = 0
            while settings < len(words) and _ENVIRONMENT.fullmatch(words[settings]):
                settings += 1
            if words[settings:]:
                env = tuple(words[:settings])
                yield Command(where, env, tuple(words[settings:]), inline)
            words = []


def name_of(page: Path) -> str:
    """The page's path from the repository's root."""
    return str(page.relative_to(ROOT))


def prose(text: str) -> str:
    """The page without its blocks, line for line."""
    kept = text.splitlines()
    for first, _, lines in blocks(text):
        kept[first - 1 : first - 1 + len(lines)] = [""] * len(lines)
    return "\n".join(kept)


def inline_code(text: str) -> Iterator[tuple[int, str]]:
    """``(line number, code)`` of what stands between backticks in the text."""
    text = prose(text)
    for match in re.finditer(r"(?<!`)`([^`]+)`(?!`)", text):
        yield text.count("\n", 0, match.start()) + 1, " ".join(match[1].split())


def links(text: str) -> Iterator[tuple[int, str]]:
    """``(line number, target)`` of each link and picture."""
    text = re.sub(r"`[^`\n]*`", lambda code: " " * len(code[0]), prose(text))
    for match in re.finditer(r"\]\(\s*([^)\s]+)\s*\)|\b(?:src|href)=\"([^\"]+)\"", text):
        yield text.count("\n", 0, match.start()) + 1, match[1] or match[2]


def anchors(text: str) -> set[str]:
    """What a link to a heading of the page may name, as GitHub makes it."""
    found: set[str] = set()
    for line in prose(text).splitlines():
        heading = re.match(r"#{1,6}\s+(.*)", line)
        if heading:
            title = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading[1]).strip().lower()
            found.add(re.sub(r"[^\w\- ]", "", title).replace(" ", "-"))
    return found
