"""Tables and the picture: every figure that was answered is there, and what is not is said."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import pytest
from bodies import LINE, conversation, layer
from rich.console import Console

from krul_sglang.inspection import show
from krul_sglang.inspection.picture import draw, require_matplotlib


def text_of(shown, body, width: int = show.WIDTH) -> str:
    out = io.StringIO()
    shown(Console(file=out, width=width, highlight=False), body)
    return out.getvalue()


def row_of(text: str, first: str) -> str:
    """The line that begins so, its words one space apart."""
    words = next(line.split() for line in text.splitlines() if line.split()[:1] == [first])
    return " ".join(words)


def test_the_list_has_every_figure_on_one_line() -> None:
    other = {**LINE, "id": "b1ff9bc96c5b", "waiting_tokens": 9, "age_seconds": 7300.0}
    text = text_of(show.conversations, {"total": 7, "conversations": [LINE, other]})
    figures = "1100 11 1089 11 1089 2 2.17 MB 50.2 MB 23.1x predictive 24 s"
    assert row_of(text, LINE["id"]) == f"{LINE['id']} {figures}"
    assert "1089 (9 waiting)" in text
    assert "2.0 h" in text
    assert "2 of 7 conversations" in text


def test_segments_that_are_not_sealed_have_no_figures() -> None:
    text = text_of(show.conversation, conversation(lost_tokens=65))
    assert row_of(text, "11") == "11 1024 sealed predictive 0.000171 1.97 MB 1.02 MB 23.9x"
    assert row_of(text, "1035") == "1035 65 staged - - 0 B 65 kB -"
    assert "65 tokens are lost" in text
    assert "Nothing of it is stored" in text_of(show.conversation, conversation(segments=[]))


def test_layers_with_reference_step_error_and_classes() -> None:
    layers = [layer(0), layer(1, dropped=1.0), layer(2, dropped=0.4, in_shared_frame=False)]
    text = text_of(show.layers, conversation(layers=layers))
    rest = "36.7x 10 % 20 % 30 % 40 %"
    assert row_of(text, "0") == f"0 - 0.00018 no 1.2e-06 ~45.6 kB {rest}"
    assert row_of(text, "1") == f"1 0 0.00018 yes 1.2e-06 ~45.6 kB {rest}"
    assert row_of(text, "2") == f"2 1 0.00018 40 % 1.2e-06 45.6 kB {rest}"
    for said in ("x0.35", "x1.7", "1089 quantized tokens", "~ a share of frames", "1.21 kB"):
        assert said in text


def test_layers_of_a_codec_without_classes() -> None:
    pair = {"step": None, "error": None, "classes": None}
    layers = [layer(0, references=[1], **pair), layer(1, references=[0, 5], **pair)]
    distances = {"measure": "distance", "tokens": 9, "layers": [0, 1], "matrix": [[0, 3], [3, 0]]}
    body = conversation(layers=layers, class_factors=[], similarity=distances)
    text = text_of(show.layers, body)
    assert row_of(text, "1") == "1 0, 5 - no - ~45.6 kB 36.7x"
    assert "quantized" not in text
    assert "distance between attention maps" in text
    assert text.splitlines()[-2:] == ["    0  @@  ", "    1    @@"]


def test_similarity_is_shaded() -> None:
    found = {"measure": "correlation", "tokens": 9, "layers": [0, 2, 4]}
    matrix = [[1.0, 0.55, -0.4], [0.55, 1.0, None], [-0.4, None, 1.0]]
    text = text_of(show.similarity, {**found, "matrix": matrix})
    assert text.splitlines()[-3:] == ["    0  @@++  ", "    2  ++@@??", "    4    ??@@"]
    assert "was not measured" in text_of(show.similarity, None)


@pytest.mark.parametrize("seconds", [0.0, 119.0, 121.0, 7201.0])
def test_ages(seconds: float) -> None:
    line = {**LINE, "age_seconds": seconds}
    text = text_of(show.conversations, {"total": 1, "conversations": [line]})
    assert {0.0: "0 s", 119.0: "119 s", 121.0: "2 min", 7201.0: "2.0 h"}[seconds] in text


@pytest.mark.parametrize(
    "body",
    [
        conversation(30),
        conversation(2, similarity=None),
        conversation(layers=[layer(0, classes=None, error=None), layer(1)], class_factors=[]),
        conversation(layers=[layer(0), layer(1, dropped=1.0, error=0.0)]),
    ],
    ids=["whole", "no similarity", "no classes", "dropped"],
)
def test_the_picture_is_a_png_of_readable_size(body, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "one.png"
    draw(body, file)
    head = file.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    assert width > 1200
    assert height > 600


def test_a_picture_that_cannot_be_drawn_is_one_line(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="nothing of conversation 1f97bc132f65 is stored"):
        draw(conversation(segments=[]), tmp_path / "one.png")
    with pytest.raises(OSError, match="No such file"):
        draw(conversation(), tmp_path / "nowhere" / "one.png")
    monkeypatch.setattr("krul_sglang.inspection.picture.importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        require_matplotlib()
