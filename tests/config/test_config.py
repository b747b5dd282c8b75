"""KrulConfig: values, error messages, the environment and the command line agree."""

import argparse
import dataclasses
import importlib.util
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from krul_sglang.config import (
    KrulConfig,
    KrulConfigError,
    flags_table,
    parse_bool,
    parse_path,
    parse_rate,
    parse_size,
    settings,
)
from krul_sglang.engine import engine_kwargs
from krul_sglang.runtime import args, compat

BY_NAME = {setting.name: setting for setting in settings()}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4GB", 4 * 10**9),
        ("4gb", 4 * 10**9),
        ("512MiB", 512 * 2**20),
        ("1.5e9", 1_500_000_000),
        ("1e+3 KB", 10**6),
        (" 7 ", 7),
        ("2.", 2),
        (".5KB", 500),
        (4096, 4096),
    ],
)
def test_sizes(text, value: int) -> None:
    assert parse_size(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "GB", "-4GB", "4XB", "1.5.2GB", ".", "0", "0.5", "nan", "inf", "1e999", "4 G B", "1e-3GB"],
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"^a size"):
        parse_size(text)


@pytest.mark.parametrize("text", ["16MB/s", "16MB/S", "16MBps", "16MB", "16000000"])
def test_rates(text: str) -> None:
    assert parse_rate(text) == 16e6


@pytest.mark.parametrize("text", ["", "/s", "fast", "-1MB/s", "1..MB/s"])
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(ValueError, match=r"^a rate"):
        parse_rate(text)


def test_switches_and_paths() -> None:
    assert [parse_bool(t) for t in ("1", "TRUE", " yes ", "on")] == [True] * 4
    assert [parse_bool(t) for t in ("0", "False", "no", "off", "")] == [False] * 5
    with pytest.raises(ValueError, match="one of 1, 0, true, false"):
        parse_bool("maybe")
    assert parse_path("~/tier") == Path.home() / "tier"


REFUSED = {
    "enabled": ("maybe", "one of 1, 0, true, false"),
    "policy": ("losless", "one of predictive, paper, fixed, lossless (did you mean 'lossless'?)"),
    "quality_budget": ("nan", "a number of nats above 0 and at most 10, such as 0.01"),
    "host_memory": ("-4GB", "a size such as 4GB, 512MiB or a number of bytes"),
    "dir": (" ", "a path"),
    "disk": ("none", "a size such as 4GB, 512MiB or a number of bytes"),
    "admit": ("never", "one of always, second-visit"),
    "remote": (
        "http://h",
        "redis://[USER:PASSWORD@]HOST[:PORT][/DATABASE], rediss:// for TLS or unix:///SOCKET "
        "(valkey:// and valkeys:// mean the same), and ?ttl=7d if need be",
    ),
    "attention": ("maybe", "on or off"),
    "recompute": ("1.5", "one of auto, never, FRACTION, from 0 to 1 such as 0.25"),
    "profile": ("", "a path"),
    "link_bandwidth": ("fast", "a rate such as 16MB/s or 2GB/s"),
}


def test_a_bad_value_is_tried_for_every_setting() -> None:
    assert REFUSED.keys() == BY_NAME.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_value_is_named_with_its_flag_and_what_is_accepted(name: str) -> None:
    value, accepted = REFUSED[name]
    flag, env = BY_NAME[name].flag, BY_NAME[name].env
    with pytest.raises(KrulConfigError) as error:
        KrulConfig.from_values({name: value})
    assert str(error.value) == f"{flag}={value}: not accepted; expected {accepted}"
    with pytest.raises(KrulConfigError) as error:
        KrulConfig.from_environment({env: value})
    assert str(error.value) == f"{env}={value}: not accepted; expected {accepted}"
    with pytest.raises(KrulConfigError) as error:
        KrulConfig(**{name: value})
    assert str(error.value).startswith(f"{flag}={value}: not accepted")


@pytest.mark.parametrize("name", [n for n, s in BY_NAME.items() if s.default is not None])
def test_none_is_no_value_of_a_setting_that_has_a_default(name: str) -> None:
    with pytest.raises(KrulConfigError, match="not accepted"):
        KrulConfig(**{name: None})
    assert KrulConfig.from_values({name: None}) == KrulConfig()


def test_a_disk_budget_needs_a_directory() -> None:
    with pytest.raises(KrulConfigError, match=r"^--krul-disk=4000000000: no directory"):
        KrulConfig.from_values({"disk": "4GB"})
    assert KrulConfig.from_values({"disk": "4GB", "dir": "/tier"}).disk_limit == 4 * 10**9
    assert KrulConfig.from_values({"dir": "/tier"}).disk_limit == 10**10


def test_a_password_is_not_printed() -> None:
    with pytest.raises(KrulConfigError) as error:
        KrulConfig.from_values({"remote": "redis://user:secret@h:port"})
    assert str(error.value).startswith("--krul-remote=redis://***@h:port: not accepted")
    assert "secret" not in str(error.value)


def test_a_missing_client_is_named_with_what_installs_it(monkeypatch) -> None:
    config = KrulConfig.from_values({"remote": "redis://user:secret@h"})
    compat.check_client(config)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(KrulConfigError) as error:
        compat.check_client(config)
    assert str(error.value) == (
        "--krul-remote=redis://***@h: the client package is not installed; run "
        '`pip install "krul-sglang[remote]"`'
    )
    compat.check_client(KrulConfig())


def test_unknown_names_are_refused_with_the_nearest_one() -> None:
    with pytest.raises(
        KrulConfigError, match=r"setting 'hostmemory'; did you mean 'host_memory'\?"
    ):
        KrulConfig.from_values({"hostmemory": "4GB"})
    with pytest.raises(KrulConfigError, match=r"KRUL_POLICYS; did you mean KRUL_POLICY\?"):
        KrulConfig.from_environment({"KRUL_POLICYS": "lossless"})
    with pytest.raises(KrulConfigError, match=r"unknown Krul setting 'zzz'$"):
        KrulConfig.from_values({"zzz": "1"})


def test_other_programs_variables_are_left_alone() -> None:
    assert KrulConfig.from_environment({"PATH": "/bin", "NOT_KRUL_POLICY": "x"}) == KrulConfig()


def test_flags_win_over_the_environment() -> None:
    environ = {"KRUL_POLICY": "lossless", "KRUL_HOST_MEMORY": "1GB"}
    config = KrulConfig.from_environment(environ, host_memory="2GB", policy=None)
    assert (config.policy, config.host_memory) == ("lossless", 2 * 10**9)


CONFIGS = st.builds(
    KrulConfig,
    enabled=st.booleans(),
    policy=st.sampled_from(["predictive", "fixed", "lossless"]),
    host_memory=st.integers(1, 10**15),
    recompute=st.one_of(st.sampled_from(["auto", "never"]), st.floats(0, 1).map(str)),
    link_bandwidth=st.one_of(st.none(), st.integers(1, 10**13).map(float)),
)


@given(CONFIGS)
def test_the_environment_carries_a_configuration_whole(config: KrulConfig) -> None:
    environ = config.to_environment()
    assert KrulConfig.from_environment(environ) == config
    assert set(environ) <= {setting.env for setting in settings()}
    values = dataclasses.asdict(config)
    assert KrulConfig.from_values(values) == config


def test_defaults_need_no_environment() -> None:
    assert KrulConfig().to_environment() == {}
    assert KrulConfig(enabled=True).to_environment() == {"KRUL_ENABLED": "1"}


@pytest.mark.parametrize(
    ("recompute", "fraction"),
    [("auto", None), ("never", 0.0), ("0", 0.0), ("0.25", 0.25), ("1", 1.0)],
)
def test_recompute_fraction(recompute: str, fraction: float | None) -> None:
    assert KrulConfig(recompute=recompute).recompute_fraction == fraction


def test_the_docs_table_has_a_row_for_every_setting() -> None:
    header, rule, *rows = flags_table().splitlines()
    assert header.count("|") == rule.count("|") == 5
    assert len(rows) == len(dataclasses.fields(KrulConfig))
    for row, setting in zip(rows, settings(), strict=True):
        assert f"| `{setting.flag}" in row
        assert f"| `{setting.env}` |" in row
        assert setting.help in row
        assert row.replace("\\|", "").count("|") == 5


def test_names_do_not_collide() -> None:
    for names in ([s.flag for s in settings()], [s.env for s in settings()]):
        assert len(set(names)) == len(names)


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(exit_on_error=False)
    args.add_flags(None, out)
    return out


def test_every_setting_is_a_flag() -> None:
    given_flags = []
    for setting in settings():
        given_flags += [setting.flag] if setting.name == "enabled" else [setting.flag, "-7GB"]
    namespace = parser().parse_args(given_flags)
    for setting in settings():
        expected = "1" if setting.name == "enabled" else "-7GB"
        assert getattr(namespace, f"krul_{setting.name}") == expected
    assert all(value is None for value in vars(parser().parse_args([])).values())
    help_text = " ".join(parser().format_help().split())
    assert all(setting.flag in help_text for setting in settings())


class Record:
    """What the flag reader touches of SGLang's ServerArgs."""

    radix_cache_backend: str | None = None


def read(*flags: str, backend: str | None = None) -> Record:
    record = Record()
    record.radix_cache_backend = backend
    return args.read_flags(record, Record, parser().parse_args([*flags]))


def test_flags_select_the_backend_and_carry_the_configuration() -> None:
    record = read("--enable-krul", "--krul-policy", "lossless", "--krul-host-memory", "64MB")
    assert record.radix_cache_backend == "krul"
    assert getattr(record, args.ATTRIBUTE) == KrulConfig(
        enabled=True, policy="lossless", host_memory=64_000_000
    )
    assert getattr(read(backend="krul"), args.ATTRIBUTE).enabled


def test_without_the_switch_nothing_happens() -> None:
    assert vars(read()) == {"radix_cache_backend": None}


@pytest.mark.parametrize(
    ("flags", "backend", "message"),
    [
        (["--krul-policy", "lossless"], None, "--krul-policy has no effect without --enable-krul"),
        (["--enable-krul"], "lmcache", "--radix-cache-backend=lmcache and --enable-krul choose"),
        (["--enable-krul", "--krul-host-memory", "-4GB"], None, "--krul-host-memory=-4GB: not acc"),
    ],
)
def test_a_bad_command_line_ends_in_one_line(capsys, flags, backend, message) -> None:
    with pytest.raises(SystemExit) as stopped:
        read(*flags, backend=backend)
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith(f"krul: error: {message}")


def test_engine_keywords_travel_in_the_environment(monkeypatch) -> None:
    for setting in settings():
        monkeypatch.delenv(setting.env, raising=False)
    monkeypatch.setenv("KRUL_LINK_BANDWIDTH", "1MB/s")
    assert engine_kwargs(policy="lossless") == {"radix_cache_backend": "krul"}
    assert KrulConfig.from_environment() == KrulConfig(enabled=True, policy="lossless")
    with pytest.raises(KrulConfigError, match="did you mean 'policy'"):
        engine_kwargs(polices="lossless")
