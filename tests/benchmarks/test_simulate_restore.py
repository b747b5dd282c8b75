"""The simulation's table, its page and its picture."""

from __future__ import annotations

import json

import pytest
import simulate_restore
from simulate_restore import ACCELERATORS, LINKS, MODELS, PREDICTIVE, RAW, Row, simulate, table

from krul_sglang.restore.simulate import Regime


def row(**change) -> Row:
    figures = {"recompute": 2.0, "load_all": 3.0, "one_p": 1.0, "share": 0.5, "chunked": 1.5}
    names = {"model": "Llama-7B", "accelerator": "a", "link": "l", "history": 1024, "form": "raw"}
    return Row(**names | figures | {"by_layer": 0.9} | change)


def test_a_regime_is_simulated_in_order_of_what_is_possible() -> None:
    found = simulate(Regime(MODELS[1], ACCELERATORS[1], LINKS[0]), RAW, 8192, 256, 8192)
    assert found.by_layer < found.one_p < min(found.recompute, found.load_all)
    assert found.one_p <= found.chunked
    # 8,192 tokens of 128 KiB at 2.9 GB/s, and the pass over the new turn's first layer.
    assert found.load_all == pytest.approx(8192 * 131072 / 2.9e9, rel=0.02)
    small = simulate(Regime(MODELS[1], ACCELERATORS[1], LINKS[0]), PREDICTIVE, 8192, 256, 8192)
    assert small.one_p < found.one_p / 4
    assert small.share > found.share


def test_the_table() -> None:
    rows = [row(), row(form="predictive", one_p=0.02, by_layer=0.02, share=1.0), row(history=9)]
    last = table(rows, 1024).splitlines()[-1]
    raw, predictive = "3.00 | 1.00 (50%) | -10.0%", "3.00 | 20 ms (100%) | 0"
    assert last == f"| Llama-7B | a | l | 2.00 | {raw} | {predictive} |"


def test_the_command_fills_its_page(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(simulate_restore, "RATES", simulate_restore.RATES[::7])
    for name in ("MODELS", "ACCELERATORS", "LINKS"):
        monkeypatch.setattr(simulate_restore, name, getattr(simulate_restore, name)[-2:])
    page, png, out = (tmp_path / name for name in ("page.md", "plot.png", "rows.json"))
    page.write_text("a\n<!-- generated: begin -->\nold\n<!-- generated: end -->\nz\n")
    arguments = ["--histories", "1024", "--docs", str(page), "--png", str(png)]
    assert simulate_restore.main([*arguments, "--json", str(out)]) == 0
    assert "**1,024 tokens**" in page.read_text()
    assert "old" not in page.read_text()
    assert png.read_bytes().startswith(b"\x89PNG")
    assert len(json.loads(out.read_text())) == 2 * 2 * 2 * 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--histories", "long"], "--histories long: expected numbers of tokens"),
        (["--chunk", "0"], "--chunk 0: expected at least 1"),
    ],
)
def test_bad_flags_are_one_line(arguments, said, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        simulate_restore.main(arguments)
    assert said in capsys.readouterr().err


def test_a_page_without_markers_is_one_line(tmp_path, monkeypatch, capsys) -> None:
    for name in ("MODELS", "ACCELERATORS", "LINKS"):
        monkeypatch.setattr(simulate_restore, name, getattr(simulate_restore, name)[:1])
    page = tmp_path / "page.md"
    page.write_text("nothing")
    assert simulate_restore.main(["--histories", "1024", "--docs", str(page)]) == 2
    assert "no generated markers" in capsys.readouterr().err
