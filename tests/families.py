"""Tiny random models of every family that is held against Hugging Face's own, one line each."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
)

VOCABULARY, WINDOW = 96, 24  # the window is no multiple of 16 and shorter than the tests' texts


@dataclass(frozen=True)
class Family:
    """A family, or a variant of one.

    Attributes:
        model_type: transformers' name. options: of its config, beside those of ``_config``; None: ``_SMALL``.
        interleaved: RoPE pairs channels 2i and 2i + 1 of a head, not i and i + half.
        no_rope: numbers of the layers without RoPE.
        fused_layers: how many a fused kernel decodes; softcaps, attention sinks and interleaved RoPE it does not know.
        refused: a pattern of the line it is refused with; empty: it is supported.
    """

    model_type: str
    options: dict | None = field(default_factory=dict)
    interleaved: bool = False
    no_rope: tuple[int, ...] = ()
    fused_layers: int = 2
    refused: str = ""

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model with fixed random weights: biases and norms too, and scores of attention that spread over units."""
        config = self._llava() if self.model_type.startswith("llava") else _config(self.model_type, self.options)
        config._experts_implementation = "eager"  # the one that has float64
        model = LlavaForConditionalGeneration if isinstance(config, LlavaConfig) else AutoModelForCausalLM.from_config
        model = model(config).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.dim() == 1:  # Hugging Face makes biases 0 and norms 1, which would hide mistakes
                    parameter.add_(0.3 * noise)
                else:
                    parameter.copy_(noise * (0.25 if "embed" in name else 1.5 / math.sqrt(parameter.shape[-1])))
        return model.to(dtype)

    @property
    def widest(self) -> torch.dtype:
        """float64, but for Gemma 2, whose eager attention makes NaN of a padding token's scores there."""
        return torch.float32 if self.model_type == "gemma2" else torch.float64

    def _llava(self) -> LlavaConfig:
        vision = CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
        )
        text = _config(self.model_type.split()[1], self.options)
        return LlavaConfig(vision_config=vision, text_config=text, image_token_index=3, vision_feature_layer=-1)


def _config(model_type: str, options: dict | None) -> PreTrainedConfig:
    if options is None:
        known = AutoConfig.for_model(model_type)
        options = {name: value for name, value in _SMALL.items() if hasattr(known, name)}
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    return AutoConfig.for_model(model_type, **{**common, **options})


def find_decoder(model: nn.Module) -> nn.Module:
    """The module that holds the decoder layers and their rotary embedding."""
    return next(module for module in model.modules() if hasattr(module, "layers") and hasattr(module, "rotary_emb"))


def rope(rope_type: str, **parameters) -> dict:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}}


_SLIDING, _FULL = "sliding_attention", "full_attention"
_MIXED = {"sliding_window": WINDOW, "layer_types": [_SLIDING, _FULL]}
_HEAD = {"head_dim": 16}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_TWO_THETAS = {
    "rope_parameters": {
        _SLIDING: {"rope_type": "default", "rope_theta": 100.0},
        _FULL: {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    }
}
_HALF, _QUARTER = rope("default", partial_rotary_factor=0.5), rope("default", partial_rotary_factor=0.25)
_YARN = {"factor": 8.0, "original_max_position_embeddings": 16}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}

FAMILIES = {
    "llama": Family("llama", {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}),
    "llama, linear": Family("llama", rope("linear", factor=4.0)),
    "llama, llama3": Family(
        "llama",
        rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "llama, yarn": Family("llama", rope("yarn", **_YARN)),
    "mistral": Family("mistral", {**_HEAD, "sliding_window": None}),
    "mistral, sliding": Family("mistral", {**_HEAD, "sliding_window": WINDOW}),
    "mixtral": Family("mixtral", {**_HEAD, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": Family("qwen2"),
    "qwen2, sliding": Family("qwen2", {**_MIXED, "use_sliding_window": True}),
    "qwen3": Family("qwen3", _HEAD),
    "qwen2_moe": Family(
        "qwen2_moe", {**_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1}
    ),
    "qwen3_moe": Family("qwen3_moe", {**_HEAD, **_EXPERTS, "num_experts": 4, "decoder_sparse_step": 1}),
    "phi": Family("phi", _HALF),
    "phi3": Family("phi3"),
    "gemma": Family("gemma", {**_HEAD, "num_key_value_heads": 1}),
    "gemma2": Family(
        "gemma2", {**_HEAD, **_MIXED, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 4.0}, fused_layers=0
    ),
    "gemma3": Family("gemma3_text", {**_HEAD, **_MIXED, **_TWO_THETAS, "query_pre_attn_scalar": 16}),
    "gemma3, one head of 256": Family(
        "gemma3_text", {**_MIXED, "head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
    ),
    "olmo2": Family("olmo2"),
    "olmo3": Family("olmo3", {**_MIXED, **_TWO_THETAS}),
    "granite": Family("granite", {"attention_multiplier": 0.2, "residual_multiplier": 0.7, "logits_scaling": 0.5}),
    "cohere": Family("cohere", {"use_qk_norm": True}, interleaved=True, fused_layers=0),
    "cohere2": Family("cohere2", _MIXED, interleaved=True, no_rope=(1,), fused_layers=1),
    "glm": Family("glm", {**_HEAD, **_HALF}, interleaved=True, fused_layers=0),
    "glm4": Family("glm4", {**_HEAD, **_HALF}, interleaved=True, fused_layers=0),
    "stablelm": Family("stablelm", {**_QUARTER, "use_qkv_bias": True}),
    "starcoder2": Family("starcoder2", {"sliding_window": WINDOW}),
    "smollm3": Family("smollm3", {"no_rope_layers": [1, 0]}, no_rope=(1,)),
    "exaone4": Family("exaone4", _MIXED, no_rope=(1,)),
    "gpt_oss": Family("gpt_oss", {**_HEAD, **_MIXED, **rope("yarn", **_YARN), "num_local_experts": 4}, fused_layers=0),
    "gpt_neox": Family(
        "gpt_neox", {**_QUARTER, "hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 8}
    ),
    "llava llama": Family("llava llama"),
    "llava mistral": Family("llava mistral", {**_HEAD, "sliding_window": None}),
    "qwen3_next": Family(
        "qwen3_next",
        {
            **_HEAD,
            **_EXPERTS,
            "num_experts": 4,
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention", _FULL],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            **_QUARTER,
        },
        fused_layers=1,
    ),
    "lfm2": Family("lfm2", {"layer_types": ["conv", _FULL], "block_auto_adjust_ff_dim": False}, fused_layers=1),
    "llama, dynamic": Family("llama", rope("dynamic", factor=2.0), refused="RoPE type 'dynamic'"),
    "phi3, longrope": Family(
        "phi3",
        {
            **rope("longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8, original_max_position_embeddings=64),
            "original_max_position_embeddings": 64,
        },
        refused="RoPE type 'longrope'",
    ),
    "deepseek_v3": Family("deepseek_v3", _LATENT, refused="DeepseekV3Attention has no head_dim"),
    "diffllama": Family("diffllama", refused=r"layers\.0\.self_attn attends otherwise with the cache than without"),
    "gpt_neox_japanese": Family("gpt_neox_japanese", refused="GPTNeoXJapaneseAttention has no config"),
    "hunyuan_v1_dense": Family("hunyuan_v1_dense", _HEAD, refused=r"layers\.0\.self_attn turns its keys in a way"),
    "gpt2": Family("gpt2", {"n_embd": 64, "n_head": 4}, refused="has no decoder with rotary attention"),
}


# Families that get two of the tests; their configs have what of these fits them.
_SMALL = {
    "head_dim": 16,
    "sliding_window": WINDOW,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_MORE = (
    "afmoe apertus arcee aria_text bitnet cwm exaone_moe flex_olmo fuyu glm4_moe granitemoe granitemoeshared hy_v3 "
    "hyperclovax internlm3 iquestcoder jais2 kolibri1 laguna mellum minimax_m2 ministral ministral3 nemotron olmo "
    "olmo_hybrid olmoe phimoe seed_oss solar_open"
)
MORE = {
    **{name: Family(name, None) for name in _MORE.split()},
    **{name: Family(name, None, interleaved=True) for name in ("cohere2_moe", "ernie4_5", "ernie4_5_moe", "helium")},
    "flint": Family("flint", None, no_rope=(0, 1)),
    "persimmon": Family("persimmon", {"num_key_value_heads": 4}),
}

REFUSED = [name for name, family in FAMILIES.items() if family.refused]
SUPPORTED = [name for name, family in FAMILIES.items() if not family.refused]


def token_ids(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def random_orders(model: nn.Module) -> torch.Tensor:
    """A permutation of each layer's H_kv·D key channels, (layers, H_kv·D) int64."""
    config, generator = model.config.get_text_config(), torch.Generator().manual_seed(1)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    return torch.stack([torch.randperm(heads * dim, generator=generator) for _ in range(config.num_hidden_layers)])
