"""Tensors that do not fit the config: a sentence for each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.errors import CheckpointError

MakeSource = Callable[..., Any]
AGAIN = "download the checkpoint again"
BF16 = "download the bf16 release of the model and let dist-moe quantize it"
SAME_MODEL = "check that both belong to the same model"


def refusal(directory: Path) -> str:
    """The sentence with which a directory is refused."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory)
    return str(caught.value).replace(str(directory), "DIR")


def drop(name: str) -> Callable[[Any], None]:
    """Removes a tensor."""
    return lambda source: source.tensors.pop(name)


def put(name: str, dtype: str, shape: tuple[int, ...], item: str = "u1") -> Callable[[Any], None]:
    """Adds or replaces a tensor."""
    return lambda source: source.tensors.update({name: (dtype, np.zeros(shape, item))})


def transpose_experts(source: Any) -> None:
    """The fused layout of another architecture: [E, D, 2F]."""
    source.fuse(range(1))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    dtype, values = source.tensors[name]
    source.tensors[name] = (dtype, np.ascontiguousarray(values.transpose(0, 2, 1)))


def both_layouts(source: Any) -> None:
    """Fused tensors beside one per-expert tensor."""
    source.fuse(range(1))
    source.tensors["model.layers.0.mlp.experts.1.up_proj.weight"] = ("BF16", np.zeros((5, 10), np.uint16))


MISSING = f"check that config.json belongs to these weights, and {AGAIN}"
FOREIGN = f"which is no tensor of the Qwen3MoeForCausalLM that config.json describes; {SAME_MODEL}"
Q = "model.layers.1.self_attn.q_proj"
UP = "model.layers.0.mlp.experts.1.up_proj.weight"
GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (
            drop("lm_head.weight"),
            "DIR: tensor lm_head.weight is missing (1 of 39 are); config.json does not set tie_word_embeddings, so"
            f" lm_head must be there: {AGAIN}",
        ),
        (drop("model.norm.weight"), f"DIR: tensor model.norm.weight is missing (1 of 39 are); {MISSING}"),
        (
            drop("model.embed_tokens.weight"),
            f"DIR: tensor model.embed_tokens.weight is missing (1 of 39 are); {MISSING}",
        ),
        (drop(UP), f"DIR: tensor {UP} is missing (1 of 39 are); {MISSING}"),
        (
            put(f"{Q}.weight", "BF16", (10, 24), "u2"),
            f"DIR/model.safetensors: tensor {Q}.weight has shape [10, 24], but config.json makes it [24, 10];"
            f" {SAME_MODEL}",
        ),
        (
            put("model.norm.weight", "BF16", (10, 1), "u2"),
            "DIR/model.safetensors: tensor model.norm.weight has shape [10, 1], but config.json makes it [10];"
            f" {SAME_MODEL}",
        ),
        (
            transpose_experts,
            f"DIR/model.safetensors: tensor {GATE_UP} has shape [3, 10, 8], but config.json makes it [3, 8, 10];"
            f" {SAME_MODEL}",
        ),
        (both_layouts, f"DIR/model.safetensors: has {UP} (1 such), {FOREIGN}"),
        (put(f"{Q}.bias", "BF16", (24,), "u2"), f"DIR/model.safetensors: has {Q}.bias (1 such), {FOREIGN}"),
        (
            put("model.layers.2.mlp.gate.weight", "BF16", (3, 10), "u2"),
            f"DIR/model.safetensors: has model.layers.2.mlp.gate.weight (1 such), {FOREIGN}",
        ),
        (
            put("model.layers.0.mlp.shared_expert_gate.weight", "BF16", (1, 10), "u2"),
            f"DIR/model.safetensors: has model.layers.0.mlp.shared_expert_gate.weight (1 such), {FOREIGN}",
        ),
        (
            put(f"{Q}.weight_scale_inv", "F32", (1, 1), "f4"),
            f"DIR/model.safetensors: has {Q}.weight_scale_inv, the scales of FP8 weights, which dist-moe does not read;"
            f" {BF16}",
        ),
        (
            put(f"{Q}.weight", "F8_E4M3", (24, 10)),
            f"DIR/model.safetensors: tensor {Q}.weight has dtype F8_E4M3, expected BF16, F16, F32; {BF16}",
        ),
        (
            put(f"{Q}.weight", "I8", (24, 10), "i1"),
            f"DIR/model.safetensors: tensor {Q}.weight has dtype I8, expected BF16, F16, F32; {BF16}",
        ),
        (
            put(f"{Q}.weight", "F64", (24, 10), "f8"),
            f"DIR/model.safetensors: tensor {Q}.weight has dtype F64, expected BF16, F16, F32; {BF16}",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    edit: Callable[[Any], None], sentence: str, make_source: MakeSource, tmp_path: Path
) -> None:
    # Transposed fused experts with 2 F = D could not be told apart, so this one has F = 4.
    source = make_source(moe_intermediate_size=4 if edit is transpose_experts else 5)
    edit(source)
    assert refusal(source.write(tmp_path)) == sentence


def test_a_config_of_another_model(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source("dense")
    source.config = make_source().config
    assert refusal(source.write(tmp_path)) == (
        f"DIR: tensor model.layers.0.mlp.gate.weight is missing (20 of 39 are); {MISSING}"
    )


def test_a_sharded_checkpoint_names_the_file_of_a_wrong_tensor(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source()
    put("model.norm.weight", "BF16", (9,), "u2")(source)
    assert refusal(source.write(tmp_path, shards=3)).startswith(
        "DIR/model-00002-of-00003.safetensors: tensor model.norm"
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_experts": 10**6}, "DIR: is said to have 2 layers of 1000000 experts, but has 39 tensors alone"),
        ({"num_hidden_layers": 2000}, "DIR: is said to have 2000 layers of 3 experts, but has 39 tensors alone"),
        ({"num_hidden_layers": 10**9}, "DIR/config.json: num_hidden_layers is 1000000000, expected at most 100000"),
    ],
)
def test_counts_that_no_file_has_cost_no_memory(
    make_source: MakeSource, tmp_path: Path, changes: dict[str, int], sentence: str
) -> None:
    source = make_source()
    source.config |= changes
    assert refusal(source.write(tmp_path)).startswith(sentence)
