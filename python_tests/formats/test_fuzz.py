"""Random configs and keys: an Adapter or an InputError of one line, nothing else."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from w2w_fast.errors import InputError
from w2w_fast.formats import read_adapter

NAME = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["to_q", f"^{NAME}", "(", ".*"]) | st.text(), inner)
    ),
    max_leaves=6,
)
FIELDS = """peft_type r lora_alpha use_rslora use_dora bias rank_pattern alpha_pattern
target_modules modules_to_save lora_bias"""
PIECES = f"""lora_unet_ unet. base_model.model. lora_te_ unet:0 :up :down text_encoder. {NAME}
mid_block_to_q .lora_down.weight .lora_up.weight .alpha .lora_A .lora_B .weight .default _lora.up
.processor.to_out .lora.down . _ é"""
fields = st.sampled_from(FIELDS.split())
configs = st.dictionaries(fields, values).map(
    lambda changes: {"r": 2, "lora_alpha": 2, "target_modules": ["to_q"]} | changes
)
pieces = st.sampled_from([*PIECES.split(), "\n"])
keys = st.lists(pieces, min_size=1, max_size=5).map("".join)
shapes = st.sampled_from([(2, 8), (6, 2), (), (1,), (2, 8, 1, 1), (0, 8)])


def read_or_refuse(path):
    try:
        adapter = read_adapter(path)
    except InputError as error:
        assert 0 < len(str(error)) < 2000 and "\n" not in str(error)
    else:
        for a, b in adapter.modules.values():
            assert a.shape[0] == b.shape[1] >= 1 and b.isfinite().all()


@settings(max_examples=200, deadline=None)
@given(values | configs)
def test_peft_configs(config):
    with tempfile.TemporaryDirectory() as folder:
        prefix = f"base_model.model.{NAME}.lora"
        tensors = {f"{prefix}_A.weight": torch.ones(2, 8), f"{prefix}_B.weight": torch.ones(6, 2)}
        save_file(tensors, Path(folder, "adapter_model.safetensors"))
        Path(folder, "adapter_config.json").write_text(json.dumps(config))
        read_or_refuse(folder)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(keys, shapes, max_size=4), st.dictionaries(st.text(), st.text()), configs)
def test_keys_and_metadata(tensors, metadata, config):
    metadata |= {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in config.items()})}
    metadata |= {"unet": json.dumps(config.get("target_modules"))}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "lora.safetensors")
        save_file({key: torch.ones(shape) for key, shape in tensors.items()}, path, metadata)
        read_or_refuse(path)
