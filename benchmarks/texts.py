"""Texts to measure on, as conversations: held out from calibration, and unlike any of it.

The codec's constants were chosen on the development texts. ``fresh`` takes others: more
chats, other modules and passages, other languages and seeds.
"""

from __future__ import annotations

import base64
import importlib
import inspect
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from krul_sglang.quality.measure import is_held_out

LONG = 50_000
"""Characters a text is cut to; enough for histories of 8,000 tokens."""
DEVELOPMENT_CHATS = 50
DEVELOPMENT_MODULES = (
    *("argparse", "dataclasses", "socketserver", "tarfile", "zipfile", "pickle", "ast", "uuid"),
    *("asyncio.base_events", "calendar", "csv", "datetime", "enum", "heapq", "inspect", "logging"),
    *("random", "shutil", "smtplib", "ssl", "statistics", "subprocess", "threading", "typing"),
)
LOCALES = ("fr_FR", "de_DE", "ru_RU", "zh_CN", "ar_AA", "el_GR", "ja_JP", "pl_PL", "he_IL", "th_TH")
FRESH_LOCALES = ("es_ES", "it_IT", "nl_NL", "sv_SE", "cs_CZ", "uk_UA", "ko_KR", "hi_IN", "fa_IR")
PHRASES = ("The quick brown fox jumps over the lazy dog. ", "0", "ab\n")
FRESH_PHRASES = ("I am happy to help you with that. ", "=", "yes no ", "1 2 3 4 5 6 7 8 9\n")


def collect(out: Path, prose: Path | None, per_source: int, fresh: bool) -> None:
    """Held-out conversations: people chatting, prose, program text; over 5,000 chars each."""
    skip = DEVELOPMENT_CHATS if fresh else 0
    rows = list(_chats())[skip : skip + per_source]
    texts = []
    modules = _other_modules() if fresh else DEVELOPMENT_MODULES
    for name in modules[:per_source]:
        texts.append(("code", name, inspect.getsource(importlib.import_module(name))))
    begin = 70_000 if fresh else 20_000
    for path in sorted(prose.glob("*.txt")) if prose else ():
        text = path.read_text(errors="replace")[begin:]
        if len(text) > 9000:
            texts.append(("prose", path.stem, text))
    kept = [t for t in texts if t[0] == "prose"][:per_source]
    texts = [t for t in texts if t[0] != "prose"] + kept
    rows += [_read_this(f"{source}/{name}", text) for source, name, text in texts]
    _write(out, rows)


def _chats() -> Iterator[dict[str, object]]:
    import chitchat_dataset  # PyPI, MIT

    for identity, chat in sorted(chitchat_dataset.Dataset().items()):
        messages = [
            {"role": ("user", "assistant")[i % 2], "content": " ".join(m["text"] for m in group)}
            for i, group in enumerate(chat["messages"])
        ]
        if is_held_out(identity) and sum(len(m["content"]) for m in messages) > 5000:
            yield {"id": f"chat/{identity}", "messages": messages}


def _other_modules() -> list[str]:
    folder = Path(inspect.getfile(inspect)).parent
    names = [name for name in sorted(sys.stdlib_module_names) if (folder / f"{name}.py").is_file()]
    size = {name: (folder / f"{name}.py").stat().st_size for name in names}
    return [n for n in names if size[n] > 12_000 and n not in DEVELOPMENT_MODULES and n[0] != "_"]


def collect_unlike(out: Path, model: Path, fresh: bool) -> None:
    """Texts no calibration has seen the like of: other languages, and no language at all."""
    from faker import Faker  # PyPI, MIT
    from transformers import AutoTokenizer

    seed = int(fresh)
    gen = random.Random(seed)
    Faker.seed(seed)
    texts = []
    for locale in FRESH_LOCALES if fresh else LOCALES:
        paragraphs = Faker(locale).paragraphs(120 if fresh else 40)
        texts.append((f"language/{locale}", "\n".join(paragraphs * (1 if fresh else 3))))
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    for i in range(5):
        texts.append((f"base64/{i}", base64.b64encode(gen.randbytes(8000)).decode()))
        ids = [gen.randrange(len(tokenizer)) for _ in range(1600)]
        texts.append((f"random/{i}", tokenizer.decode(ids, skip_special_tokens=True)))
        numbers = [str(gen.randrange(10 ** gen.randrange(1, 8))) for _ in range(3000)]
        texts.append((f"numbers/{i}", " ".join(numbers)))
    for i, phrase in enumerate(FRESH_PHRASES if fresh else PHRASES):
        texts.append((f"repeated/{i}", phrase * 3000))
    if fresh:
        texts += _other_code()
    _write(out, [_read_this(name, text) for name, text in texts])


def _other_code() -> Iterator[tuple[str, str]]:
    """C++ and JavaScript, from packages that are installed anyway."""
    import matplotlib
    import torch

    headers = sorted((Path(torch.__file__).parent / "include" / "ATen").glob("*.h"))
    scripts = sorted(Path(matplotlib.__file__).parent.rglob("*.js"))
    for language, files in (("cpp", headers), ("js", scripts)):
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
