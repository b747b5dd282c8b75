"""Child program: the taps of a real ModelRunner against transformers' own attention maps.

Two requests run through SGLang's extend and decode, one of them prefilled in two chunks.
Prints JSON: per request the positions kept, and how far the mass on every token is from
that of the maps transformers reports for the same tokens (its largest difference).
"""

from __future__ import annotations

import json
import os
import sys
from array import array
from types import SimpleNamespace

import torch
from sglang.benchmark import one_batch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.plugins import load_plugins
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import PortArgs, ServerArgs

from krul_sglang.quality.forward import load_model
from krul_sglang.similarity.estimate import attention_mass

PROMPTS = {"chunked": (40, 33), "whole": (23,)}
ANSWER = 45


def request(rid: str, tokens: int, seed: int) -> Req:
    gen = torch.Generator().manual_seed(seed)
    ids = array("q", torch.randint(5, 90, (tokens,), generator=gen).tolist())
    req = Req(rid, "", ids, SamplingParams(temperature=0, max_new_tokens=ANSWER))
    req.full_untruncated_fill_ids = array("q", ids)
    req.logprob_start_len = -1
    return req


def served(runner) -> list[tuple[Req, list[int]]]:
    """Run both requests; each with the tokens whose KV is in the pool."""
    reqs = [request(rid, sum(chunks), i) for i, (rid, chunks) in enumerate(PROMPTS.items())]
    first, second = reqs
    first.extend_end = PROMPTS["chunked"][0]
    one_batch.extend([first], runner)
    first.prefix_len = first.extend_end
    for req in reqs:
        req.extend_end = len(req.full_untruncated_fill_ids)
    token, _, batch = one_batch.extend([first, second], runner)
    tokens = [list(req.origin_input_ids) for req in reqs]
    for _ in range(ANSWER):
        for own, new in zip(tokens, token.tolist(), strict=True):
            own.append(new)
        token, _ = one_batch.decode(token, batch, runner)
    return list(zip(reqs, tokens, strict=True))


def main() -> None:
    model_dir = sys.argv[1]
    load_plugins()
    args = ServerArgs(
        model_path=model_dir,
        radix_cache_backend="krul",
        dtype="float32",
        device="cpu",
        max_total_tokens=1024,
        skip_tokenizer_init=True,
    )
    args.resolve_once()
    rank = one_batch.spawn_world_rank(args, tp_rank=0, pp_rank=0)
    ranks = one_batch.SpawnRanks(world_rank=rank, gpu_id=0)
    one_batch.publish(args, role="scheduler", ranks=ranks)
    one_batch._init_process_global_configs()
    one_batch.get_tokenizer = lambda *_, **__: SimpleNamespace()
    runner = one_batch.load_model(args, PortArgs.init_new(args), 0, 0)[0].torch_runner
    taps, out = runner.krul_taps, {}
    model, _ = load_model(model_dir)
    model.set_attn_implementation("eager")
    for req, tokens in served(runner):
        window = taps.window(req.rid, len(tokens))
        rows = runner.req_to_token_pool.req_to_token[req.kv.req_pool_idx, : len(tokens)]
        mass, _ = attention_mass(window, runner.token_to_kv_pool.k_buffer, rows, taps.scale)
        maps = model(torch.tensor([tokens]), output_attentions=True).attentions
        kept = sorted(p for p in window.positions.tolist() if p >= 0)
        expected = torch.stack([maps[layer][0, :, kept].sum(1).mean(0) for layer in window.layers])
        out[req.rid] = {
            "positions": window.positions.tolist(),
            "tokens": len(tokens),
            "difference": float((mass - expected).abs().max()),
            "mass": float(mass.sum(1).mean()),
        }
    print(json.dumps(out), flush=True)
    os._exit(0)  # the runner's process group has nobody to say goodbye to


if __name__ == "__main__":
    main()
