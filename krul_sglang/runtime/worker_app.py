"""SGLang's HTTP application for a worker process of ``--tokenizer-worker-num``.

Such a process imports an application by name and nothing else, so plugins are loaded here:
before the application builds its tokenizer manager.
"""

from sglang.srt.entrypoints.http_server import app
from sglang.srt.plugins import load_plugins

load_plugins()

__all__ = ["app"]
