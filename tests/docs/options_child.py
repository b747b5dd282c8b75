"""Child program: which long options do programs have that are slow to ask?

Reads a JSON list on stdin: paths of scripts, or "sglang" for SGLang's server with Krul's plugin
loaded. Writes ``{name: [options]}`` on stdout. One process for all, because each would import
torch anew.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import sys
import traceback
from pathlib import Path


def of_sglang() -> list[str]:
    """What `python -m sglang.launch_server` takes."""
    import argparse

    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return sorted(name for name in parser._option_string_actions if name.startswith("--"))


def of_script(script: str) -> list[str]:
    """What a script's --help says."""
    before, path, said = set(sys.modules), list(sys.path), io.StringIO()
    sys.argv = [script, "--help"]
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_path(script, run_name="__main__")
    except SystemExit:
        pass
    except Exception:
        return [f"failed: {traceback.format_exc()}"]
    finally:
        # Scripts of different folders have neighbours of the same name.
        sys.path[:] = path
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).is_relative_to(Path(script).resolve().parent):
                del sys.modules[name]
    return sorted(set(re.findall(r"(?<![\w-])--[\w-]+", said.getvalue())))


def main() -> None:
    """Answer."""
    answer = {}
    for name in json.load(sys.stdin):
        answer[name] = of_sglang() if name == "sglang" else of_script(name)
    print("OPTIONS" + json.dumps(answer))


if __name__ == "__main__":
    main()
