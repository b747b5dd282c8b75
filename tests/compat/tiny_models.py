"""Tiny random-weight models and bare configs, built on the spot with transformers.

A *config* is a folder with config.json only: enough for every check SGLang makes
before it loads weights. A *model* adds weights of a few megabytes (float32, fixed
seed); it has no tokenizer, so serve it with ``--skip-tokenizer-init``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCAB = 1000
LAYERS = 2
CONTEXT = 4096

ROPE: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 256,
    },
}


@dataclass(frozen=True)
class Family:
    """One dense decoder: ``kind`` is llama, qwen2, qwen3 or mistral."""

    kind: str
    head_dim: int
    gqa: int
    rope: str
    kv_heads: int = 1

    @property
    def name(self) -> str:
        return f"{self.kind}-d{self.head_dim}-gqa{self.gqa}-{self.rope}"

    def config(self) -> Any:
        """The transformers configuration."""
        import transformers

        cls = {
            "llama": transformers.LlamaConfig,
            "qwen2": transformers.Qwen2Config,
            "qwen3": transformers.Qwen3Config,
            "mistral": transformers.MistralConfig,
        }[self.kind]
        heads = self.gqa * self.kv_heads
        extra: dict[str, Any] = {}
        if self.kind == "mistral":
            # The class's default is a window of 4096 tokens.
            extra["sliding_window"] = None
        if self.kind != "qwen2":
            # Qwen2 has no such field: its heads always share the hidden size.
            extra["head_dim"] = self.head_dim
        return cls(
            hidden_size=heads * self.head_dim,
            intermediate_size=256,
            num_hidden_layers=LAYERS,
            num_attention_heads=heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=VOCAB,
            max_position_embeddings=CONTEXT,
            rope_parameters=dict(ROPE[self.rope]),
            bos_token_id=1,
            # Never sampled (no such id): every answer has the length asked for.
            eos_token_id=None,
            tie_word_embeddings=False,
            **extra,
        )


def save_model(family: Family, folder: Path) -> Path:
    """Save the family's model with random float32 weights; returns ``folder``."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(len(family.name))
    model = AutoModelForCausalLM.from_config(family.config(), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        # The initial 0.02 leaves attention uniform, and a wrong KV unnoticed.
        if parameter.dim() > 1 and "embed" not in name:
            torch.nn.init.normal_(parameter, std=2.0 / parameter.shape[1] ** 0.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return folder


def save_config(config: Any, architecture: str, folder: Path) -> Path:
    """Save a bare config.json that names ``architecture``; returns ``folder``."""
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return folder


_SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": CONTEXT,
}
_GQA = {**_SMALL, "num_key_value_heads": 2}


def save_bare_configs(root: Path) -> dict[str, Path]:
    """One bare config a name: what Krul serves or refuses by architecture."""
    import transformers as t

    made = {
        "llama": (t.LlamaConfig(**_GQA), "LlamaForCausalLM"),
        "qwen2": (t.Qwen2Config(**_GQA), "Qwen2ForCausalLM"),
        "qwen2-window": (
            t.Qwen2Config(**_GQA, use_sliding_window=True, sliding_window=128, max_window_layers=0),
            "Qwen2ForCausalLM",
        ),
        # The window is set in the file but switched off, as in Qwen's own releases.
        "qwen2-window-off": (
            t.Qwen2Config(**_GQA, use_sliding_window=False, sliding_window=128),
            "Qwen2ForCausalLM",
        ),
        "mistral": (t.MistralConfig(**_GQA, sliding_window=None), "MistralForCausalLM"),
        "mistral-window": (t.MistralConfig(**_GQA, sliding_window=128), "MistralForCausalLM"),
        "gemma3": (
            t.Gemma3TextConfig(**_GQA, head_dim=16, sliding_window=128),
            "Gemma3ForCausalLM",
        ),
        "deepseek-mla": (
            t.DeepseekV2Config(
                **_SMALL,
                kv_lora_rank=32,
                q_lora_rank=None,
                qk_rope_head_dim=16,
                qk_nope_head_dim=16,
                v_head_dim=16,
            ),
            "DeepseekV2ForCausalLM",
        ),
        "mixtral": (t.MixtralConfig(**_GQA, num_local_experts=4), "MixtralForCausalLM"),
        "mamba": (
            t.FalconH1Config(**_GQA, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16),
            "FalconH1ForCausalLM",
        ),
        "qwen3-next": (t.Qwen3NextConfig(**_GQA, head_dim=16), "Qwen3NextForCausalLM"),
        "multimodal": (
            t.Qwen2VLConfig(
                text_config={**_GQA, "rope_parameters": _mrope()},
                vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
            ),
            "Qwen2VLForConditionalGeneration",
        ),
        "embedding": (t.LlamaConfig(**_GQA), "LlamaEmbeddingModel"),
        "bert": (t.BertConfig(**_SMALL), "BertModel"),
    }
    return {
        name: save_config(config, architecture, root / name)
        for name, (config, architecture) in made.items()
    }


def _mrope() -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
