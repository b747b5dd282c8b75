"""Child process: a chat program in SGLang's frontend language. Argument: server URL."""

import json
import random
import sys

import requests
import sglang as sgl


@sgl.function
def support(s, questions, between_turns):
    s += sgl.system("You are a helpful assistant. Answer briefly.")
    for index, question in enumerate(questions):
        s += sgl.user(question)
        s += sgl.assistant(sgl.gen(f"answer{index}", max_tokens=12, temperature=0))
        s.sync()
        between_turns()


def main() -> None:
    url = sys.argv[1]
    rng = random.Random(9)

    def other_users() -> None:
        body = {
            "input_ids": [rng.randrange(500, 40000) for _ in range(200)],
            "sampling_params": {"max_new_tokens": 1},
        }
        requests.post(f"{url}/generate", json=body, timeout=300).raise_for_status()

    backend = sgl.RuntimeEndpoint(url)
    backend.chat_template = sgl.lang.chat_template.get_chat_template("chatml")
    sgl.set_default_backend(backend)
    questions = ["What is a prefix tree?", "Why is it fast?", "Name one use of it."]

    def run(between_turns):
        state = support.run(questions=questions, between_turns=between_turns)
        details = [
            state.get_meta_info(f"answer{i}").get("cached_tokens_details") or {}
            for i in range(len(questions))
        ]
        return [state[f"answer{i}"] for i in range(len(questions))], details

    undisturbed, _ = run(lambda: None)
    requests.post(f"{url}/flush_cache", timeout=60).raise_for_status()
    evicted, details = run(other_users)
    print("RESULT" + json.dumps({"plain": undisturbed, "evicted": evicted, "details": details}))


if __name__ == "__main__":
    main()
