"""The FlashInfer hooks on a plain-torch stand-in, and against FlashInfer's signatures."""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
from typing import Any

import pytest
import torch
from krul_kernels.attention_mass import block_sums, kv_indptr, window_attention_mass
from krul_kernels.flashinfer_hooks import (
    VARIANT_DECLARATION,
    VARIANT_NAME,
    FlashInferMissing,
    block_mass,
    load_flashinfer,
    prefill_wrapper,
    sampled_logits,
    sampled_logits_wrapper,
    variant_jit_args,
)

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("flashinfer") is None,
    reason="needs an NVIDIA GPU and FlashInfer",
)


class PlainWrapper:
    """What the hooks use of FlashInfer's wrapper, in plain torch: causal is bottom-right."""

    calls: list[dict[str, Any]]

    def __init__(self) -> None:
        self.calls = []

    def plan(self, *args: Any, **kwargs: Any) -> None:
        self.planned, self.options = args, kwargs
        self.calls.append({"plan": (args, kwargs)})

    def run(self, q: torch.Tensor, paged_kv_cache: Any, *extra: Any, **kwargs: Any) -> Any:
        self.calls[-1]["run"] = ((q, paged_kv_cache, *extra), kwargs)
        qo_indptr, kv_starts, pages, last, heads, kv_heads, dim, page_size = self.planned
        for length in (qo_indptr.diff(), kv_starts.diff()):
            assert (length > 0).all(), "FlashInfer has no use for an empty request"
        lse = torch.empty(q.shape[:2])
        scale = self.options["sm_scale"] or dim**-0.5
        for request, kept in enumerate(last.tolist()):
            assert 1 <= kept <= page_size
            rows = slice(*qo_indptr[request : request + 2].tolist())
            first, end = kv_starts[request : request + 2].tolist()
            keys = paged_kv_cache[0][pages[first:end].long()].flatten(0, 1)
            keys = keys[: (end - first - 1) * page_size + kept].float()
            keys = keys.repeat_interleave(heads // kv_heads, 1)
            logits = torch.einsum("rhd,khd->rhk", q[rows].float(), keys) * scale
            if self.options.get("causal"):
                count, length = len(logits), len(keys)
                hidden = torch.ones(count, length).triu(length - count + 1).bool()
                logits.masked_fill_(hidden[:, None], -math.inf)
            lse[rows] = torch.logsumexp(logits, 2) / math.log(2)
        return q, lse


def make_case(lengths: list[int], counts: list[int], page_size: int = 4) -> dict[str, torch.Tensor]:
    """Requests whose last ``counts`` rows are queries, for the hooks and for the op."""
    draw = torch.Generator().manual_seed(0)
    pages = [-(-length // page_size) for length in lengths]
    return {
        "q": torch.randn(sum(counts), 4, 16, generator=draw),
        "qo_indptr": _starts(counts),
        "k_cache": torch.randn(sum(pages) + 2, page_size, 2, 16, generator=draw),
        "paged_kv_indptr": _starts(pages),
        "paged_kv_indices": torch.randperm(sum(pages) + 2, generator=draw)[: sum(pages)].int(),
        "paged_kv_last_page_len": torch.tensor(
            [(length - 1) % page_size + 1 for length in lengths], dtype=torch.int32
        ),
    }


def _starts(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _positions(lengths: list[int], counts: list[int]) -> torch.Tensor:
    rows = [torch.arange(n - c, n) for n, c in zip(lengths, counts, strict=True)]
    return torch.cat(rows).int()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block_size", [4, 8, 40])
@pytest.mark.parametrize(
    ("lengths", "counts"),
    [([33, 9], [5, 2]), ([1, 30], [1, 30]), ([16, 17], [9, 17])],
    ids=["window in the last block", "all rows", "window over blocks"],
)
def test_block_mass_is_the_ops_mass_summed(lengths, counts, block_size, causal):
    case = make_case(lengths, counts)
    found = block_mass(PlainWrapper(), **case, block_size=block_size, causal=causal)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(1), torch.ones_like(found[:, 0]), atol=1e-5, rtol=0)

    positions = _positions(lengths, counts)
    mass, _ = window_attention_mass(
        **case, q_positions=positions if causal else torch.full_like(positions, 1000)
    )
    indptr = kv_indptr(case["paged_kv_indptr"], case["paged_kv_last_page_len"], 4)
    wanted = block_sums(mass, indptr, block_size).split([-(-n // block_size) for n in lengths])
    for rows, blocks in zip(found.split(counts), wanted, strict=True):
        by_kv_head = rows.sum(0).unflatten(1, (2, 2)).sum(2)
        torch.testing.assert_close(by_kv_head[: len(blocks)], blocks, atol=1e-4, rtol=0)
        assert not by_kv_head[len(blocks) :].any()


def test_blocks_are_whole_pages():
    with pytest.raises(ValueError, match="multiple of the page size 4"):
        block_mass(PlainWrapper(), **make_case([9], [1]), block_size=6, causal=True)


def test_a_host_without_flashinfer_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(FlashInferMissing, match=r"pip install flashinfer-python==0\.7\.2"):
        load_flashinfer()
    with pytest.raises(ImportError, match="flashinfer cannot be imported"):
        prefill_wrapper(torch.device("cpu"))


def test_calls_fit_flashinfers_signatures():
    """Every `plan` and `run` the hooks make, and both constructors."""
    prefill = pytest.importorskip("flashinfer").prefill
    real = prefill.BatchPrefillWithPagedKVCacheWrapper
    case = make_case([33, 9], [5, 2])
    wrapper = PlainWrapper()
    block_mass(wrapper, **case, block_size=8, causal=True)
    assert len(wrapper.calls) == 3
    values = case.pop("k_cache")
    extra = {"q_positions": torch.zeros(7).int(), "samples": torch.zeros(7).int()}
    sampled_logits(
        wrapper, **case, paged_kv_cache=(values, values), **extra, num_samples=1, max_kv=33
    )
    for call in wrapper.calls:
        args, kwargs = call["plan"]
        named = inspect.signature(real.plan).bind(wrapper, *args, **kwargs).arguments
        assert {
            "num_qo_heads": 4,
            "num_kv_heads": 2,
            "head_dim_qk": 16,
            "page_size": 4,
        }.items() <= named.items()
        args, kwargs = call["run"]
        inspect.signature(real.run).bind(wrapper, *args, **kwargs)
    inspect.signature(real).bind(
        torch.empty(0), "NHD", backend="fa2", jit_args=[], variant_owns_mask=True
    )


def test_the_variant_declares_what_the_run_passes():
    modules = pytest.importorskip("flashinfer.jit.attention.modules")
    jit_args = variant_jit_args(torch.bfloat16, torch.bfloat16, 128)
    signature = inspect.signature(modules.gen_customize_batch_prefill_module)
    named = signature.bind("fa2", *jit_args).arguments
    assert named["variant_name"] == VARIANT_NAME
    assert f"struct {VARIANT_NAME} " in VARIANT_DECLARATION
    # The wrapper finds the names by their places in the list.
    assert jit_args[7] is named["additional_tensor_names"]
    assert jit_args[9] is named["additional_scalar_names"]

    prepare = pytest.importorskip("flashinfer.utils").prepare_jit_additional_args
    wrapper = PlainWrapper()
    case = make_case([9], [2])
    values = case.pop("k_cache")
    extra = {"q_positions": torch.zeros(2).int(), "samples": torch.zeros(2).int()}
    _, _, logits = sampled_logits(
        wrapper, **case, paged_kv_cache=(values, values), **extra, num_samples=1, max_kv=9
    )
    args, _ = wrapper.calls[0]["run"]
    passed = prepare(jit_args[7], {}, args[2:])
    names = [*jit_args[7], *jit_args[9]]
    assert dict(zip(names, passed, strict=True)) == {
        "krul_q_positions": extra["q_positions"],
        "krul_samples": extra["samples"],
        "krul_logits": logits,
        "sm_scale": 0.25,
        "krul_max_kv": 9,
    }


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
def test_block_mass_on_a_gpu(causal):
    case = _on_gpu(make_case([2000, 500], [64, 16], page_size=16))
    found = block_mass(prefill_wrapper("cuda"), **case, block_size=256, causal=causal)
    wanted = block_mass(PlainWrapper(), **_on_cpu(case), block_size=256, causal=causal)
    torch.testing.assert_close(found.cpu(), wanted, atol=2e-3, rtol=0)


@needs_gpu
@pytest.mark.gpu
def test_sampled_logits_on_a_gpu():
    lengths, counts = [2000, 500], [64, 16]
    case = _on_gpu(make_case(lengths, counts, page_size=16))
    cache = case.pop("k_cache")
    positions = _positions(lengths, counts).cuda()
    samples = torch.full((80,), -1, dtype=torch.int32, device="cuda")
    samples[[3, 70]] = torch.tensor([1, 0], dtype=torch.int32, device="cuda")
    wrapper = sampled_logits_wrapper(torch.device("cuda"), cache.dtype, cache.dtype, 64)
    _, lse, logits = sampled_logits(
        wrapper,
        **case,
        paged_kv_cache=(cache, cache),
        q_positions=positions,
        samples=samples,
        num_samples=2,
        max_kv=2000,
    )
    _, wanted = window_attention_mass(**case, k_cache=cache, q_positions=positions)
    torch.testing.assert_close(lse, wanted, atol=1e-2, rtol=0)
    again = torch.logsumexp(logits, 2) / math.log(2)
    torch.testing.assert_close(again, wanted[[70, 3]], atol=1e-2, rtol=0)


def _on_gpu(case: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """FlashInfer has kernels for head sizes from 64 on, in two-byte types."""
    case = {name: tensor.cuda() for name, tensor in case.items()}
    for name in ("q", "k_cache"):
        case[name] = case[name].repeat_interleave(4, -1).bfloat16()
    return case


def _on_cpu(case: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in case.items()}
