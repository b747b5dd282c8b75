"""``--krul-dir`` at start: what serves, what is refused, and what is said."""

import os

import pytest

from krul_sglang.config import KrulConfig, KrulConfigError
from krul_sglang.runtime.disk import check_directory


def refusal(path) -> str:
    with pytest.raises(KrulConfigError) as refused:
        check_directory(KrulConfig(dir=path))
    line = str(refused.value)
    assert line.startswith(f"--krul-dir={path}: ")
    assert "\n" not in line
    return line


def test_a_missing_one_is_made_for_its_owner_alone(tmp_path) -> None:
    check_directory(KrulConfig(dir=tmp_path / "a" / "tier"))
    assert os.stat(tmp_path / "a" / "tier").st_mode & 0o777 == 0o700


def test_nothing_is_made_where_none_is_asked_for(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_directory(KrulConfig())
    assert not list(tmp_path.iterdir())


def test_a_link_to_a_directory_will_do(tmp_path) -> None:
    (tmp_path / "tier").mkdir()
    (tmp_path / "link").symlink_to("tier")
    check_directory(KrulConfig(dir=tmp_path / "link"))


def test_a_file_or_a_link_to_nothing_is_none(tmp_path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    assert "a file, not a directory" in refusal(tmp_path / "file")
    assert "cannot be used" in refusal(tmp_path / "file" / "below")
    assert "a link that leads nowhere" in refusal(tmp_path / "dangling")
    refusal(tmp_path / "loop")


@pytest.fixture
def read_only(tmp_path, monkeypatch):
    """What a file system mounted read-only, or another user's directory, answers."""
    may = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode, **k: not mode & os.W_OK and may(path, mode, **k)
    )
    return tmp_path / "tier"


def test_one_that_is_read_only_serves_what_lies_there(read_only, caplog) -> None:
    (read_only / "v1").mkdir(parents=True)
    check_directory(KrulConfig(dir=read_only))
    assert "nothing is stored" in caplog.text


def test_one_that_is_read_only_and_empty_is_refused(read_only) -> None:
    read_only.mkdir()
    assert "may not write" in refusal(read_only)


def test_a_budget_beyond_the_file_system_is_told(tmp_path, caplog) -> None:
    check_directory(KrulConfig(dir=tmp_path / "tier", disk="1GB"))
    assert not caplog.text
    check_directory(KrulConfig(dir=tmp_path / "tier", disk="10000000TB"))
    assert "holds" in caplog.text
