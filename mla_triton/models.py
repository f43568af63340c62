"""The attention shapes of models that are served today, and of any other by its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Model:
    """What absorbed attention needs to know of a model, for one GPU that holds all of its heads."""

    heads: int
    latent: int
    """Width of `q_nope` after absorption."""
    nope: int
    """Width of a head's query before absorption, without its rotary part."""
    rope: int
    v: int
    """Width of a head's output after `W_UV`."""
    context: int
    """Longest context in tokens."""
    rope_in_value: bool = False
    """Whether the value is the whole key rather than its latent part."""

    @property
    def value_dim(self) -> int:
        return self.latent + self.rope if self.rope_in_value else self.latent

    @property
    def softmax_scale(self) -> float:
        """Without the factor mscale**2 of models whose rotary embedding is stretched by YaRN."""
        return float((self.nope + self.rope) ** -0.5)


_K = 1024
_DEEPSEEK_V2_LITE = Model(16, 512, 128, 64, 128, 32 * _K)
_DEEPSEEK_V3 = Model(128, 512, 128, 64, 128, 160 * _K)

MODELS = {
    "DeepSeek-V2-Lite": _DEEPSEEK_V2_LITE,
    "Moonlight": _DEEPSEEK_V2_LITE,
    "DeepSeek-V2": _DEEPSEEK_V3,
    "DeepSeek-V3": _DEEPSEEK_V3,
    "DeepSeek-R1": _DEEPSEEK_V3,
    "DeepSeek-V3.1": _DEEPSEEK_V3,
    "DeepSeek-V3.2": _DEEPSEEK_V3,
    "Kimi-K2": Model(64, 512, 128, 64, 128, 256 * _K),
    "Kimi-K2-Thinking": Model(64, 512, 128, 64, 128, 256 * _K),
    "Kimi-Linear-48B": Model(32, 512, 128, 64, 128, 1024 * _K),
    "GLM-4.7-Flash": Model(20, 512, 192, 64, 256, 198 * _K),
    "GLM-5": Model(64, 512, 192, 64, 256, 198 * _K),
    "MiniCPM3-4B": Model(40, 256, 64, 32, 64, 32 * _K),
    "Mistral-Small-4": Model(32, 256, 64, 64, 128, 1024 * _K),
    "LongCat-Flash": Model(64, 512, 128, 64, 128, 128 * _K),
    "DeepSeek-V4-Flash": Model(64, 448, 448, 64, 512, 1024 * _K, rope_in_value=True),
}

FIELDS = {
    "heads": "num_attention_heads",
    "latent": "kv_lora_rank",
    "nope": "qk_nope_head_dim",
    "rope": "qk_rope_head_dim",
    "v": "v_head_dim",
    "context": "max_position_embeddings",
}
"""Where a Hugging Face `config.json` says what."""
OTHER_FIELDS = {"max_position_embeddings": "model_max_length"}
"""What a model calls a field by another name: Kimi-Linear."""
TEXT_PARTS = ("text_config", "language_config")
"""Where models of several modalities keep the configuration of their language model."""


def named(name: str) -> Model:
    """A model by its name, in any case; ValueError where it is not known."""
    by_name = {known.lower(): model for known, model in MODELS.items()}
    if name.lower() not in by_name:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    return by_name[name.lower()]


def from_config(config: Mapping[str, Any]) -> Model:
    """The attention of a Hugging Face `config.json`, read.

    Raises ValueError naming the field that is missing or is no positive whole number.
    """
    for part in TEXT_PARTS:
        if isinstance(config.get(part), Mapping) and FIELDS["latent"] not in config:
            config = config[part]
    sizes: dict[str, Any] = {}
    for name, field in FIELDS.items():
        size = config.get(field if field in config else OTHER_FIELDS.get(field, field))
        if type(size) is not int or size < (0 if name == "rope" else 1):
            raise ValueError(f"config must have {field}, a positive whole number, got {size!r}")
        sizes[name] = size
    return Model(**sizes)


def rank_heads(heads: int, ranks: int) -> int:
    """Heads of one of `ranks` GPUs; ValueError where they cannot be shared evenly."""
    if ranks < 1 or heads % ranks:
        raise ValueError(f"tp must divide the {heads} heads of the model, got {ranks}")
    return heads // ranks
