"""``krul``: the command line. Heavy imports happen inside the commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from krul_sglang import __version__
from krul_sglang.config import KrulConfigError, flags_table

app = typer.Typer(
    help="Krul for SGLang: keep evicted conversations, compressed, and bring them back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

NAMES_MODEL = {"--model-path", "--model", "--config", "--help", "-h"}
"""Flags of SGLang's server one of which `krul serve` needs."""
LOOK = "A running server"
KEEP = "A directory of the disk tier (--krul-dir)"
OWN = "This installation"


def _print_version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Krul for SGLang: keep evicted conversations, compressed, and bring them back."""


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def serve(context: typer.Context) -> None:
    """Start SGLang's server with Krul: `krul serve --model-path DIR`, and any flag of SGLang's.

    The same as `python -m sglang.launch_server --enable-krul ...`, with the
    environment a CPU-only host needs. `krul serve --help` shows SGLang's flags and
    Krul's.
    """
    from krul_sglang.live_server import has_gpu, server_environment

    flags = [*context.args]
    if not {flag.partition("=")[0] for flag in flags} & NAMES_MODEL:
        print("krul serve: error: which model? give --model-path DIR", file=sys.stderr)
        raise typer.Exit(2)
    if "--enable-krul" not in flags:
        flags.append("--enable-krul")
    if not has_gpu() and "--device" not in flags:
        flags += ["--device", "cpu"]
    command = [sys.executable, "-m", "sglang.launch_server", *flags]
    os.execve(sys.executable, command, server_environment())


@app.command(rich_help_panel=OWN)
def doctor(
    model: Annotated[
        Path | None, typer.Option(help="Also check whether this model can be served.")
    ] = None,
) -> None:
    """Check this installation, one line a check, with the fix; exit code 1 if it cannot serve."""
    from krul_sglang.doctor import run

    raise typer.Exit(run(model))


@app.command()
def calibrate(
    model: Annotated[Path, typer.Option(help="The model's folder.")],
    text: Annotated[
        list[Path] | None, typer.Option(help="A file of prose to calibrate on; repeatable.")
    ] = None,
    conversations: Annotated[
        Path | None, typer.Option(help='JSON Lines of {"id", "messages": [{"role", "content"}]}.')
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to write; by default the user's cache folder.")
    ] = None,
    tp_size: Annotated[int, typer.Option(min=1, help="Tensor parallel ranks, a file each.")] = 1,
) -> None:
    """Measure a model once for the `predictive` policy; without texts it generates its own.

    A server's first start does this by itself. Give --out, and the server --krul-profile,
    to keep the profile elsewhere or to calibrate on your own texts.
    """
    from krul_sglang.profile.command import run

    _run("calibrate", lambda: run(model, text or [], conversations, out, tp_size))


@app.command()
def quality(
    model: Annotated[Path, typer.Option(help="The model's folder.")],
    conversations: Annotated[
        Path, typer.Option(help='JSON Lines of {"id", "messages": [{"role", "content"}]}.')
    ],
    policies: Annotated[
        str,
        typer.Option(help="Comma-separated: predictive, paper, fixed, lossless; predictive@NATS."),
    ] = "predictive,lossless",
    history: Annotated[int, typer.Option(min=8, help="Tokens that are stored.")] = 1000,
    continuation: Annotated[
        int, typer.Option(min=2, help="Tokens after them that are compared.")
    ] = 120,
    budget: Annotated[float, typer.Option(help="Quality budget in nats of mean KL.")] = 0.01,
    profile: Annotated[
        Path | None, typer.Option(help="The model's profile; by default its own, made if missing.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write all figures to this file.")] = None,
) -> None:
    """Measure what restoring costs: next-token KL, agreement and bytes, policy by policy.

    Each conversation's first tokens are stored and restored, and the tokens after them
    compared with an untouched cache, teacher-forced, in float32.
    """
    from krul_sglang.quality.command import run

    _run(
        "quality",
        lambda: run(
            model,
            conversations,
            policies.split(","),
            history=history,
            continuation=continuation,
            budget=budget,
            profile=profile,
            out=json,
        ),
    )


@app.command(rich_help_panel=LOOK)
def inspect(
    conversation: Annotated[
        str | None, typer.Argument(help="Its id, or how the id begins; without it, a list.")
    ] = None,
    url: Annotated[str, typer.Option(help="The server's address.")] = "http://127.0.0.1:30000",
    detail: Annotated[
        bool, typer.Option("--detail", help="Layer by layer; of the newest stored one by default.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the server's JSON.")] = False,
    png: Annotated[Path | None, typer.Option(help="Draw the detail into this file.")] = None,
    limit: Annotated[
        int, typer.Option(min=1, max=200, help="Conversations to list, the newest.")
    ] = 20,
    api_key: Annotated[
        str | None, typer.Option(help="Where the server has an --admin-api-key or --api-key.")
    ] = None,
    dir: Annotated[
        Path | None,
        typer.Option(help="Show what this --krul-dir holds instead; no server is needed."),
    ] = None,
) -> None:
    """Show what is stored of conversations: by a running server, or in a disk tier's directory.

    `krul inspect` asks the server at --url; `krul inspect --dir DIR` reads the headers of the
    files a server keeps in its --krul-dir, whether or not one is running.
    """
    from krul_sglang.inspection.command import run

    if dir is not None:
        _inspect_directory(dir, conversation, limit, json, of_server=detail or png is not None)
    _run(
        "inspect",
        lambda: run(
            url, conversation, detail=detail, json=json, png=png, limit=limit, api_key=api_key
        ),
    )


def _inspect_directory(
    directory: Path, conversation: str | None, limit: int, json: bool, of_server: bool
) -> NoReturn:
    from krul_sglang.upkeep.stored import run

    if of_server:
        print(
            "krul inspect: error: --detail and --png ask a running server; drop --dir",
            file=sys.stderr,
        )
        raise typer.Exit(2)
    _run("inspect", lambda: run(directory, conversation, limit, json))


@app.command(rich_help_panel=KEEP)
def verify(
    directory: Annotated[Path, typer.Argument(help="The server's --krul-dir.")],
    json: Annotated[bool, typer.Option("--json", help="Print figures as JSON.")] = False,
) -> None:
    """Read and check every byte of every entry in a disk tier's directory.

    What is damaged moves to quarantine/ below it, so that no server finds it again: for a server
    that is running it is a miss, computed anew and stored again. Exit code 0 when all is sound, 1
    when anything was damaged or unreadable, 2 for a directory that is none. Reads everything once:
    it takes as long as copying the directory.
    """
    from krul_sglang.upkeep.verify import run

    _run("verify", lambda: run(directory, json))


@app.command(rich_help_panel=KEEP)
def gc(
    directory: Annotated[Path, typer.Argument(help="The server's --krul-dir.")],
    limit: Annotated[
        str | None, typer.Option(help="Remove the least recently used until this much is left.")
    ] = None,
    unused_for: Annotated[
        str | None, typer.Option(help="Remove what nobody used for 30d, 12h, 90min or 45s.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print figures as JSON.")] = False,
) -> None:
    """Make room in a disk tier's directory: `krul gc DIR --limit 20GB --unused-for 30d`.

    Without options it only clears up: files of writers that died, empty folders, and quarantine
    beyond its bounds. Servers keep to their --krul-disk by themselves; this is for less than that,
    or for a directory no server uses any more. Safe beside running servers: what it removes is a
    miss for them.
    """
    from krul_sglang.upkeep.gc import run

    _run("gc", lambda: run(directory, limit, unused_for, json))


@app.command(rich_help_panel=KEEP)
def forget(
    where: Annotated[
        str, typer.Argument(help="The server's --krul-dir, or the URL of its --krul-remote.")
    ],
    cache_salt: Annotated[
        str | None, typer.Option(help="The tenant's `cache_salt`, as its requests carry it.")
    ] = None,
    extra_key: Annotated[
        str | None, typer.Option(help="The tenant's `extra_key`, as its requests carry it.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print figures as JSON.")] = False,
) -> None:
    """Erase one tenant from a disk tier's directory or a remote tier: all that was stored under
    its salt or key.

    Both together name what was stored under both. Entries and quarantined files whose header
    cannot be read go too. A running server keeps what it holds in memory: stop it or flush it
    first (`POST /flush_cache`). File systems may keep removed bytes until they are overwritten.
    """
    from krul_sglang.upkeep.forget import run

    _run("forget", lambda: run(where, cache_salt, extra_key, json))


def _run(command: str, action: Callable[[], int | None]) -> NoReturn:
    """Do it, and end with the exit code it returns; what is wrong is one line and exit code 2."""
    try:
        raise typer.Exit(action() or 0)
    except (OSError, ValueError) as error:
        line = str(error)
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            line = f"{error.filename}: {error.strerror.lower()}"
        print(f"krul {command}: error: {line}", file=sys.stderr)
        raise typer.Exit(2) from None


@app.command(rich_help_panel=LOOK)
def trace(
    url: Annotated[str, typer.Option(help="The server's address.")] = "http://127.0.0.1:30000",
    limit: Annotated[int, typer.Option(min=1, max=64, help="Restores to show, the newest.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="Print the server's JSON.")] = False,
    png: Annotated[
        Path | None, typer.Option(help="Draw the newest one's two lanes into this file.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Where the server has an --admin-api-key or --api-key.")
    ] = None,
) -> None:
    """Show what the last restores did and when: loading, computing, and the bubbles in both.

    `load` and `compute` are the seconds each stream worked, `idle` the share of the restore in
    which it stood still. Much idle compute: the link or the decoders are slow. `--png` draws both.
    """
    from krul_sglang.inspection.trace import run

    _run("trace", lambda: run(url, limit=limit, json=json, png=png, api_key=api_key))


@app.command(rich_help_panel=LOOK)
def top(
    url: Annotated[str, typer.Option(help="The server's address.")] = "http://127.0.0.1:30000",
    once: Annotated[
        bool,
        typer.Option("--once", help="Print it once; so it is where the output is no terminal."),
    ] = False,
    interval: Annotated[
        float, typer.Option(min=0.2, max=60, help="Seconds between two looks at the server.")
    ] = 1.0,
    api_key: Annotated[
        str | None, typer.Option(help="Where the server has an --admin-api-key or --api-key.")
    ] = None,
) -> None:
    """Watch a running server: tiers against their budgets, restores, evictions; Ctrl-C ends it."""
    from krul_sglang.inspection.top import run

    _run("top", lambda: run(url, once=once, interval=interval, api_key=api_key))


@app.command("cpu-host", rich_help_panel=OWN)
def cpu_host() -> None:
    """Activate SGLang's CPU stand-ins in this environment (hosts without a GPU)."""
    from krul_sglang.cpu_host.install import install

    print(f"installed {install()}")


@app.command(rich_help_panel=OWN)
def docs(
    folder: Annotated[Path, typer.Option(help="The docs folder to write to.")] = Path("docs"),
) -> None:
    """Regenerate the generated parts of the documentation."""
    from krul_sglang.runtime import metrics
    from krul_sglang.runtime.compat import refusals_table

    pages = {
        "flags.md": flags_table(),
        "compatibility.md": refusals_table(),
        "metrics.md": metrics.table(),
    }
    if not (folder / "flags.md").is_file():
        print(f"krul docs: error: --folder={folder}: no docs of Krul's there", file=sys.stderr)
        raise typer.Exit(2)
    for name, table in pages.items():
        rewrite_generated(folder / name, table)


BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"


def rewrite_generated(path: Path, text: str) -> None:
    """Replace what stands between the generated markers of a Markdown file."""
    page = path.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n{text}{END}{after}")


def main() -> None:
    """Entry point; whatever is wrong with what was asked is one line and exit code 2."""
    try:
        raise SystemExit(app(prog_name="krul", standalone_mode=False))
    except KrulConfigError as error:
        print(f"krul: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (KeyboardInterrupt, typer.Abort):
        raise SystemExit(130) from None
    except Exception as error:
        # Typer's usage errors; it has no name of its own for them.
        message, context = getattr(error, "format_message", None), getattr(error, "ctx", None)
        if message is None:
            raise
        if not message():  # nothing was asked, and help was shown
            raise SystemExit(2) from None
        name = context.command_path if context else "krul"
        print(f"{name}: error: {message().rstrip('.')} (see `{name} --help`)", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
