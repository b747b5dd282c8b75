"""Child process: Krul through ``sglang.Engine``. Arguments: model, conversations as JSON."""

import json
import sys

from krul_sglang.engine import engine_kwargs


def main() -> None:
    import sglang

    model, prompts = sys.argv[1], json.loads(sys.argv[2])
    engine = sglang.Engine(
        model_path=model,
        device="cpu",
        dtype="float32",
        max_total_tokens=224,
        log_level="error",
        **engine_kwargs(policy="lossless", host_memory="1GB"),
    )
    sampling = {"temperature": 0, "max_new_tokens": 8}
    out = []
    for _ in range(2):  # the second round finds what the first one left and lost
        for ids in prompts:
            answer = engine.generate(input_ids=ids, sampling_params=sampling)
            details = answer["meta_info"].get("cached_tokens_details") or {}
            out.append({"ids": answer["output_ids"], "host": details.get("host", 0)})
    state = engine.get_server_info()["internal_states"][0]["krul"]
    engine.shutdown()
    print("RESULT" + json.dumps({"answers": out, "krul": state}))


if __name__ == "__main__":  # Engine spawns processes that import this file again
    main()
