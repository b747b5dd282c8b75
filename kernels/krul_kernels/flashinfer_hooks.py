"""Attention mass from FlashInfer's paged prefill (0.7.2). Not run on a GPU yet.

Two ways, for hosts whose attention already is FlashInfer's:

- :func:`block_mass`: the stock kernels. A block's mass is ``exp2(lse_block - lse_all)``, with
  one run over all keys and one over a batch in which every block is a request of its own.
- :func:`sampled_logits`: an attention variant, compiled on first use, that writes the logits
  of chosen rows beside the attention output, and masks by ``q_positions`` as
  :func:`krul_kernels.attention_mass.window_attention_mass` does.

Arguments are named and laid out as there, in the two-byte types FlashInfer has kernels for;
``lse`` is base 2. What is known without a GPU:
``tests/kernels/test_flashinfer_hooks.py`` runs :func:`block_mass` on a plain-torch stand-in,
holds every call against the signatures of an installed FlashInfer; the variant passed nvcc
13.0 for sm_80 and sm_90.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

WORKSPACE_BYTES = 128 << 20
"""What FlashInfer recommends for its split-KV intermediates."""

Wrapper = Any
"""A ``flashinfer.BatchPrefillWithPagedKVCacheWrapper`` with the NHD layout."""


class FlashInferMissing(ImportError):
    """FlashInfer cannot be imported."""


def load_flashinfer() -> ModuleType:
    """The ``flashinfer`` package; raises FlashInferMissing, saying what to install."""
    try:
        import flashinfer
    except ImportError as error:
        raise FlashInferMissing(
            f"flashinfer cannot be imported ({error}); pip install flashinfer-python==0.7.2"
        ) from error
    return flashinfer


def prefill_wrapper(device: torch.device) -> Wrapper:
    """A wrapper on the stock kernels, for :func:`block_mass`."""
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    return load_flashinfer().BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")


@dataclass
class BlockBatch:
    """Requests of one block each, planned and run together.

    ``rows`` and ``blocks`` say, for every query row of the batch, which row of ``q`` it is and
    which block of that row's request it attends; ``page_slots`` index ``paged_kv_indices``.
    The rest are FlashInfer's.
    """

    rows: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    page_slots: list[int] = field(default_factory=list)
    qo_indptr: list[int] = field(default_factory=lambda: [0])
    paged_kv_indptr: list[int] = field(default_factory=lambda: [0])
    paged_kv_last_page_len: list[int] = field(default_factory=list)

    def add(self, rows: range, block: int, first_page: int, keys: int, page_size: int) -> None:
        """``rows`` attend the ``keys`` tokens from page ``first_page`` on; mutates the batch."""
        if not rows:
            return
        pages = -(-keys // page_size)
        self.rows += rows
        self.blocks += [block] * len(rows)
        self.page_slots += range(first_page, first_page + pages)
        self.qo_indptr.append(len(self.rows))
        self.paged_kv_indptr.append(len(self.page_slots))
        self.paged_kv_last_page_len.append(keys - (pages - 1) * page_size)


def block_batches(
    qo_indptr: Sequence[int],
    paged_kv_indptr: Sequence[int],
    paged_kv_last_page_len: Sequence[int],
    page_size: int,
    block_size: int,
    causal: bool,
) -> tuple[BlockBatch, BlockBatch]:
    """Split every request into its blocks: (attended whole, attended causally).

    A block that ends before the window is attended whole by every row. One that reaches into
    the window is so by the rows at or past its last token; the rows inside it attend what lies
    up to the last of them causally. Rows before it have no mass there and are in neither batch.
    """
    whole, diagonal = BlockBatch(), BlockBatch()
    for request, last in enumerate(paged_kv_last_page_len):
        first_row, end_row = qo_indptr[request : request + 2]
        first_page, end_page = paged_kv_indptr[request : request + 2]
        length = (end_page - first_page - 1) * page_size + last if end_page > first_page else 0
        window = length - (end_row - first_row) if causal else length  # its first row's position
        for block, start in enumerate(range(0, length, block_size)):
            stop = min(start + block_size, length)
            page = first_page + start // page_size
            inside = first_row + max(0, start - window)
            past = first_row + max(0, stop - 1 - window)
            whole.add(range(past, end_row), block, page, stop - start, page_size)
            diagonal.add(range(inside, past), block, page, stop - 1 - start, page_size)
    return whole, diagonal


def block_mass(
    wrapper: Wrapper,
    q: torch.Tensor,
    qo_indptr: torch.Tensor,
    k_cache: torch.Tensor,
    paged_kv_indptr: torch.Tensor,
    paged_kv_indices: torch.Tensor,
    paged_kv_last_page_len: torch.Tensor,
    block_size: int,
    *,
    causal: bool,
    sm_scale: float | None = None,
) -> torch.Tensor:
    """How much of each row's attention falls on each block; plans and runs ``wrapper``.

    block_size: tokens, a multiple of the page size (ValueError otherwise).
    causal: the rows are the last of their sequences and see no later key, or else every row
        sees every key of its request. For rows elsewhere, or weights, there is
        ``window_attention_mass``.
    Returns float32 ``[nnz_qo, most blocks of a request, num_qo_heads]``; a row's sum over the
    blocks is 1, and blocks that its request has not, or it does not see, have 0.

    q, and an output that is thrown away, exist once for every block of a row: this is for few,
    large blocks. Reads the ragged offsets from the device.
    """
    page_size = k_cache.shape[1]
    if block_size % page_size:
        raise ValueError(f"block_size {block_size} is not a multiple of the page size {page_size}")
    lse_all = _lse(
        wrapper,
        q,
        qo_indptr,
        k_cache,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        causal,
        sm_scale,
    )
    batches = block_batches(
        qo_indptr.tolist(),
        paged_kv_indptr.tolist(),
        paged_kv_last_page_len.tolist(),
        page_size,
        block_size,
        causal,
    )
    count = 1 + max((block for batch in batches for block in batch.blocks), default=-1)
    mass = torch.zeros((q.shape[0], count, q.shape[1]), dtype=torch.float32, device=q.device)
    for batch, diagonal in zip(batches, (False, True), strict=True):
        if not batch.rows:
            continue
        rows = torch.tensor(batch.rows, device=q.device)
        lse = _lse(
            wrapper,
            q[rows],
            _int32(batch.qo_indptr, q.device),
            k_cache,
            _int32(batch.paged_kv_indptr, q.device),
            paged_kv_indices[torch.tensor(batch.page_slots, device=q.device)],
            _int32(batch.paged_kv_last_page_len, q.device),
            diagonal,
            sm_scale,
        )
        blocks = torch.tensor(batch.blocks, device=q.device)
        mass[rows, blocks] = torch.exp2(lse - lse_all[rows])
    return mass


def _int32(values: list[int], device: torch.device) -> torch.Tensor:
    # On the device: `plan` then reads it back, which also keeps it from overwriting its pinned
    # staging buffer while the copy of the plan before is still under way.
    return torch.tensor(values, dtype=torch.int32, device=device)


def _lse(
    wrapper: Wrapper,
    q: torch.Tensor,
    qo_indptr: torch.Tensor,
    k_cache: torch.Tensor,
    paged_kv_indptr: torch.Tensor,
    paged_kv_indices: torch.Tensor,
    paged_kv_last_page_len: torch.Tensor,
    causal: bool,
    sm_scale: float | None,
) -> torch.Tensor:
    """Base-2 log-sum-exp ``[rows, num_qo_heads]`` of one planned run."""
    wrapper.plan(
        qo_indptr,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        q.shape[1],
        k_cache.shape[2],
        q.shape[2],
        k_cache.shape[1],
        causal=causal,
        sm_scale=sm_scale,
        q_data_type=q.dtype,
        kv_data_type=k_cache.dtype,
    )
    # The output is not wanted: keys serve as values.
    _, lse = wrapper.run(q, (k_cache, k_cache), return_lse=True, lse_base="log2", lse_layout="NH")
    return lse


VARIANT_NAME = "KrulSampledLogits"

VARIANT_DECLARATION = r"""
struct KrulSampledLogits : AttentionVariantBase {
  static constexpr bool use_softmax = true;

  uint32_t qo_len, kv_len, window_left;
  int64_t first_row;
  float sm_scale, sm_scale_log2;

  template <typename Params>
  __device__ __host__ KrulSampledLogits(const Params& params, uint32_t batch_idx, uint8_t*) {
    qo_len = params.get_qo_len(batch_idx);
    kv_len = params.get_kv_len(batch_idx);
    window_left = kv_len;  // the mask below is the only one
    first_row = params.q_indptr[batch_idx];
    sm_scale = params.sm_scale;
    sm_scale_log2 = params.sm_scale * math::log2e;
  }

  // A tile may be taller than its request.
  template <typename Params>
  __device__ __forceinline__ bool sees(const Params& params, uint32_t qo_idx, uint32_t kv_idx) {
    return qo_idx < qo_len && kv_idx < kv_len &&
           int32_t(kv_idx) <= params.krul_q_positions[first_row + qo_idx];
  }

  REGISTER_LOGITS_TRANSFORM(params, logits, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx, {
    if (sees(params, qo_idx, kv_idx)) {
      const int64_t sample = params.krul_samples[first_row + qo_idx];
      if (sample >= 0) {
        const int64_t row = sample * params.num_qo_heads + qo_head_idx;
        params.krul_logits[row * params.krul_max_kv + kv_idx] = float(logits) * sm_scale;
      }
    }
    return logits;
  })

  REGISTER_LOGITS_MASK(params, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx,
                       { return sees(params, qo_idx, kv_idx); })
};
"""


def variant_jit_args(q_dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int) -> list[Any]:
    """``jit_args``: the positional arguments of ``gen_customize_batch_prefill_module``
    after the backend. The extra tensors and scalars are those :func:`sampled_logits` passes.
    """
    names = [str(dtype).removeprefix("torch.") for dtype in (q_dtype, kv_dtype)]
    return [
        f"krul_sampled_logits_q_{names[0]}_kv_{names[1]}_head_dim_{head_dim}",
        q_dtype,
        kv_dtype,
        q_dtype,  # of the output
        torch.int32,  # of the ragged offsets
        head_dim,
        head_dim,  # of the values
        ["krul_q_positions", "krul_samples", "krul_logits"],
        ["int32_t", "int32_t", "float"],
        ["sm_scale", "krul_max_kv"],
        ["double", "int64_t"],
        VARIANT_NAME,
        VARIANT_DECLARATION,
    ]


def sampled_logits_wrapper(
    device: torch.device, q_dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int
) -> Wrapper:
    """A wrapper on the variant, for :func:`sampled_logits`; compiles it if need be (minutes).

    fa2, because no other backend lets a variant own its mask.
    """
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    return load_flashinfer().BatchPrefillWithPagedKVCacheWrapper(
        workspace,
        "NHD",
        backend="fa2",
        jit_args=variant_jit_args(q_dtype, kv_dtype, head_dim),
        variant_owns_mask=True,
    )


def sampled_logits(
    wrapper: Wrapper,
    q: torch.Tensor,
    qo_indptr: torch.Tensor,
    paged_kv_cache: tuple[torch.Tensor, torch.Tensor],
    paged_kv_indptr: torch.Tensor,
    paged_kv_indices: torch.Tensor,
    paged_kv_last_page_len: torch.Tensor,
    q_positions: torch.Tensor,
    samples: torch.Tensor,
    num_samples: int,
    max_kv: int,
    sm_scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention, and the logits of the sampled rows; plans and runs ``wrapper``.

    paged_kv_cache: keys and values, each ``[num_pages, page_size, num_kv_heads, head_dim]``.
    q_positions: int32 ``[nnz_qo]``: a row at position p attends keys ``0..p`` of its request.
    samples: int32 ``[nnz_qo]``: where a row's logits go, distinct and below ``num_samples``;
        negative for rows that are not sampled.
    max_kv: the longest request's keys. Like ``samples`` it is not checked: a smaller one
        writes out of bounds.

    Returns the output ``[nnz_qo, num_qo_heads, head_dim]``, ``lse [nnz_qo, num_qo_heads]`` in
    base 2, and float32 ``logits [num_samples, num_qo_heads, max_kv]``: ``sm_scale * q . k``, -inf
    for keys that the row does not see.
    """
    k_cache, _ = paged_kv_cache
    scale = q.shape[2] ** -0.5 if sm_scale is None else sm_scale
    shape = (num_samples, q.shape[1], max_kv)
    logits = torch.full(shape, float("-inf"), dtype=torch.float32, device=q.device)
    wrapper.plan(
        qo_indptr,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        q.shape[1],
        k_cache.shape[2],
        q.shape[2],
        k_cache.shape[1],
        sm_scale=scale,
        q_data_type=q.dtype,
        kv_data_type=k_cache.dtype,
    )
    extra = (q_positions, samples, logits, scale, max_kv)
    output, lse = wrapper.run(
        q, paged_kv_cache, *extra, return_lse=True, lse_base="log2", lse_layout="NH"
    )
    return output, lse, logits
