"""Compiles the packed kernels for a GPU that need not be there: ``python packed_compile.py 90``.

A process of its own, because in one that interprets Triton nothing can be compiled.
"""

from __future__ import annotations

import sys
from typing import Any

import triton
from krul_kernels.packed import pool_triton, symbols_triton, transform_triton
from krul_kernels.packed.layout import BLOCK
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {
    **dict.fromkeys(("frame", "low", "high"), "*u8"),
    **dict.fromkeys(("cells", "blocks", "counts", "before", "words", "highest"), "*i32"),
    **dict.fromkeys(("symbols", "ends", "widths"), "*i32"),
    **dict.fromkeys(("order", "rows"), "*i64"),
    **dict.fromkeys(("cos", "sin", "x", "scales", "below", "down", "projected", "bias"), "*fp32"),
    **dict.fromkeys(("up", "inverse", "residual", "forward"), "*fp32"),
    **dict.fromkeys(("scale", "rounding"), "fp32"),
}
"""Every argument that is no int32."""


def compile_kernel(
    kernel: Any, capability: int, constants: dict[str, int | bool], **types: str
) -> str:
    """Its PTX; raises where Triton or ptxas does."""
    names = kernel.arg_names
    kinds = {**dict.fromkeys(names, "i32"), **POINTERS, **types}
    signature = {name: "constexpr" if name in constants else kinds[name] for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=values)
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": transform_triton.WARPS}
    return triton.compile(source, target=target, options=options).asm["ptx"]


def main(capability: int) -> None:
    """Compile all; products must not have become TF32."""
    block = {"BLOCK": BLOCK}
    compile_kernel(symbols_triton._count_packed, capability, block)
    compile_kernel(symbols_triton._unpack, capability, block, out="*i32")
    compile_kernel(symbols_triton._count_symbols, capability, block)
    compile_kernel(symbols_triton._pack, capability, block)
    one = transform_triton
    tile: dict[str, int | bool] = {
        "TOKENS": one.TOKENS,
        "COLUMNS": one.COLUMNS,
        "DEPTH": one.DEPTH,
    }
    for ptx in (
        compile_kernel(one._project, capability, tile, out="*fp32"),
        compile_kernel(one._rebuild, capability, {**tile, "CLASSES": 4}, out="*fp32"),
        compile_kernel(one._quantize, capability, {**tile, "CLASSES": 4}, out="*i32"),
    ):
        assert "fma.rn.f32" in ptx
        assert "mma" not in ptx
    for to_pool in (False, True):
        sizes = {"TO_POOL": to_pool, "TOKENS": pool_triton.TOKENS, "HALF": 32, "VALUE": 64}
        for rest in (0, 32):
            constants = {**sizes, "REST": rest}
            ptx = compile_kernel(
                pool_triton._exchange, capability, constants, k_pool="*bf16", v_pool="*fp16"
            )
            assert not to_pool or "cvt.rn.bf16" in ptx


if __name__ == "__main__":
    main(int(sys.argv[1]))
