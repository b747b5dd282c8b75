"""A random-weight model directory of any family, with a tokenizer of single letters."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)


def write_model(folder: Path, family: str, seed: int = 0, **changes: object) -> Path:
    """Save a two-layer model to ``folder``; ``family`` is a transformers model type."""
    letters = string.ascii_letters + string.digits + string.punctuation + " \n"
    vocabulary = {letter: i for i, letter in enumerate(["<unk>", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.save_pretrained(folder)
    settings: dict[str, object] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 128,  # some tokenizer classes add tokens of their own
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    }
    config: PreTrainedConfig = AutoConfig.for_model(family, **{**settings, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 4  # random weights are too small for attention to matter
    model.save_pretrained(folder)
    return folder
