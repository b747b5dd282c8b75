"""KrulConfig: the one source of flags, environment names, defaults and their docs.

Every field carries its own command-line flag, environment name, parser and help
text; the argparse hooks, the environment reader, the documentation table and the
error messages are all derived from the dataclass below.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from krul_sglang.store.remote.address import parse_address, without_password

POLICIES = ("predictive", "paper", "fixed", "lossless")
ALWAYS, SECOND_VISIT = "always", "second-visit"
ADMISSIONS = (ALWAYS, SECOND_VISIT)

DISK_BYTES = 10 * 10**9
"""Budget of the disk tier where none is given."""


class KrulConfigError(ValueError):
    """A setting that cannot be served. The message is one line for the operator."""


_SIZE_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def parse_size(text: str) -> int:
    """Bytes from ``4GB``, ``512MiB``, ``1.5e9``. Raises ValueError."""
    number = r"[0-9]+\.?[0-9]*|\.[0-9]+"
    match = re.fullmatch(rf"\s*((?:{number})(?:e\+?[0-9]+)?)\s*([a-zA-Z]*)\s*", str(text))
    unit = match.group(2).lower() if match else None
    if match is None or unit not in _SIZE_UNITS:
        raise ValueError("a size such as 4GB, 512MiB or a number of bytes")
    size = float(match.group(1)) * _SIZE_UNITS[unit]
    if not math.isfinite(size) or size < 1:
        raise ValueError("a size of at least one byte, such as 4GB")
    return int(size)


def parse_rate(text: str) -> float:
    """Bytes per second from ``16MB/s``, ``2GB``. Raises ValueError."""
    stripped = re.sub(r"(/s|ps)\s*$", "", str(text).strip(), flags=re.IGNORECASE)
    try:
        return float(parse_size(stripped))
    except ValueError:
        raise ValueError("a rate such as 16MB/s or 2GB/s") from None


def parse_bool(text: str) -> bool:
    """An environment switch. Raises ValueError."""
    value = str(text).strip().lower()
    if value in ("1", "true", "yes", "on"):
        return True
    if value in ("0", "false", "no", "off", ""):
        return False
    raise ValueError("one of 1, 0, true, false")


def parse_switch(text: str) -> str:
    """``on`` or ``off``. Raises ValueError."""
    try:
        return "on" if parse_bool(text) else "off"
    except ValueError:
        raise ValueError("on or off") from None


def parse_policy(text: str) -> str:
    """A policy's name. Raises ValueError naming the nearest valid one."""
    if text in POLICIES:
        return text
    near = difflib.get_close_matches(str(text), POLICIES, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"one of {', '.join(POLICIES)}{hint}")


def parse_admission(text: str) -> str:
    """What the disk takes. Raises ValueError."""
    if text in ADMISSIONS:
        return text
    raise ValueError(f"one of {', '.join(ADMISSIONS)}")


def parse_budget(text: str) -> float:
    """Nats of mean KL. Raises ValueError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 10:
        raise ValueError("a number of nats above 0 and at most 10, such as 0.01")
    return value


def parse_recompute(text: str) -> str:
    """``auto``, ``never`` or a fraction, as text. Raises ValueError."""
    if text in ("auto", "never"):
        return text
    try:
        fraction = float(text)
    except ValueError:
        fraction = math.nan
    if not 0 <= fraction <= 1:
        raise ValueError("one of auto, never, FRACTION, from 0 to 1 such as 0.25")
    return str(fraction)


def parse_path(text: str) -> Path:
    """A path, with ``~`` expanded. Raises ValueError when empty."""
    if not str(text).strip():
        raise ValueError("a path")
    return Path(text).expanduser()


def parse_remote(text: str) -> str:
    """The URL of a remote tier. Raises ValueError."""
    parse_address(text)
    return text.strip()


def _setting(
    default: Any, parse: Callable[[str], Any], metavar: str, help: str, flag: str | None = None
) -> Any:
    return dataclasses.field(
        default=default,
        metadata={"parse": parse, "metavar": metavar, "help": help, "flag": flag},
    )


@dataclass(frozen=True)
class KrulConfig:
    """Everything an operator can set. Values are validated on construction."""

    enabled: bool = _setting(
        False,
        parse_bool,
        "",
        "Keep conversations that are evicted from the prefix cache in host memory, "
        "compressed, and restore them when they return.",
        flag="--enable-krul",
    )
    policy: str = _setting(
        "predictive",
        parse_policy,
        "{" + ",".join(POLICIES) + "}",
        "How evicted KV is stored. `lossless` is bit-exact; `predictive` is lossy, within the "
        "quality budget, and many times smaller; `fixed` merges fixed pairs of layers as in "
        "MiniCache, `paper` pairs selected as in the Krul paper (our reimplementations, for "
        "comparison: they destroy answers).",
    )
    quality_budget: float = _setting(
        0.01,
        parse_budget,
        "NATS",
        "Mean KL divergence (nats) from the full cache that `predictive` may add, as estimated "
        "by calibration; what is expected to cost more is stored finer, finally losslessly.",
    )
    attention: str = _setting(
        "on",
        parse_switch,
        "{on,off}",
        "Whether to measure what each conversation attends to while it generates: `predictive` "
        "stores those tokens finer, `paper` selects its pairs by it. `off` goes by the model's "
        "profile (or MiniCache's pairs) alone.",
    )
    host_memory: int = _setting(
        4 * 10**9,
        parse_size,
        "SIZE",
        "All host memory that Krul may hold on this server, ranks together: stored segments, "
        "staging, index, the model's profile and sampled queries. For example 4GB.",
    )
    dir: Path | None = _setting(
        None,
        parse_path,
        "PATH",
        "Directory of the disk tier: what is stored is written there in the background, leaves "
        "memory when that is short, and is found again after a restart. Servers may share one. "
        "Without it memory is the only tier.",
    )
    disk: int | None = _setting(
        None,
        parse_size,
        "SIZE",
        "Byte budget of that directory, all servers and models together; 10GB where it is not "
        "given. The least recently used conversations go first.",
    )
    remote: str | None = _setting(
        None,
        parse_remote,
        "URL",
        "A Redis or Valkey server that several machines share, such as `redis://HOST:6379`: what "
        "is stored is sent there in the background, and what it has of a conversation is fetched "
        "while the request waits in the queue. `?ttl=7d` (the default) says how long it keeps "
        "what nobody uses. Needs `pip install krul-sglang[remote]`.",
    )
    admit: str = _setting(
        ALWAYS,
        parse_admission,
        "{" + ",".join(ADMISSIONS) + "}",
        "What is written to that directory: `always` everything, so that a restart finds it; "
        "`second-visit` a conversation once it has come back, which spares the drive those that "
        "never do.",
    )
    recompute: str = _setting(
        "auto",
        parse_recompute,
        "{auto,never,FRACTION}",
        "How much of a stored history is recomputed instead of loaded: `auto` weighs both by "
        "what they have cost on this server, `never` loads all of it, a fraction recomputes "
        "that share of its tokens (from the end). What is never loaded is not stored either.",
    )
    profile: Path | None = _setting(
        None,
        parse_path,
        "PATH",
        "Model profile written by `krul calibrate`; without it the first start of a model "
        "calibrates and keeps the profile in the user's cache folder.",
    )
    link_bandwidth: float | None = _setting(
        None,
        parse_rate,
        "RATE",
        "Throttle loads of stored segments to this many bytes per second, for experiments.",
    )

    def __post_init__(self) -> None:
        for setting in settings():
            value = getattr(self, setting.name)
            if value is not None or setting.default is not None:
                value = setting.parse_value(value, source=setting.flag)
                object.__setattr__(self, setting.name, value)
        if self.disk is not None and self.dir is None:
            raise KrulConfigError(
                f"--krul-disk={self.disk}: no directory to keep it in; add --krul-dir PATH"
            )

    @property
    def outlives_server(self) -> bool:
        """Whether what is stored is there when the server is not."""
        return self.dir is not None or self.remote is not None

    @property
    def disk_limit(self) -> int:
        """Bytes that the disk tier may take."""
        return DISK_BYTES if self.disk is None else self.disk

    @property
    def recompute_fraction(self) -> float | None:
        """Share of a stored history to recompute; None leaves it to the planner."""
        if self.recompute == "auto":
            return None
        return 0.0 if self.recompute == "never" else float(self.recompute)

    @property
    def lossless(self) -> bool:
        """Whether every restore is bit-exact."""
        return self.policy == "lossless"

    @property
    def needs_profile(self) -> bool:
        """Whether the policy's codec works from a calibrated profile of the model."""
        return self.policy == "predictive"

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> KrulConfig:
        """Build from raw values by field name; None means the default.

        Raises :class:`KrulConfigError` naming the flag, the value and what is
        accepted; an unknown name is refused with the nearest valid one.
        """
        known = {setting.name: setting for setting in settings()}
        parsed: dict[str, Any] = {}
        for name, value in values.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise KrulConfigError(f"unknown Krul setting {name!r}{hint}")
            if value is None:
                continue
            parsed[name] = known[name].parse_value(value, source=known[name].flag)
        return cls(**parsed)

    @classmethod
    def from_environment(
        cls, environ: Mapping[str, str] = os.environ, **overrides: Any
    ) -> KrulConfig:
        """Settings from ``KRUL_*`` names, then ``overrides`` by field name.

        A ``KRUL_*`` name that is no setting is refused: a typo must not silently
        leave a default in place.
        """
        known = {setting.env: setting for setting in settings()}
        parsed: dict[str, Any] = {}
        for env, text in environ.items():
            if not env.startswith("KRUL_"):
                continue
            if env not in known:
                near = difflib.get_close_matches(env, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise KrulConfigError(f"unknown environment setting {env}{hint}")
            parsed[known[env].name] = known[env].parse_value(text, source=env)
        parsed.update({name: value for name, value in overrides.items() if value is not None})
        return cls.from_values({k: v for k, v in parsed.items() if v is not None})

    def to_environment(self) -> dict[str, str]:
        """The ``KRUL_*`` variables that reproduce this configuration."""
        out = {}
        for setting in settings():
            value = getattr(self, setting.name)
            if value is not None and value != setting.default:
                out[setting.env] = ("1" if value else "0") if value in (True, False) else str(value)
        return out


@dataclass(frozen=True)
class Setting:
    """One field of :class:`KrulConfig` with its outward names."""

    name: str
    flag: str
    env: str
    default: Any
    metavar: str
    help: str
    parse: Callable[[str], Any]

    def parse_value(self, value: Any, source: str) -> Any:
        """Parse text; a value that already has its final type passes through its text form."""
        try:
            return self.parse(str(value))
        except ValueError as error:
            shown = without_password(str(value))
            raise KrulConfigError(f"{source}={shown}: not accepted; expected {error}") from None


def settings() -> Iterator[Setting]:
    """Every setting, in the order of the docs table."""
    for field in dataclasses.fields(KrulConfig):
        stem = field.name.replace("_", "-")
        flag = field.metadata["flag"] or f"--krul-{stem}"
        env = "KRUL_ENABLED" if field.name == "enabled" else f"KRUL_{field.name.upper()}"
        yield Setting(
            name=field.name,
            flag=flag,
            env=env,
            default=field.default,
            metavar=field.metadata["metavar"],
            help=field.metadata["help"],
            parse=field.metadata["parse"],
        )


def flags_table() -> str:
    """The Markdown table of flags that docs/flags.md carries."""
    rows = ["| flag | environment | default | meaning |", "|---|---|---|---|"]
    for setting in settings():
        shown = setting.flag + (f" {setting.metavar}" if setting.metavar else "")
        shown = shown.replace("|", "\\|")
        if setting.default is None:
            default = "none"
        elif setting.default is False:
            default = "off"
        elif setting.name == "host_memory":
            default = "4GB"
        else:
            default = str(setting.default)
        rows.append(f"| `{shown}` | `{setting.env}` | {default} | {setting.help} |")
    return "\n".join(rows) + "\n"
