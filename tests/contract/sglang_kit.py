"""Imports SGLang's unified radix cache kit where the `datasets` package is missing.

The kit imports `sglang.test.test_utils`, which imports the serving benchmark, which
imports `datasets.load_dataset` (sglang/benchmark/datasets/mmmu.py). Serving does not need
that package and the light installation leaves it out, so an empty one stands in while the
kit is imported, and is gone before anybody else could mistake it for the real one.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

_stand_in = find_spec("datasets") is None
if _stand_in:
    sys.modules["datasets"] = ModuleType("datasets")
    sys.modules["datasets"].load_dataset = None
try:
    from sglang.test.kits.unified_radix_cache import core, fixtures, kv_events
    from sglang.test.kits.unified_radix_cache.config import CONFIGS, CacheConfig
    from sglang.test.kits.unified_radix_cache.mixins import UnifiedRadixCacheFixtures
    from sglang.test.mem_cache_utils import finish_req
    from sglang.test.test_utils import CustomTestCase
finally:
    if _stand_in:
        del sys.modules["datasets"]

KIT_FOLDER = Path(fixtures.__file__).parent

__all__ = [
    "CONFIGS",
    "KIT_FOLDER",
    "CacheConfig",
    "CustomTestCase",
    "UnifiedRadixCacheFixtures",
    "core",
    "finish_req",
    "fixtures",
    "kv_events",
]
