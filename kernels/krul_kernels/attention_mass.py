"""How much attention a window of query rows puts on every key of a paged KV cache.

``mass[key] = sum over rows and the KV head's query heads of weight * softmax(q . k)[key]``,
summed a chunk of keys at a time; never more than ``HELD`` logits of the rows x keys map are
held. Where a request's whole map is smaller than that its logits are computed once, otherwise
twice: for the rows' log-sum-exp, then for the probabilities.

Names and layouts are FlashInfer's (0.7.2): ragged rows behind ``qo_indptr``, paged keys (NHD)
behind ``paged_kv_indptr``/``paged_kv_indices``/``paged_kv_last_page_len``, log-sum-exp in
base 2. What FlashInfer has no word for: ``q_positions`` (sampled rows need not be the last
ones) and ``weights``.

The torch version below is the reference and what CPUs run; CUDA tensors go to
:mod:`krul_kernels.attention_mass_triton` (float64 stays here: Triton's dot has no float64).
"""

from __future__ import annotations

import math

import torch

HELD = 1 << 20
"""Logits that the reference holds at a time, of all rows and heads of one request."""

LOG2E = math.log2(math.e)


def kv_indptr(
    paged_kv_indptr: torch.Tensor, paged_kv_last_page_len: torch.Tensor, page_size: int
) -> torch.Tensor:
    """Where each request's keys begin in ``mass``; the last entry is ``total_kv``.

    paged_kv_indptr: int32 ``[batch + 1]``. paged_kv_last_page_len: int32 ``[batch]``.
    Returns int32 ``[batch + 1]`` on the same device; does not synchronise.
    """
    pages = paged_kv_indptr.diff()
    lengths = torch.where(pages > 0, (pages - 1) * page_size + paged_kv_last_page_len, 0)
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def window_attention_mass(
    q: torch.Tensor,
    qo_indptr: torch.Tensor,
    k_cache: torch.Tensor,
    paged_kv_indptr: torch.Tensor,
    paged_kv_indices: torch.Tensor,
    paged_kv_last_page_len: torch.Tensor,
    q_positions: torch.Tensor,
    weights: torch.Tensor | None = None,
    sm_scale: float | None = None,
    total_kv: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention mass on every key, and the rows' log-sum-exp; mutates nothing.

    q: ``[nnz_qo, num_qo_heads, head_dim]``, bfloat16, float16, float32 or float64.
    qo_indptr: int32 ``[batch + 1]``: request ``i`` owns rows ``qo_indptr[i]:qo_indptr[i + 1]``.
    k_cache: ``[num_pages, page_size, num_kv_heads, head_dim]``, q's dtype; an SGLang pool
        ``[slots, heads, dim]`` is ``pool.unsqueeze(1)``. Only the last dimension of q and
        k_cache must be dense.
    paged_kv_indptr: int32 ``[batch + 1]``; paged_kv_indices: int32 ``[paged_kv_indptr[-1]]``;
    paged_kv_last_page_len: int32 ``[batch]``, 1 to page_size.
    q_positions: int32 ``[nnz_qo]``: a row at position p attends keys ``0..p`` of its request,
        as many as there are. A negative position attends none.
    weights: float32 ``[nnz_qo]``, how much a row counts; None counts every row once.
    sm_scale: what logits are multiplied by; None is ``1 / sqrt(head_dim)``.
    total_kv: the sum of the requests' KV lengths, ``kv_indptr(...)[-1]``. It is an argument
        because it is an output size: callers that know it save a device synchronisation and
        can be traced or captured. None reads it from the device.

    Returns ``mass [total_kv, num_kv_heads]``, ragged in batch order (see :func:`kv_indptr`),
    and ``lse [nnz_qo, num_qo_heads]`` in base 2; float32, or float64 if q is. A row that sees
    no key has an ``lse`` of -inf and no mass.

    Raises ValueError if shapes or dtypes do not fit together and, on a CPU, if ``total_kv`` or
    the last ``qo_indptr`` is wrong. On a GPU that would synchronise: they are the caller's to keep.
    """
    _check_queries_and_keys(q, k_cache)
    batch = qo_indptr.shape[0] - 1
    _check_vector("qo_indptr", qo_indptr, batch + 1)
    _check_vector("paged_kv_indptr", paged_kv_indptr, batch + 1)
    _check_vector("paged_kv_indices", paged_kv_indices, paged_kv_indices.shape[0])
    _check_vector("paged_kv_last_page_len", paged_kv_last_page_len, batch)
    _check_vector("q_positions", q_positions, q.shape[0])
    if weights is not None:
        _check_vector("weights", weights, q.shape[0], torch.float32)
    if total_kv is None:
        total_kv = int(kv_indptr(paged_kv_indptr, paged_kv_last_page_len, k_cache.shape[1])[-1])
    scale = q.shape[2] ** -0.5 if sm_scale is None else sm_scale
    return _op(
        q,
        qo_indptr,
        k_cache,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        q_positions,
        weights,
        scale,
        total_kv,
    )


def block_sums(mass: torch.Tensor, indptr: torch.Tensor, block_size: int) -> torch.Tensor:
    """Mass of every block of ``block_size`` consecutive tokens; a request's last may be short.

    mass: ``[total_kv, num_kv_heads]`` with its ``indptr`` (:func:`kv_indptr`).
    Returns ``[sum of ceil(length / block_size), num_kv_heads]``, ragged in batch order.
    Reads ``indptr`` from the device.
    """
    sums = [mass.new_empty(0, mass.shape[1])]
    for part in mass.split(indptr.diff().tolist()):
        padded = torch.nn.functional.pad(part, (0, 0, 0, -len(part) % block_size))
        sums.append(padded.unflatten(0, (-1, block_size)).sum(1))
    return torch.cat(sums)


def reference(
    q: torch.Tensor,
    qo_indptr: torch.Tensor,
    k_cache: torch.Tensor,
    paged_kv_indptr: torch.Tensor,
    paged_kv_indices: torch.Tensor,
    paged_kv_last_page_len: torch.Tensor,
    q_positions: torch.Tensor,
    weights: torch.Tensor | None,
    sm_scale: float,
    total_kv: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`window_attention_mass` in plain torch, request by request."""
    mass, lse = _outputs(q, k_cache, total_kv)
    starts = kv_indptr(paged_kv_indptr, paged_kv_last_page_len, k_cache.shape[1]).tolist()
    row_starts, page_starts = qo_indptr.tolist(), paged_kv_indptr.tolist()
    if starts[-1] != total_kv:
        raise ValueError(f"total_kv is {total_kv}, but the pages hold {starts[-1]} keys")
    if row_starts[-1] != q.shape[0]:
        raise ValueError(f"qo_indptr ends at {row_starts[-1]}, but q has {q.shape[0]} rows")
    for request in range(len(row_starts) - 1):
        rows = slice(row_starts[request], row_starts[request + 1])
        _request_mass(
            q[rows],
            k_cache,
            paged_kv_indices[page_starts[request] : page_starts[request + 1]],
            q_positions[rows],
            None if weights is None else weights[rows],
            sm_scale,
            mass[starts[request] : starts[request + 1]],
            lse[rows],
        )
    return mass, lse


def _request_mass(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    pages: torch.Tensor,
    positions: torch.Tensor,
    weights: torch.Tensor | None,
    sm_scale: float,
    mass: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """One request's part of :func:`reference`; fills in its ``mass`` and ``lse``."""
    page_size, kv_heads, dim = k_cache.shape[1:]
    # Beyond the last visible key there is no mass to find, and none for rows that see nothing.
    visible = min(len(mass), int(positions.max()) + 1) if len(positions) else 0
    if visible <= 0:
        return
    sees = None
    if int(positions.min()) < 0:
        sees = (positions >= 0).nonzero()[:, 0]
        q, positions = q[sees], positions[sees]
        weights = None if weights is None else weights[sees]
    group = q.shape[1] // kv_heads
    # [KV heads, rows x group, dim]: one matrix product a KV head and chunk.
    queries = q.to(lse.dtype).mul(sm_scale).unflatten(1, (kv_heads, group))
    queries = queries.transpose(0, 1).reshape(kv_heads, -1, dim)
    last_key = positions.repeat_interleave(group).unsqueeze(1)
    all_see = int(positions.min()) + 1

    def logits(start: int, stop: int) -> torch.Tensor:
        first = start // page_size
        own = pages[first : -(-stop // page_size)]
        keys = k_cache.index_select(0, own).flatten(0, 1)
        keys = keys[start - first * page_size : stop - first * page_size].to(queries.dtype)
        product = queries @ keys.permute(1, 2, 0)
        hidden = max(start, all_see)
        if hidden < stop:
            token = torch.arange(hidden, stop, device=q.device)
            product[..., hidden - start :].masked_fill_(token > last_key, -math.inf)
        return product

    step = max(1, HELD // (queries.shape[0] * queries.shape[1]))
    chunks = [(start, min(start + step, visible)) for start in range(0, visible, step)]
    highest = queries.new_full((*queries.shape[:2], 1), -math.inf)
    total = torch.zeros_like(highest)
    for start, stop in chunks:
        own = logits(start, stop)
        # Every row sees the first key, so that its peak is finite from the first chunk on.
        peak = torch.maximum(highest, own.amax(2, keepdim=True))
        share = own.sub_(peak).exp_()
        total.mul_(highest.sub_(peak).exp_()).add_(share.sum(2, keepdim=True))
        highest = peak
    found = (highest + total.log()).mul_(LOG2E)
    found = found.view(kv_heads, -1, group).transpose(0, 1).flatten(1)
    if sees is None:
        lse.copy_(found)
    else:
        lse[sees] = found

    counts = total.reciprocal_().view(kv_heads, 1, -1)
    if weights is not None:
        counts *= weights.to(queries.dtype).repeat_interleave(group)
    for start, stop in chunks:
        if len(chunks) > 1:
            share = logits(start, stop).sub_(highest).exp_()
        mass[start:stop] = (counts @ share)[:, 0].T


def _check_queries_and_keys(q: torch.Tensor, k_cache: torch.Tensor) -> None:
    if q.ndim != 3 or k_cache.ndim != 4 or q.shape[2] != k_cache.shape[3]:
        raise ValueError(
            "q must be [nnz_qo, num_qo_heads, head_dim] and k_cache [num_pages, page_size, "
            f"num_kv_heads, head_dim]; they are {list(q.shape)} and {list(k_cache.shape)}"
        )
    if q.shape[1] % k_cache.shape[2]:
        raise ValueError(f"{q.shape[1]} query heads do not share {k_cache.shape[2]} KV heads")
    if q.dtype != k_cache.dtype or not q.is_floating_point():
        raise ValueError(f"q is {q.dtype} and k_cache {k_cache.dtype}; they must be one float type")
    if q.stride(2) != 1 or k_cache.stride(3) != 1:
        raise ValueError("the last dimension of q and of k_cache must be dense")


def _check_vector(
    name: str, vector: torch.Tensor, length: int, dtype: torch.dtype = torch.int32
) -> None:
    if vector.dtype != dtype or vector.shape != (length,) or not vector.is_contiguous():
        found = f"{vector.dtype} {list(vector.shape)}"
        raise ValueError(f"{name} must be contiguous {dtype} [{length}]; it is {found}")


def _outputs(
    q: torch.Tensor, k_cache: torch.Tensor, total_kv: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """No mass, and rows that see nothing."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    mass = q.new_zeros((total_kv, k_cache.shape[2]), dtype=dtype)
    return mass, q.new_full(q.shape[:2], -math.inf, dtype=dtype)


@torch.library.custom_op("krul::window_attention_mass", mutates_args=())
def _op(
    q: torch.Tensor,
    qo_indptr: torch.Tensor,
    k_cache: torch.Tensor,
    paged_kv_indptr: torch.Tensor,
    paged_kv_indices: torch.Tensor,
    paged_kv_last_page_len: torch.Tensor,
    q_positions: torch.Tensor,
    weights: torch.Tensor | None,
    sm_scale: float,
    total_kv: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    args = (q, qo_indptr, k_cache, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
    rest = (q_positions, weights, sm_scale, total_kv)
    if q.is_cuda and q.dtype != torch.float64:
        from krul_kernels import attention_mass_triton  # Triton is not on every host

        return attention_mass_triton.run(*args, *rest)
    return reference(*args, *rest)


@_op.register_fake
def _fake(
    q: torch.Tensor,
    qo_indptr: torch.Tensor,
    k_cache: torch.Tensor,
    paged_kv_indptr: torch.Tensor,
    paged_kv_indices: torch.Tensor,
    paged_kv_last_page_len: torch.Tensor,
    q_positions: torch.Tensor,
    weights: torch.Tensor | None,
    sm_scale: float,
    total_kv: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _outputs(q, k_cache, total_kv)
