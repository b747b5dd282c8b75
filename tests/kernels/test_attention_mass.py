"""Attention mass against a full softmax in float64; Triton against the reference."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from krul_kernels import attention_mass
from krul_kernels.attention_mass import block_sums, reference, window_attention_mass
from mass_cases import Case, int32, make_case


def brute_force(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, key list by key list, in float64."""
    q, cache = case["q"].double(), case["k_cache"].double()
    page_size, kv_heads = cache.shape[1:3]
    lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float64)
    masses = [torch.zeros(0, kv_heads, dtype=torch.float64)]
    for request, last in enumerate(case["paged_kv_last_page_len"].tolist()):
        first, end = case["paged_kv_indptr"][request : request + 2].tolist()
        keys = cache[case["paged_kv_indices"][first:end].long()].flatten(0, 1)
        keys = keys[: max(0, (end - first - 1) * page_size + last)]
        mass = torch.zeros(len(keys), kv_heads, dtype=torch.float64)
        for row in range(*case["qo_indptr"][request : request + 2].tolist()):
            seen = max(0, min(len(keys), int(case["q_positions"][row]) + 1))
            for head in range(q.shape[1] if seen else 0):
                kv_head = head // (q.shape[1] // kv_heads)
                logits = keys[:seen, kv_head] @ q[row, head] * case["sm_scale"]
                lse[row, head] = torch.logsumexp(logits, 0) / math.log(2)
                weight = 1.0 if case["weights"] is None else float(case["weights"][row])
                mass[:seen, kv_head] += weight * torch.softmax(logits, 0)
        masses.append(mass)
    return torch.cat(masses), lse


def assert_close(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> None:
    for name, a, b in zip(("mass", "lse"), found, wanted, strict=True):
        torch.testing.assert_close(a.cpu().double(), b.double(), atol=1e-4, rtol=0, msg=name)


RAGGED = ([1, 37, 16, 50], [[0, 0], [36, 3, 20], [], [49, 48, 0, -1, 90]])
"""A request of one key, odd lengths, one without rows, a row that sees nothing, one past the end"""


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (8, 2), (8, 1)])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("page_size", [1, 16])
def test_mass_and_lse_are_those_of_a_full_softmax(heads, dim, page_size):
    case = make_case(*RAGGED, heads=heads, dim=dim, page_size=page_size)
    mass, lse = window_attention_mass(**case)
    assert mass.dtype == lse.dtype == torch.float32
    assert_close((mass, lse), brute_force(case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
def test_every_dtype_accumulates_in_float32_or_better(dtype, weighted):
    case = make_case(*RAGGED, dtype=dtype, weighted=weighted)
    mass, lse = window_attention_mass(**case)
    assert mass.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close((mass, lse), brute_force(case))


@pytest.mark.parametrize("held", [1, 100, 300, 999])
@pytest.mark.parametrize("page_size", [1, 16])
def test_chunks_need_not_fit_the_lengths(monkeypatch, held, page_size):
    monkeypatch.setattr(attention_mass, "HELD", held)
    case = make_case(*RAGGED, page_size=page_size)
    assert_close(window_attention_mass(**case), brute_force(case))


def test_more_keys_than_a_chunk(monkeypatch):
    """Chunks end before all that a row sees, and begin beyond it."""
    monkeypatch.setattr(attention_mass, "HELD", 3 * 4 * 1024)
    case = make_case([2500, 1024], [[2499, 900, 2000], [1023, 5]])
    assert_close(window_attention_mass(**case), brute_force(case))


def test_a_row_that_sees_no_key_has_no_mass():
    case = make_case([5, 0], [[-1], [3]])
    mass, lse = window_attention_mass(**case)
    assert not mass.any()
    assert torch.equal(lse, torch.full_like(lse, -math.inf))


@pytest.mark.parametrize("lengths", [[], [7]])
def test_nothing_to_do(lengths):
    case = make_case(lengths, [[]] * len(lengths))
    mass, lse = window_attention_mass(**case)
    assert mass.shape == (sum(lengths), 2)
    assert not mass.any()
    assert lse.shape == (0, 4)


def test_an_sglang_pool_is_a_cache_of_one_token_pages():
    case = make_case([9], [[8, 4]], page_size=1)
    pool = torch.zeros(case["k_cache"].shape[0], 2, 2, 64)
    pool[:, :, 1] = case["k_cache"][:, 0]
    strided = window_attention_mass(**{**case, "k_cache": pool[:, :, 1].unsqueeze(1)})
    assert_close(strided, window_attention_mass(**case))


def test_block_sums_follow_the_requests():
    mass = torch.arange(1.0, 9.0).unsqueeze(1)
    sums = block_sums(mass, int32([0, 5, 5, 8]), 2)
    assert sums.flatten().tolist() == [3, 7, 5, 13, 8]


def test_wrong_arguments_are_refused():
    case = make_case([5], [[4]])
    for name, value, words in (
        ("q", case["q"][:, :3], "do not share"),
        ("q", case["q"][..., :32], "head_dim"),
        ("q", case["q"].half(), "one float type"),
        ("k_cache", case["k_cache"].transpose(2, 3).contiguous().transpose(2, 3), "dense"),
        ("q_positions", case["q_positions"].long(), "q_positions must be"),
        ("paged_kv_indptr", int32([0, 1, 1]), "paged_kv_indptr must be"),
        ("weights", torch.ones(2), "weights must be"),
        ("total_kv", 6, "total_kv is 6"),
        ("qo_indptr", int32([0, 2]), "q has 1 rows"),
    ):
        with pytest.raises(ValueError, match=words):
            window_attention_mass(**{**case, name: value})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_op_is_a_good_torch_citizen(dtype, weighted):
    case = make_case([5, 18], [[4, 2], [17]], dtype=dtype, weighted=weighted)
    torch.library.opcheck(torch.ops.krul.window_attention_mass, (*case.values(), 23))


def peak_bytes(case: Case, total_kv: int) -> int:
    """The most that torch's CPU allocator held for the reference at any moment."""
    with torch.profiler.profile(profile_memory=True) as profile:
        reference(**case, total_kv=total_kv)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_memory_follows_the_chunk_not_the_keys(monkeypatch):
    one_chunk = 64 * 4 * 128 * 4  # rows x heads x keys, float32
    monkeypatch.setattr(attention_mass, "HELD", one_chunk // 4)
    rows = list(range(4000, 4064))
    short = peak_bytes(make_case([4096], [rows]), 4096)
    long = peak_bytes(make_case([16384], [rows]), 16384)
    outputs = 2 * 4 * (16384 - 4096)
    assert one_chunk < short < 6 * one_chunk
    assert long - short < 3 * outputs + one_chunk
    assert long < 64 * 4 * 16384 * 4 / 10  # the map


quiet = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
"""The interpreter is numpy: -inf and what a mask discards are warnings there."""

TRITON_CASES = {
    "ragged": {},
    "group of 3": {"heads": (6, 2)},
    "group of 8, one-token pages": {"heads": (8, 1), "page_size": 1},
    "wide": {"dim": 128, "weighted": False},
    "odd width": {"dim": 48},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
}


def on(device: str, case: Case) -> Case:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in case.items()}


@quiet
@pytest.mark.parametrize("options", TRITON_CASES.values(), ids=TRITON_CASES)
def test_triton_equals_the_reference(triton_device, options):
    from krul_kernels import attention_mass_triton

    if triton_device == "cpu" and options.get("dtype") == torch.bfloat16:
        # `create_dot` of Triton 3.9's runtime/interpreter.py.
        pytest.skip("Triton's interpreter multiplies bfloat16's bits as integers")
    case = make_case(*RAGGED, **options)
    total = sum(RAGGED[0])
    found = attention_mass_triton.run(**on(triton_device, case), total_kv=total)
    assert_close(found, reference(**case, total_kv=total))


@quiet
def test_triton_walks_several_tiles_of_rows_and_keys(triton_device):
    from krul_kernels import attention_mass_triton

    case = make_case([300, 1, 129], [list(range(200, 300, 3)), [0], [128] * 20], heads=(8, 2))
    found = attention_mass_triton.run(**on(triton_device, case), total_kv=430)
    assert_close(found, reference(**case, total_kv=430))


@pytest.mark.parametrize("lengths", [[], [7], [0]])
def test_triton_has_nothing_to_do(triton_device, lengths):
    from krul_kernels import attention_mass_triton

    case = make_case(lengths, [[]] * len(lengths))
    mass, lse = attention_mass_triton.run(**on(triton_device, case), total_kv=sum(lengths))
    assert not mass.any()
    assert lse.shape == (0, 4)


def test_kernels_in_a_process_of_their_own(interpreted):
    interpreted(Path(__file__))


def compile_kernels(architecture: int) -> None:
    """Both kernels to machine code, which needs no GPU (but no interpreter either)."""
    import triton
    from krul_kernels import attention_mass_triton as kernels
    from triton.backends.compiler import GPUTarget

    rows, keys = kernels._tiles(64, torch.bfloat16)
    sizes = {"GROUP": 4, "PAGE": 1, "DIM": 64, "DIM_PAD": 64, "ROWS": rows, "KEYS": keys}
    sizes |= {"BATCH": 8, "WEIGHTED": True}
    types = dict.fromkeys(sizes, "constexpr") | {"q": "*bf16", "k": "*bf16", "scale": "fp32"}
    types |= dict.fromkeys(("lse", "mass", "weights"), "*fp32")
    types |= dict.fromkeys(("pages", "positions"), "*i32")
    for kernel in (kernels._lse_pass, kernels._mass_pass):
        source = triton.compiler.ASTSource(
            kernel,
            {n: types.get(n, "*i32" if n.endswith("indptr") else "i32") for n in kernel.arg_names},
            {(i,): sizes[name] for i, name in enumerate(kernel.arg_names) if name in sizes},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= 100 * 1024


def test_kernels_compile_for_a_gpu(tmp_path):
    """The interpreter accepts what the compiler does not."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", "import test_attention_mass as t; t.compile_kernels(90)"],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        | {"PYTHONPATH": str(Path(__file__).parent), "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda_runs_the_triton_version():
    case = make_case(*RAGGED, dtype=torch.bfloat16)
    assert_close(window_attention_mass(**on("cuda", case)), brute_force(case))
