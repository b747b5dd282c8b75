"""The profile is checked, with the reason in one line, before any rank is started."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from krul_sglang.config import KrulConfigError
from krul_sglang.runtime.weights import model_folder

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def launched(resolve, tiny, chat_model, chat_profile, tmp_path_factory):
    """Outcomes by name of argument lists taken up to the last step before processes start."""
    folder = tmp_path_factory.mktemp("profiles")
    truncated = folder / "truncated.safetensors"
    truncated.write_bytes(chat_profile.read_bytes()[:100_000])
    other = str(tiny("llama", 64, 4, "default"))
    model, profile = str(chat_model), ("--krul-profile", str(chat_profile))
    cases = {
        "serves": (model, profile),
        "serves-lossless": (other, ("--krul-policy", "lossless")),
        "serves-fixed": (other, ("--krul-policy", "fixed")),
        "foreign": (other, profile),
        "missing": (model, ("--krul-profile", "nowhere.safetensors")),
        "truncated": (model, ("--krul-profile", str(truncated))),
        "one-rank": (model, (*profile, "--tp-size", "3")),
        "memory": (model, (*profile, "--krul-host-memory", "64MB")),
        "no-tokenizer": (other, ()),
        "no-cache-folder": (model, ()),
    }
    base = ["--device", "cpu", "--skip-tokenizer-init", "--enable-krul"]
    caches = {"no-cache-folder": "/proc"}
    answer = resolve(
        [
            {
                "argv": [*base, "--model-path", path, *flags],
                "launch": True,
                "env": {"XDG_CACHE_HOME": caches.get(name, str(folder))},
            }
            for name, (path, flags) in cases.items()
        ]
    )
    return dict(zip(cases, answer["outcomes"], strict=True))


@pytest.mark.parametrize("name", ["serves", "serves-lossless", "serves-fixed"])
def test_accepted(launched, name):
    outcome = launched[name]
    assert outcome["exit"] is None, outcome["error"] or outcome["stderr"]


@pytest.mark.parametrize(
    ("name", "shows", "why"),
    [
        ("foreign", "--krul-profile=", "weights of the profile is"),
        ("missing", "--krul-profile=nowhere.safetensors: ", "no such file"),
        ("truncated", "--krul-profile=", "damaged or truncated profile"),
        ("one-rank", "--krul-profile=", "rank0of3.safetensors: no such file"),
        ("memory", "--krul-host-memory=64000000: ", "give at least"),
        ("no-tokenizer", "--krul-policy=predictive: ", "no profile could be made"),
        ("no-cache-folder", "--krul-policy=predictive: ", "cannot be written"),
    ],
)
def test_refused_in_one_line(launched, name, shows, why):
    outcome = launched[name]
    assert outcome["exit"] == 2, outcome["error"] or outcome["stderr"]
    (line,) = [x for x in outcome["stderr"].splitlines() if x.startswith("krul: error: ")]
    assert line.removeprefix("krul: error: ").startswith(shows)
    assert why in line
    assert "--krul-policy lossless needs none" in line
    assert "Traceback" not in outcome["stderr"]


def test_a_repository_that_is_not_here_is_said_in_one_line():
    named = SimpleNamespace(model_path="nobody/no-such-model", revision=None, download_dir=None)
    with pytest.raises(KrulConfigError, match="no-such-model: no folder of weights") as caught:
        model_folder(named)
    assert "\n" not in str(caught.value)
