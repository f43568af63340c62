"""Attention shapes by name, and of any model by its Hugging Face configuration.

The configurations are those of `transformers` itself: what it writes is what is read.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import transformers

from mla_triton import models
from mla_triton.models import FIELDS, MODELS, TEXT_PARTS, Model

CONFIG = {
    "num_attention_heads": 128,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
}

REAL = {
    "DeepseekV3Config": replace(MODELS["DeepSeek-V3"], context=4096),
    "DeepseekV2Config": replace(MODELS["DeepSeek-V2"], heads=32, context=2048),
    "LongcatFlashConfig": MODELS["LongCat-Flash"],
    "MiniCPM3Config": MODELS["MiniCPM3-4B"],
    "Mistral4Config": MODELS["Mistral-Small-4"],
    "Glm4MoeLiteConfig": MODELS["GLM-4.7-Flash"],
    "KimiLinearConfig": MODELS["Kimi-Linear-48B"],
}
"""What each class of `transformers` describes where nothing is said to it."""


@pytest.fixture(params=REAL)
def real(request: pytest.FixtureRequest) -> tuple[Any, Model]:
    """A configuration as `transformers` makes it, and what it is to be read as."""
    if not hasattr(transformers, request.param):
        pytest.skip(f"transformers {transformers.__version__} has no {request.param}")
    return getattr(transformers, request.param)(), REAL[request.param]


def test_a_real_configuration(real):
    config, expected = real
    assert models.from_config(config.to_dict()) == expected


def test_a_context_by_another_name():
    named = {name: size for name, size in CONFIG.items() if name != "max_position_embeddings"}
    assert models.from_config(named | {"model_max_length": 100}).context == 100
    assert models.from_config(CONFIG | {"model_max_length": 100}).context == 163840


def test_a_saved_configuration(real, tmp_path):
    config, expected = real
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert models.from_config(saved) == expected


def test_fields_are_read_by_their_names():
    sizes = {field: number for number, field in enumerate(FIELDS.values(), 3)}
    assert models.from_config(sizes) == Model(**dict(zip(FIELDS, range(3, 9), strict=True)))


@pytest.mark.parametrize("part", TEXT_PARTS)
def test_the_language_model_of_several_modalities(part):
    """Its own shapes: those of the vision tower stand beside them under the same names."""
    nested = {"num_attention_heads": 7, "vision_config": {"kv_lora_rank": 3}, part: CONFIG}
    assert models.from_config(nested) == MODELS["DeepSeek-V3"]


def test_shapes_at_the_top_come_before_a_part():
    assert models.from_config(CONFIG | {"text_config": {"kv_lora_rank": 3}}).latent == 512


def test_a_part_that_is_none_is_no_part():
    assert models.from_config(CONFIG | {"text_config": None}).latent == 512


@pytest.mark.parametrize("field", CONFIG)
@pytest.mark.parametrize("value", [None, "512", 512.0, True, -1, [512]])
def test_odd_fields_are_named(field, value):
    expected = f"config must have {field}, a positive whole number, got {value!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        models.from_config(CONFIG | {field: value})


@pytest.mark.parametrize("field", CONFIG)
def test_missing_fields_are_named(field):
    lacking = {name: value for name, value in CONFIG.items() if name != field}
    for config in (lacking, {"text_config": lacking}):
        with pytest.raises(ValueError, match=rf"^config must have {field}, .*, got None$"):
            models.from_config(config)


def test_a_model_may_have_no_rotary_key_but_no_other_nothing():
    assert models.from_config(CONFIG | {"qk_rope_head_dim": 0}).rope == 0
    for field in CONFIG.keys() - {"qk_rope_head_dim"}:
        with pytest.raises(ValueError, match=f"{field}, a positive whole number, got 0"):
            models.from_config(CONFIG | {field: 0})


def test_a_model_of_another_kind():
    with pytest.raises(ValueError, match=r"config must have kv_lora_rank, .*, got None"):
        models.from_config(transformers.LlamaConfig().to_dict())


@pytest.mark.parametrize("name", MODELS)
def test_names_are_found_in_any_case(name):
    for spelt in (name, name.lower(), name.upper()):
        assert models.named(spelt) is MODELS[name]


def test_unknown_names_are_told_the_known_ones():
    expected = f"model must be one of {', '.join(MODELS)}, got 'GPT-2'"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        models.named("GPT-2")


def test_value_and_scale():
    v3, inside = MODELS["DeepSeek-V3"], MODELS["DeepSeek-V4-Flash"]
    assert (v3.value_dim, v3.softmax_scale) == (512, 192**-0.5)
    assert inside.value_dim == inside.latent + inside.rope == 512


@pytest.mark.parametrize(("heads", "ranks", "expected"), [(128, 1, 128), (128, 8, 16), (20, 20, 1)])
def test_heads_of_a_rank(heads, ranks, expected):
    assert models.rank_heads(heads, ranks) == expected


@pytest.mark.parametrize(("heads", "ranks"), [(20, 8), (16, 32), (16, 0), (16, -1)])
def test_heads_that_cannot_be_shared(heads, ranks):
    expected = f"tp must divide the {heads} heads of the model, got {ranks}"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        models.rank_heads(heads, ranks)
