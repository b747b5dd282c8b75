"""What cannot be served is refused before anything starts, in one line that says why."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from krul_sglang.config import KrulConfig
from krul_sglang.live_server import server_environment
from krul_sglang.runtime import compat

# Starts SGLang's programs, though never a server: half a minute.
pytestmark = pytest.mark.server

ON = ("--enable-krul",)
EXACT = ("--enable-krul", "--krul-policy", "lossless")
LORA = ("--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", "q_proj")
TP2 = ("--tp-size", "2")


def bad_setting(*flags: str, shows: str, why: str, **case) -> tuple:
    return "llama", flags, shows, why, case


def flag(*flags: str, shows: str, model: str = "llama", why: str = "", krul=ON) -> tuple:
    return model, (*krul, *flags), shows, why, {}


def arch(model: str, why: str, krul=EXACT) -> tuple:
    return model, krul, "--model-path=", why, {}


# name: (bare config, flags, how the line begins, what it contains, more of the case)
REFUSED = {
    "unknown-policy": bad_setting(
        *ON,
        "--krul-policy",
        "losless",
        shows="--krul-policy=losless: ",
        why="predictive, paper, fixed, lossless (did you mean 'lossless'?)",
    ),
    "negative-size": bad_setting(
        *ON, "--krul-host-memory", "-4GB", shows="--krul-host-memory=-4GB: ", why="such as 4GB"
    ),
    "no-size": bad_setting(
        *ON, "--krul-host-memory", "plenty", shows="--krul-host-memory=plenty: ", why="such as 4GB"
    ),
    "fraction": bad_setting(
        *ON, "--krul-recompute", "1.5", shows="--krul-recompute=1.5: ", why="from 0 to 1"
    ),
    "no-model": bad_setting(
        *ON,
        "--model-path",
        "/no/such/model",
        shows="--model-path=/no/such/model: ",
        why="no such file or folder",
    ),
    "rate": bad_setting(
        *ON, "--krul-link-bandwidth", "fast", shows="--krul-link-bandwidth=fast: ", why="16MB/s"
    ),
    "not-enabled": bad_setting(
        "--krul-policy",
        "lossless",
        shows="--krul-policy ",
        why="has no effect without --enable-krul; add it",
    ),
    "environment-typo": bad_setting(
        *ON,
        shows="unknown environment setting KRUL_POLICEY",
        why="did you mean KRUL_POLICY?",
        env={"KRUL_POLICEY": "lossless"},
    ),
    "environment-value": bad_setting(
        *ON, shows="KRUL_POLICY=exact: ", why="lossless", env={"KRUL_POLICY": "exact"}
    ),
    "version": bad_setting(
        *EXACT,
        shows="sglang==0.5.24 is installed",
        why="pip install sglang==0.5.23",
        version="0.5.24",
    ),
    "other-backend": flag("--radix-cache-backend", "other", shows="--radix-cache-backend=other"),
    "no-prefix-cache": flag("--disable-radix-cache", shows="--disable-radix-cache: "),
    "hicache": flag("--enable-hierarchical-cache", shows="--enable-hierarchical-cache: "),
    "hicache-alias": flag("--enable-hicache", shows="--enable-hierarchical-cache: "),
    "lmcache": flag("--enable-lmcache", shows="--enable-lmcache: "),
    "flexkv": flag("--enable-flexkv", shows="--enable-flexkv: "),
    "external-linker": flag(
        "--enable-unified-cache-external-linker", shows="--enable-unified-cache-external-linker: "
    ),
    "pd-prefill": flag("--disaggregation-mode", "prefill", shows="--disaggregation-mode=prefill: "),
    "pd-decode": flag("--disaggregation-mode", "decode", shows="--disaggregation-mode=decode: "),
    "speculative": flag(
        "--speculative-algorithm", "NGRAM", shows="--speculative-algorithm=NGRAM: "
    ),
    "pp": flag("--pp-size", "2", shows="--pp-size=2: "),
    "dp-attention": flag(*TP2, "--attn-dp-size", "2", shows="--attn-dp-size=2: "),
    "dp-attention-old": flag(
        *TP2, "--dp-size", "2", "--enable-dp-attention", shows="--attn-dp-size=2: "
    ),
    "ep": flag(*TP2, "--ep-size", "2", shows="--ep-size=2: ", model="mixtral"),
    "dcp": flag(*TP2, "--dcp-size", "2", shows="--dcp-size=2: "),
    "cp": flag(*TP2, "--attn-cp-size", "2", shows="--attn-cp-size=2: "),
    "kv-sharding": flag("--enable-kv-cache-sharding", shows="--enable-kv-cache-sharding: "),
    "hisparse": flag("--enable-hisparse", shows="--enable-hisparse: "),
    "pdmux": flag("--enable-pdmux", shows="--enable-pdmux: "),
    "diffusion": flag(
        "--dllm-algorithm", "LowConfidence", shows="--dllm-algorithm=LowConfidence: "
    ),
    "fp8-e5m2": flag("--kv-cache-dtype", "fp8_e5m2", shows="--kv-cache-dtype=fp8_e5m2: "),
    "fp8-e4m3": flag("--kv-cache-dtype", "fp8_e4m3", shows="--kv-cache-dtype=fp8_e4m3: "),
    "lora-lossy": flag(*LORA, shows="--enable-lora: ", why="add --krul-policy lossless"),
    "lora-disk": flag(
        *(*LORA, "--krul-dir", "tier"), shows="--enable-lora: ", why="drop --krul-dir", krul=EXACT
    ),
    "made-up-weights-disk": flag(
        *("--load-format", "dummy", "--krul-dir", "tier"),
        shows="--load-format=dummy: ",
        why="drop --krul-dir",
        krul=EXACT,
    ),
    "dir-file": flag(
        "--krul-dir", __file__, shows=f"--krul-dir={__file__}: ", why="a file, not a directory"
    ),
    "disk-without-dir": flag("--krul-disk", "1GB", shows="--krul-disk=", why="add --krul-dir PATH"),
    "deterministic-lossy": flag(
        "--enable-deterministic-inference",
        shows="--enable-deterministic-inference: ",
        why="add --krul-policy lossless",
    ),
    "switched-off-by-sglang": flag(
        "--enable-deterministic-inference",
        "--attention-backend",
        "flashinfer",
        shows="--enable-krul: ",
        why="SGLang itself switches the prefix cache off",
        krul=EXACT,
    ),
    "memory-saver": flag("--enable-memory-saver", shows="--enable-memory-saver: "),
    "streaming-session": flag("--enable-streaming-session", shows="--enable-streaming-session: "),
    "embedding-flag": flag("--is-embedding", shows="--is-embedding: "),
    "embedding-model": flag(model="bert", shows="--is-embedding: "),
    "multimodal": arch("multimodal", "multimodal"),
    "mla": arch("deepseek-mla", "(MLA)"),
    "mamba": arch("mamba", "recurrent state"),
    "linear-attention": arch("qwen3-next", "recurrent state"),
    "window-mistral": arch("mistral-window", "sliding attention window"),
    "window-qwen2": arch("qwen2-window", "sliding attention window"),
    "window-gemma3": arch("gemma3", "sliding attention window"),
}

ACCEPTED = {
    "llama": ("llama", EXACT),
    "llama-lossy": ("llama", ON),
    "qwen2": ("qwen2", EXACT),
    "qwen2-window-off": ("qwen2-window-off", EXACT),
    "mistral": ("mistral", EXACT),
    "mixtral": ("mixtral", EXACT),
    "kv-bf16": ("llama", (*ON, "--kv-cache-dtype", "bfloat16")),
    "lora-lossless": ("llama", (*EXACT, *LORA)),
    # The backends SGLang keeps the prefix cache on with; CPU kernels exist for none.
    "deterministic-lossless": (
        "llama",
        (*EXACT, "--enable-deterministic-inference", "--attention-backend", "triton"),
    ),
    "session-radix-cache": ("llama", (*ON, "--enable-session-radix-cache")),
    "tp": ("llama", (*ON, *TP2)),
    "dp": ("llama", (*ON, "--dp-size", "2")),
    "by-backend-name": ("llama", ("--radix-cache-backend", "krul")),
    "without-krul": ("mistral-window", ("--disable-radix-cache",)),
}

ENGINE = {
    "engine": {"radix_cache_backend": "krul"},
    "engine-hicache": {"radix_cache_backend": "krul", "enable_hierarchical_cache": True},
}


@pytest.fixture(scope="module")
def resolved(bare_configs, resolve) -> dict:
    """Every case above, resolved in one child: fields, and outcomes by name."""
    base = ["--device", "cpu", "--skip-tokenizer-init", "--model-path"]
    cases = {
        name: {"argv": [*base, str(bare_configs[model]), *flags], **more}
        for name, (model, flags, _, _, more) in REFUSED.items()
    }
    for name, (model, flags) in ACCEPTED.items():
        cases[name] = {"argv": [*base, str(bare_configs[model]), *flags]}
    # Plain SGLang does not care what KRUL_* says.
    cases["without-krul"]["env"] = {"KRUL_POLICY": "nonsense", "KRUL_TYPO": "1"}
    for name, kwargs in ENGINE.items():
        model = {"model_path": str(bare_configs["llama"]), "skip_tokenizer_init": True}
        cases[name] = {"engine": {"device": "cpu", **model, **kwargs}}
    assert len(cases) == len(REFUSED) + len(ACCEPTED) + len(ENGINE)
    answer = resolve(list(cases.values()))
    return {**answer, "by_name": dict(zip(cases, answer["outcomes"], strict=True))}


def refusal_lines(outcome: dict) -> list[str]:
    return [line for line in outcome["stderr"].splitlines() if line.startswith("krul: error: ")]


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(resolved, name):
    """Exit code 2; the last line names flag, value and reason; no traceback."""
    _, _, shows, why, _ = REFUSED[name]
    outcome = resolved["by_name"][name]
    assert outcome["exit"] == 2, outcome["error"]
    (line,) = refusal_lines(outcome)
    assert outcome["stderr"].rstrip().splitlines()[-1] == line
    assert line.removeprefix("krul: error: ").startswith(shows)
    assert why in line
    assert len(line) > len("krul: error: ") + len(shows) + 20, "no reason given"
    assert "Traceback" not in outcome["stderr"]


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(resolved, name):
    """What looks similar and works is not refused."""
    outcome = resolved["by_name"][name]
    assert outcome["exit"] is None, outcome["error"] or refusal_lines(outcome)
    assert not refusal_lines(outcome)


def test_engine_raises_instead_of_exiting(resolved):
    """From ``sglang.Engine`` the same checks run, as an exception."""
    assert resolved["by_name"]["engine"]["exit"] is None
    refused = resolved["by_name"]["engine-hicache"]
    assert refused["exit"] == 1
    assert refused["error"].startswith("KrulConfigError: --enable-hierarchical-cache: ")


def test_every_row_is_tested(resolved):
    """Each row of the table is what stopped at least one of the cases above."""
    lines = [line for name in REFUSED for line in refusal_lines(resolved["by_name"][name])]
    for row in compat.REFUSALS:
        assert any(f"{row.reason}; {row.fix}" in line for line in lines), row.flag


class Names:
    """Answers None to every attribute and remembers its name."""

    def __init__(self) -> None:
        self.asked: set[str] = set()

    def __getattr__(self, name: str) -> None:
        self.asked.add(name)


@pytest.mark.parametrize("policy", ["predictive", "lossless"])
def test_rows_read_names_that_exist(resolved, policy):
    """A row that reads a setting SGLang does not have would never apply."""
    settings, model = Names(), Names()
    for row in compat.REFUSALS:
        assert not row.applies(settings, model, KrulConfig(policy=policy)) or row.flag in (
            "--is-embedding",
            "--disaggregation-mode",
            "--kv-cache-dtype",
        )
    unknown = settings.asked - set(resolved["fields"]) - {"_raw_input"}
    assert not unknown
    # Of a language model without a window: attributes it has, whatever their values.
    unknown = model.asked - set(resolved["by_name"]["llama"]["model"])
    assert not unknown


@pytest.mark.parametrize(
    ("command", "flags", "shows"),
    [
        (
            (sys.executable, "-m", "sglang.launch_server"),
            ("--krul-policy", "none"),
            "--krul-policy=none: ",
        ),
        (
            (str(Path(sys.executable).with_name("sglang")), "serve"),
            ("--enable-lmcache",),
            "--enable-lmcache: ",
        ),
    ],
    ids=["launch_server", "sglang-serve"],
)
def test_command_line_ends_with_the_line(bare_configs, tmp_path, command, flags, shows):
    """Both of SGLang's own commands: exit code 2, the line last, no traceback."""
    model = ["--model-path", str(bare_configs["llama"]), "--device", "cpu"]
    done = subprocess.run(
        [*command, *model, "--skip-tokenizer-init", *ON, *flags],
        capture_output=True,
        text=True,
        env=server_environment(),
        cwd=tmp_path,
        timeout=200,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    # `sglang serve` logs one more line of its own on every exit.
    lines = [x for x in done.stderr.rstrip().splitlines() if "kill_process_tree called" not in x]
    assert lines[-1].startswith(f"krul: error: {shows}")
    assert "Traceback" not in done.stderr + done.stdout
