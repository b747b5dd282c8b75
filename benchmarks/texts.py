"""Texts to measure on, as conversations: held out from calibration, and unlike any of it."""

from __future__ import annotations

import base64
import importlib
import inspect
import json
import random
from pathlib import Path

from krul_sglang.quality.measure import is_held_out

LOCALES = ["fr_FR", "de_DE", "ru_RU", "zh_CN", "ar_AA", "el_GR", "ja_JP", "pl_PL", "he_IL", "th_TH"]
MODULES = ("argparse", "dataclasses", "socketserver", "tarfile", "zipfile", "pickle", "ast", "uuid")


def collect(out: Path, prose: Path | None, per_source: int) -> None:
    """Held-out conversations: people chatting, prose, program text; about 5,000 chars each."""
    rows = []
    import chitchat_dataset  # PyPI, MIT

    for identity, chat in sorted(chitchat_dataset.Dataset().items()):
        messages = [
            {"role": ("user", "assistant")[i % 2], "content": " ".join(m["text"] for m in group)}
            for i, group in enumerate(chat["messages"])
        ]
        if is_held_out(identity) and sum(len(m["content"]) for m in messages) > 5000:
            rows.append({"id": f"chat/{identity}", "messages": messages})
        if len(rows) == per_source:
            break
    texts = [("code", name, inspect.getsource(importlib.import_module(name))) for name in MODULES]
    for path in sorted(prose.glob("*.txt"))[:per_source] if prose else ():
        texts.append(("prose", path.stem, path.read_text(errors="replace")[20000:]))
    rows += [_read_this(f"{source}/{name}", text) for source, name, text in texts]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))


def collect_unlike(out: Path, model: Path) -> None:
    """Texts no calibration has seen the like of: other languages, and no language at all."""
    from faker import Faker  # PyPI, MIT
    from transformers import AutoTokenizer

    gen = random.Random(0)
    Faker.seed(0)
    texts = []
    for locale in LOCALES:
        paragraphs = Faker(locale).paragraphs(40)
        texts.append((f"language/{locale}", "\n".join(paragraphs * 3)))
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    for i in range(5):
        texts.append((f"base64/{i}", base64.b64encode(gen.randbytes(8000)).decode()))
        ids = [gen.randrange(len(tokenizer)) for _ in range(1600)]
        texts.append((f"random/{i}", tokenizer.decode(ids, skip_special_tokens=True)))
        numbers = [str(gen.randrange(10 ** gen.randrange(1, 8))) for _ in range(3000)]
        texts.append((f"numbers/{i}", " ".join(numbers)))
    for i, phrase in enumerate(("The quick brown fox jumps over the lazy dog. ", "0", "ab\n")):
        texts.append((f"repeated/{i}", phrase * 3000))
    out.write_text("".join(json.dumps(_read_this(name, text)) + "\n" for name, text in texts))


def _read_this(identity: str, text: str) -> dict[str, object]:
    """A conversation that is one long text."""
    messages = [
        {"role": "user", "content": "Read this."},
        {"role": "assistant", "content": text[:9000]},
    ]
    return {"id": identity, "messages": messages}
