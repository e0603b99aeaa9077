"""config.json: a sentence for everything that is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_moe.checkpoint.hf_config import read_hf_config
from dist_moe.errors import CheckpointError

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
ABSENT = object()
PUBLISHED = "check that the file is the one that was published with these weights"
SIZE = "expected a whole number from 1 to 2147483647"
RUNS = "dist-moe runs Qwen3MoeForCausalLM and Qwen3ForCausalLM"
ROPE = "dist-moe runs plain rotary embeddings and YaRN"
BF16 = "download the bf16 release of the model and let dist-moe quantize it"


def edited(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A config with other values; ABSENT removes a key."""
    return {key: value for key, value in (config | changes).items() if value is not ABSENT}


def refusal(directory: Path, config: object) -> str:
    """The sentence with which a config is refused, without its directory."""
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        read_hf_config(directory)
    return str(caught.value).replace(f"{directory}/", "")


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "llama"}, f'model_type is "llama", expected "qwen3_moe" or "qwen3"; {RUNS}'),
    ({"model_type": "qwen2_moe"}, f'model_type is "qwen2_moe", expected "qwen3_moe" or "qwen3"; {RUNS}'),
    ({"model_type": ABSENT}, f'model_type is missing, expected "qwen3_moe" or "qwen3"; {RUNS}'),
    ({"model_type": ["qwen3"]}, f'model_type is ["qwen3"], expected "qwen3_moe" or "qwen3"; {RUNS}'),
    (
        {"architectures": ["Qwen3MoeModel"]},
        'architectures is ["Qwen3MoeModel"], expected ["Qwen3MoeForCausalLM"] with model_type "qwen3_moe"; ' + RUNS,
    ),
    (
        {"model_type": "qwen3"},
        'architectures is ["Qwen3MoeForCausalLM"], expected ["Qwen3ForCausalLM"] with model_type "qwen3"; ' + RUNS,
    ),
    (
        {"quantization_config": {"quant_method": "fp8"}},
        f'quantization_config is {{"quant_method": "fp8"}}, expected none; {BF16}',
    ),
    ({"hidden_act": "gelu"}, 'hidden_act is "gelu", expected "silu"; dist-moe has no other activation'),
    ({"hidden_act": ABSENT}, 'hidden_act is missing, expected "silu"; dist-moe has no other activation'),
    (
        {"use_sliding_window": True},
        "use_sliding_window is true, expected false; dist-moe has no sliding-window attention",
    ),
    (
        {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]},
        'layer_types is ["full_attention", "sliding_attention"], expected "full_attention" for each of 2 layers;'
        " dist-moe has no sliding-window or linear attention",
    ),
    (
        {"layer_types": ["full_attention"]},
        'layer_types is ["full_attention"], expected "full_attention" for each of 48 layers;'
        " dist-moe has no sliding-window or linear attention",
    ),
    (
        {"torch_dtype": "float8_e4m3fn"},
        'torch_dtype is "float8_e4m3fn", expected "bfloat16" or "float16" or "float32";'
        " use the bf16 release of the model",
    ),
    (
        {"dtype": "int8"},
        'dtype is "int8", expected "bfloat16" or "float16" or "float32"; use the bf16 release of the model',
    ),
    (
        {"num_key_value_heads": 5},
        "num_key_value_heads is 5, expected a divisor of num_attention_heads = 32; " + PUBLISHED,
    ),
    ({"num_experts_per_tok": 129}, f"num_experts_per_tok is 129, expected at most num_experts = 128; {PUBLISHED}"),
    ({"num_experts_per_tok": 0}, f"num_experts_per_tok is 0, {SIZE}; {PUBLISHED}"),
    ({"num_local_experts": 64}, f"num_local_experts is 64, expected the same as num_experts = 128; {PUBLISHED}"),
    (
        {"num_experts": ABSENT},
        f"num_experts is missing, expected a whole number from 0 to 2147483647; {PUBLISHED}",
    ),
    ({"head_dim": 127}, "head_dim is 127, expected an even number; rotary embeddings turn pairs of dimensions"),
    ({"head_dim": 0}, f"head_dim is 0, expected a whole number from 2 to 2147483647; {PUBLISHED}"),
    (
        {"head_dim": ABSENT, "hidden_size": 2047},
        f"head_dim is missing, expected a whole number, as hidden_size 2047 / 32 heads is none; {PUBLISHED}",
    ),
    (
        {"head_dim": ABSENT, "hidden_size": 2080},
        "head_dim is missing, expected an even number, not 2080 / 32; rotary embeddings turn pairs of dimensions",
    ),
    (
        {"mlp_only_layers": [48]},
        f"mlp_only_layers is [48], expected a list of whole numbers from 0 to 47; {PUBLISHED}",
    ),
    (
        {"mlp_only_layers": 3},
        f"mlp_only_layers is 3, expected a list of whole numbers from 0 to 47; {PUBLISHED}",
    ),
    ({"decoder_sparse_step": 0}, f"decoder_sparse_step is 0, {SIZE}; {PUBLISHED}"),
    ({"norm_topk_prob": 1}, f"norm_topk_prob is 1, expected true or false; {PUBLISHED}"),
    ({"tie_word_embeddings": "no"}, f'tie_word_embeddings is "no", expected true or false; {PUBLISHED}'),
    ({"rms_norm_eps": ABSENT}, f"rms_norm_eps is missing, expected a number above 0; {PUBLISHED}"),
    ({"rms_norm_eps": 0}, f"rms_norm_eps is 0, expected a number above 0; {PUBLISHED}"),
    ({"rms_norm_eps": float("nan")}, f"rms_norm_eps is NaN, expected a number above 0; {PUBLISHED}"),
    ({"rms_norm_eps": True}, f"rms_norm_eps is true, expected a number above 0; {PUBLISHED}"),
    ({"rope_theta": ABSENT}, f"rope_theta is missing, expected a number above 1; {PUBLISHED}"),
    ({"rope_theta": 1}, f"rope_theta is 1, expected a number above 1; {PUBLISHED}"),
    ({"rope_theta": "1e6"}, f'rope_theta is "1e6", expected a number above 1; {PUBLISHED}'),
    ({"rope_theta": float("inf")}, f"rope_theta is Infinity, expected a number above 1; {PUBLISHED}"),
    ({"rope_scaling": "yarn"}, f'rope_scaling is "yarn", expected an object or null; {PUBLISHED}'),
    (
        {"rope_scaling": {"factor": 4.0}},
        f'rope_scaling: factor is 4.0, expected no such key for rope_type "default"; {ROPE}',
    ),
    (
        {"rope_scaling": YARN | {"low_freq_factor": 1}},
        f'rope_scaling: low_freq_factor is 1, expected no such key for rope_type "yarn"; {ROPE}',
    ),
    (
        {"rope_parameters": {"full_attention": YARN}},
        'rope_parameters: full_attention is {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": '
        f'32768}}, expected no such key for rope_type "default"; {ROPE}',
    ),
    (
        {"rope_scaling": {"rope_type": "yarn"}},
        "rope_scaling: factor is missing, expected a number above 0, or null for the ratio of the context lengths; "
        + PUBLISHED,
    ),
    (
        {"rope_scaling": YARN | {"original_max_position_embeddings": 1.5}},
        f"rope_scaling: original_max_position_embeddings is 1.5, {SIZE}; {PUBLISHED}",
    ),
    (
        {"rope_scaling": YARN | {"attention_factor": -1}},
        f"rope_scaling: attention_factor is -1, expected a number above 0; {PUBLISHED}",
    ),
    (
        {"rope_scaling": YARN | {"beta_slow": -1}},
        f"rope_scaling: beta_slow is -1, expected a number above 0; {PUBLISHED}",
    ),
    (
        {"partial_rotary_factor": 0.5},
        "partial_rotary_factor is 0.5, expected 1; dist-moe rotates whole heads only",
    ),
    (
        {"rope_scaling": YARN | {"partial_rotary_factor": 0.25}},
        "rope_scaling: partial_rotary_factor is 0.25, expected 1; dist-moe rotates whole heads only",
    ),
]
REFUSALS += [
    (
        {"rope_scaling": {key: kind, "factor": 2.0}},
        f'rope_scaling: {key} is "{kind}", expected "default" or "yarn"; {ROPE}',
    )
    for kind in ("linear", "dynamic", "llama3", "longrope", "proportional", "mrope")
    for key in ("rope_type", "type")
]
REFUSALS += [
    ({key: value}, f"{key} is {shown}, {SIZE}; {PUBLISHED}")
    for key in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "max_position_embeddings",
        "vocab_size",
    )
    for value, shown in ((ABSENT, "missing"), (0, "0"), (2.0, "2.0"), (True, "true"), (2**31, str(2**31)))
]


@pytest.mark.parametrize(("changes", "sentence"), REFUSALS, ids=[str(index) for index in range(len(REFUSALS))])
def test_refusals(changes: dict[str, Any], sentence: str, real_config: dict[str, Any], tmp_path: Path) -> None:
    assert refusal(tmp_path, edited(real_config, changes)) == f"config.json: {sentence}"


def test_a_dense_layer_needs_its_width(real_config: dict[str, Any], tmp_path: Path) -> None:
    config = edited(real_config, {"intermediate_size": ABSENT})
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_hf_config(tmp_path).dense_hidden == 0
    sentence = f"config.json: intermediate_size is missing, {SIZE}; {PUBLISHED}"
    assert refusal(tmp_path, config | {"mlp_only_layers": [3]}) == sentence


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_hf_config(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: expected a Hugging Face model directory, but it has no config.json;"
        " give the directory that holds config.json and model.safetensors"
    )
    path = tmp_path / "config.json"
    for content in (b'{"hidden_size": 2048,', b"", b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            read_hf_config(tmp_path)
        sentence = str(caught.value)
        assert sentence.startswith(f"{path}: expected JSON, but it does not parse (")
        assert sentence.endswith("); copy the file again")
    sentence = f"config.json: expected a JSON object, got [1]; {PUBLISHED}"
    assert refusal(tmp_path, [1]) == sentence


def test_long_values_are_cut(real_config: dict[str, Any], tmp_path: Path) -> None:
    sentence = refusal(tmp_path, real_config | {"hidden_act": "x" * 1000})
    assert sentence == f'config.json: hidden_act is "{"x" * 76}..., expected "silu"; dist-moe has no other activation'
