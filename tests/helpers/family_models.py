"""Tiny random models of many families, each with a decisive head."""

import copy
import functools
from collections.abc import Iterable

import pytest
import torch
import transformers
from torch import nn

from tests.helpers import devices

VOCAB = 131
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
OLD = {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}
LATENT = {  # attention of DeepSeek
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1}
WINDOW = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
HEAD = {"head_dim": 8}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

# What the head does by itself, and which layers lie below it.
FAMILIES: dict[str, dict] = {
    "bamba": {"attn_layer_indices": [1], **MAMBA},
    "bloom": {"n_layer": 2, "n_head": 4},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3, **WINDOW, **HEAD},
    "deepseek_v3": {
        **{"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
        **EXPERTS,
        **LATENT,
    },
    "falcon_h1": {"lm_head_multiplier": 0.2, "mamba_d_ssm": 32, **MAMBA, "mamba_d_head": 4},
    "gemma": HEAD,
    "gemma2": {"final_logit_softcapping": 2.0, **WINDOW, **HEAD},
    "gemma3_text": {"final_logit_softcapping": 2.0, **WINDOW, **HEAD},
    "glm4": HEAD,
    "gpt2": OLD,
    "gpt_neox": {},
    "gpt_oss": {**EXPERTS, **WINDOW, **HEAD},
    "granite": {"logits_scaling": 3.0},
    "granitemoe": {"logits_scaling": 3.0, **EXPERTS},
    "granitemoehybrid": {
        **{"logits_scaling": 3.0, "layer_types": ["linear_attention", "full_attention"]},
        **EXPERTS,
        **MAMBA,
    },
    "hyperclovax": {"logits_scaling": 0.4, **HEAD},
    "inkling_text": {
        "logits_mup_width_multiplier": 3.0,
        **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8},
        **HEAD,
        **EXPERTS,
    },
    "jamba": {
        **{"attn_layer_offset": 1, "attn_layer_period": 2, "mamba_d_state": 8},
        **EXPERTS,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama": {},
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1},
    "minicpm3": {"dim_model_base": 8, **LATENT},
    "mistral": {"sliding_window": 6, **HEAD},
    "mixtral": EXPERTS,
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "nanochat": {"final_logit_softcapping": 2.0},
    "olmo2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen2_moe": EXPERTS,
    "qwen3": HEAD,
    "qwen3_moe": {**HEAD, **EXPERTS},
    "qwen3_next": {**HEAD, **EXPERTS, **LINEAR},
    "recurrent_gemma": {
        **{"logits_soft_cap": 2.0, "attention_window_size": 8, "lru_width": 32},
        **{"block_types": ["recurrent", "attention"], "num_hidden_layers": 2},
    },
    "smollm3": {},
    "starcoder2": {},
    "xlstm": {"output_logit_soft_cap": 2.0, "num_heads": 4},
}

# Alike to one of the others.
SLOW = (
    *("bamba", "bloom", "gemma3_text", "glm4", "granitemoehybrid", "jamba", "mamba2", "mixtral"),
    *("mpt", "nanochat", "olmo2", "opt", "phi3", "qwen2_moe", "smollm3", "starcoder2"),
)

# Their layers carry a state from token to token.
STATEFUL = (
    *("bamba", "falcon_h1", "granitemoehybrid", "jamba", "lfm2", "mamba", "mamba2"),
    *("qwen3_next", "recurrent_gemma", "xlstm"),
)


def every(names: Iterable[str]) -> list:
    """Parameters of a test; families similar to another one are marked slow."""
    slow = pytest.mark.slow
    return [pytest.param(name, marks=slow) if name in SLOW else name for name in names]


@functools.cache
def _made(family: str) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **(SIZES | FAMILIES[family]))
    # PyTorch has no grouped product in float64.
    options = {"experts_implementation": "eager"} if "num_experts" in FAMILIES[family] else {}
    model = transformers.AutoModelForCausalLM.from_config(config, **options).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # biases and gates begin at 0
                parameter.normal_(std=0.1)
        model.get_output_embeddings().weight.normal_(std=0.5)
    return model


def make_family(family: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model of its own, with untied random weights."""
    return copy.deepcopy(_made(family)).to(devices.NAME, dtype)
