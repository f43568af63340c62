"""The attention shapes of models that are served today."""

from __future__ import annotations

from dataclasses import dataclass


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
