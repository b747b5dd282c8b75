"""Child program: resolve SGLang argument lists with Krul's plugin loaded, start nothing.

Reads ``{"warm": case, "cases": [...]}`` on stdin; a case is ``{"argv": [...]}`` for a
command line or ``{"engine": {...}}`` for ``sglang.Engine``'s keyword arguments, with
optional ``env``, ``version`` (what SGLang then claims to be) and ``launch`` (go on to the
last check before processes are started). Writes on stdout
``{"fields": [...], "outcomes": [{"exit", "error", "stderr", "model"}, ...]}``: the names
of SGLang's settings; per case the exit code, the exception as text, everything printed,
and the names a resolved model configuration has. Each case runs in a fork of its own,
because resolution writes to the environment and to module state. ``warm`` is resolved
once before, which imports what the forks would each import again (60 ms a case, not 400).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback


def resolve(case: dict) -> dict:
    """Resolve one case in this process."""
    import sglang
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.server_args import ServerArgs, prepare_server_args

    if "version" in case:
        sglang.__version__ = case["version"]
    os.environ.update(case.get("env", {}))
    try:
        if "engine" in case:
            record = ServerArgs(**case["engine"])
        else:
            record = prepare_server_args(case["argv"])
        record.resolve_once()
        if case.get("launch"):
            record.check_server_args()
    except SystemExit as stop:
        return {"exit": stop.code, "error": None}
    except BaseException as error:
        traceback.print_exc()
        return {"exit": 1, "error": f"{type(error).__name__}: {error}"}
    return {"exit": None, "error": None, "model": sorted(vars(model_config_of(record)))}


def in_fork(case: dict) -> dict:
    """Resolve one case in a fork; its stderr comes back with the outcome."""
    with tempfile.TemporaryFile() as outcome, tempfile.TemporaryFile() as errors:
        pid = os.fork()
        if pid == 0:
            os.dup2(errors.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            try:
                outcome.write(json.dumps(resolve(case)).encode())
                outcome.flush()
            finally:
                sys.stderr.flush()
                os._exit(0)
        os.waitpid(pid, 0)
        outcome.seek(0)
        errors.seek(0)
        found = json.loads(outcome.read() or b'{"exit": 1, "error": "the case died"}')
        return {**found, "stderr": errors.read().decode(errors="replace")}


def main() -> None:
    """Load everything once, then one fork a case."""
    from sglang.srt.arg_groups import pipeline  # noqa: F401
    from sglang.srt.arg_groups.arg_utils import record_fields
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    given = json.load(sys.stdin)
    environment = dict(os.environ)
    resolve(given["warm"])
    os.environ.clear()
    os.environ.update(environment)
    cases = given["cases"]
    fields = [field.name for field in record_fields(ServerArgs)]
    json.dump({"fields": fields, "outcomes": [in_fork(case) for case in cases]}, sys.stdout)


if __name__ == "__main__":
    main()
