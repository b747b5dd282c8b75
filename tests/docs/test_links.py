"""Links between pages, to files and to headings lead somewhere; pictures are pictures."""

from __future__ import annotations

import re

from pages import PAGES, ROOT, anchors, links, name_of


def test_links_resolve(record_property) -> None:
    wrong, seen = [], 0
    for page in PAGES:
        for number, target in links(page.read_text()):
            if re.match(r"[a-z]+:", target):
                continue
            seen += 1
            path, _, heading = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            where = f"{name_of(page)}:{number}: {target}"
            if not file.exists() or not file.is_relative_to(ROOT):
                wrong.append(f"{where}: there is no such file")
            elif heading and heading not in anchors(file.read_text()):
                wrong.append(f"{where}: {name_of(file)} has no such heading")
            elif file.suffix == ".png" and not file.read_bytes().startswith(b"\x89PNG\r\n"):
                wrong.append(f"{where}: no PNG")
    assert not wrong, "\n".join(wrong)
    assert seen > 80
    record_property("counts", {"links": seen})


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / target).resolve() for _, target in links(index.read_text())}
    pages = {page for page in PAGES if page.parent == index.parent} - {index}
    assert pages <= linked, {name_of(page) for page in pages - linked}


def test_every_picture_is_on_a_page() -> None:
    shown = {
        (page.parent / target).resolve()
        for page in PAGES
        for _, target in links(page.read_text())
        if not re.match(r"[a-z]+:|#", target)
    }
    pictures = {*(ROOT / "docs").glob("*.png"), *(ROOT / "docs").glob("*.svg")}
    assert pictures <= shown, {name_of(picture) for picture in pictures - shown}


def test_the_map_of_the_code_is_whole() -> None:
    """Every folder of the package has a row, and what it says to read first is there."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| `([\w/]+/)` \|[^|]*\| (.*) \|$", page, re.MULTILINE)
    mapped = {folder for folder, _ in rows}
    for folder, first in rows:
        for name in re.findall(r"`([\w/]+\.py)`", first):
            assert (ROOT / folder / name).is_file(), f"{folder}{name}"
    modules = [*(ROOT / "krul_sglang").rglob("*.py"), *(ROOT / "kernels/krul_kernels").glob("*.py")]
    folders = {f"{module.parent.relative_to(ROOT)}/" for module in modules}
    assert folders <= mapped, folders - mapped
