"""Texts to measure on, as conversations: held out from calibration, and unlike any of it.

In rounds, because constants were chosen on some of them: texts of round 0 and 1 informed
the codec, the margin and the guard; those of round 2 informed nothing.
"""

from __future__ import annotations

import base64
import importlib
import inspect
import json
import pkgutil
import random
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from krul_sglang.quality.measure import is_held_out

LONG = 50_000
"""Characters a text is cut to; enough for histories of 8,000 tokens."""
ROUNDS = (0, 1, 2)
CHATS = (0, 50, 110)
"""The first chat of a round."""
PASSAGES = (20_000, 70_000, 120_000)
"""Where in a long text a round's passage begins."""
MODULES = (
    *("argparse", "dataclasses", "socketserver", "tarfile", "zipfile", "pickle", "ast", "uuid"),
    *("asyncio.base_events", "calendar", "csv", "datetime", "enum", "heapq", "inspect", "logging"),
    *("random", "shutil", "smtplib", "ssl", "statistics", "subprocess", "threading", "typing"),
)
PACKAGES = ("asyncio", "concurrent", "ctypes", "email", "http", "json", "multiprocessing")
PACKAGES += ("sqlite3", "tkinter", "unittest", "urllib", "wsgiref", "xml", "importlib", "logging")
LOCALES = (
    ("fr_FR", "de_DE", "ru_RU", "zh_CN", "ar_AA", "el_GR", "ja_JP", "pl_PL", "he_IL", "th_TH"),
    ("es_ES", "it_IT", "nl_NL", "sv_SE", "cs_CZ", "uk_UA", "ko_KR", "hi_IN", "fa_IR"),
    ("pt_BR", "hu_HU", "ro_RO", "bg_BG", "da_DK", "tr_TR", "hy_AM", "sk_SK", "bn_BD", "zh_TW"),
)
PHRASES = (
    ("The quick brown fox jumps over the lazy dog. ", "0", "ab\n"),
    ("I am happy to help you with that. ", "=", "yes no ", "1 2 3 4 5 6 7 8 9\n"),
    ("Thank you very much for your patience. ", "#", "la ", "A B C D E F G\n", "to be or not "),
)


def collect(out: Path, prose: Path | None, per_source: int, number: int) -> None:
    """Held-out conversations: people chatting, prose, program text; over 5,000 chars each."""
    rows = list(islice(chats(), CHATS[number], CHATS[number] + per_source))
    for name in list(_modules(number))[:per_source]:
        rows.append(_read_this(f"code/{name}", inspect.getsource(importlib.import_module(name))))
    passages = []
    for path in sorted(prose.glob("*.txt")) if prose else ():
        text = path.read_text(errors="replace")[PASSAGES[number] :]
        if len(text) > 9000:
            passages.append(_read_this(f"prose/{path.stem}", text))
    _write(out, rows + passages[:per_source])


def chats() -> Iterator[dict[str, Any]]:
    """Held-out chats of over 5000 chars, in the order of their ids."""
    import chitchat_dataset  # PyPI, MIT

    for identity, chat in sorted(chitchat_dataset.Dataset().items()):
        messages = [
            {"role": ("user", "assistant")[i % 2], "content": " ".join(m["text"] for m in group)}
            for i, group in enumerate(chat["messages"])
        ]
        if is_held_out(identity) and sum(len(m["content"]) for m in messages) > 5000:
            yield {"id": f"chat/{identity}", "messages": messages}


def _modules(number: int) -> Iterator[str]:
    if number == 0:
        yield from MODULES
        return
    folder = Path(inspect.getfile(inspect)).parent
    names = sorted(sys.stdlib_module_names)
    if number == 2:
        paths = [str(folder / package) for package in PACKAGES]
        names = sorted(
            f"{package}.{module.name}"
            for package, path in zip(PACKAGES, paths, strict=True)
            for module in pkgutil.iter_modules([path])
        )
    for name in names:
        path = (folder / name.replace(".", "/")).with_suffix(".py")
        here = path.is_file() and not any(word in name for word in ("windows", "win32", "msvc"))
        if here and name[0] != "_" and name not in MODULES and path.stat().st_size > 12_000:
            yield name


def collect_unlike(out: Path, model: Path, number: int) -> None:
    """Texts no calibration has seen the like of: other languages, and no language at all."""
    from faker import Faker  # PyPI, MIT
    from transformers import AutoTokenizer

    gen = random.Random(number)
    Faker.seed(number)
    texts = []
    for locale in LOCALES[number]:
        paragraphs = Faker(locale).paragraphs(120 if number else 40)
        texts.append((f"language/{locale}", "\n".join(paragraphs * (1 if number else 3))))
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    for i in range(5):
        texts.append((f"base64/{i}", base64.b64encode(gen.randbytes(8000)).decode()))
        ids = [gen.randrange(len(tokenizer)) for _ in range(1600)]
        texts.append((f"random/{i}", tokenizer.decode(ids, skip_special_tokens=True)))
        numbers = [str(gen.randrange(10 ** gen.randrange(1, 8))) for _ in range(3000)]
        texts.append((f"numbers/{i}", " ".join(numbers)))
    for i, phrase in enumerate(PHRASES[number]):
        texts.append((f"repeated/{i}", phrase * 3000))
    if number:
        texts += list(_other_code(number))
    _write(out, [_read_this(name, text) for name, text in texts])


def _other_code(number: int) -> Iterator[tuple[str, str]]:
    """C++ and JavaScript, from packages that are installed anyway."""
    import matplotlib
    import torch

    folder = Path(torch.__file__).parent / "include" / ("ATen" if number == 1 else "c10")
    headers = sorted(folder.glob("*.h" if number == 1 else "*/*.h"))
    scripts = sorted(Path(matplotlib.__file__).parent.rglob("*.js"))
    for language, files in (("cpp", headers), ("js", scripts)):
        if language == "js" and number == 2:
            continue  # the two there are were of round 1
        large = [path for path in files if path.stat().st_size > 9000][:6]
        yield from ((f"{language}/{path.stem}", path.read_text()) for path in large)


def _read_this(identity: str, text: str) -> dict[str, object]:
    """A conversation that is one long text."""
    messages = [
        {"role": "user", "content": "Read this."},
        {"role": "assistant", "content": text[:LONG]},
    ]
    return {"id": identity, "messages": messages}


def _write(out: Path, rows: list[dict[str, object]]) -> None:
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
