"""Every layout of LoRA file, through the real loaders and through ours: the same UNet output."""

from __future__ import annotations

import contextlib
import copy
import hashlib

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from w2w_fast import formats
from w2w_fast.attach import attach
from w2w_fast.errors import InputError

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# What a layout can say: the old ones have no alpha, and kohya no rslora.
READABLE = [
    (spelling, alpha)
    for spelling, alphas in {
        "kohya": (None, 0.5, 1.0),
        "diffusers": (None, 0.5, 1.0, "rslora"),
        "diffusers-old": (None,),
        "diffusers-processor": (None,),
        "peft": (None, 0.5, 1.0, "rslora"),
    }.items()
    for alpha in alphas
]


@contextlib.contextmanager
def loaded(pipe, path, spelling):
    """The UNet with the file in it, put there by the tool that owns the layout."""
    if spelling == "peft":
        yield PeftModel.from_pretrained(copy.deepcopy(pipe.unet), path)
        return
    pipe.load_lora_weights(path)
    try:
        yield pipe.unet
    finally:
        pipe.unload_lora_weights()


def merged(unet, modules, scale):
    """A copy of the UNet with W + scale B A written into its weights."""
    unet = copy.deepcopy(unet)
    with torch.no_grad():
        for name, (a, b) in modules.items():
            unet.get_submodule(name).weight += scale * (b.double() @ a.double()).float()
    return unet


def digest(model):
    state = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        state.update(name.encode() + tensor.numpy().tobytes())
    return state.hexdigest()


def assert_same(got, wanted, base):
    """Equal to 1e-5, where the adapter itself moves the output a thousand times more."""
    assert (wanted - base).abs().max() > 1e-2
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("spelling, alpha", READABLE)
@torch.no_grad()
def test_read_equals_real_loader(
    tiny_pipe, layouts, weights, unet_inputs, write_lora, tmp_path, spelling, alpha, rank, dtype
):
    stored = {
        name: tuple(half.to(DTYPES[dtype]) for half in pair)
        for name, pair in layouts(rank, 1.0).split(weights(layouts(rank, 1.0))).items()
    }
    said = {"alpha": 2.0, "rslora": True} if alpha == "rslora" else {"alpha": alpha}
    path, scale = write_lora(spelling, tmp_path / "lora", stored, **said)

    inputs = unet_inputs(tiny_pipe.unet)
    base = tiny_pipe.unet(**inputs).sample
    with loaded(tiny_pipe, path, spelling) as unet:
        wanted = unet(**inputs).sample
    layout = layouts(rank, 27.0)
    w = formats.to_layout(formats.read_adapter(path), layout)
    with attach(tiny_pipe.unet, layout, adapters=w[None]):
        got = tiny_pipe.unet(**inputs).sample
    assert_same(got, merged(tiny_pipe.unet, stored, scale)(**inputs).sample, base)
    assert_same(got, wanted, base)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 27.0])
@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft"])
@torch.no_grad()
def test_export_equals_real_loader(
    tiny_pipe, layouts, weights, unet_inputs, tmp_path, format, alpha, rank, dtype
):
    layout = layouts(rank, alpha)
    w = weights(layout) * min(1.0, 1 / layout.scale) ** 0.5
    path = tmp_path / ("lora" if format == "peft" else "lora.safetensors")
    strength = 1.25
    assert path == formats.export(
        layout, w, path, format=format, strength=strength, dtype=DTYPES[dtype]
    )

    # What the file holds, against what was meant: the rounding of its dtype, nothing else.
    stored = formats.read_adapter(path)
    assert stored.format == format and stored.ranks == (rank,)
    back = formats.to_layout(stored, layout)
    eps = torch.finfo(DTYPES[dtype]).eps
    factor = layout.flatten(
        {
            name: (torch.ones_like(a), torch.full_like(b, strength))
            for name, (a, b) in layout.split(w).items()
        }
    )
    tiny = 2**-24 / min(1.0, layout.scale)  # float16's smallest number, read back through B
    torch.testing.assert_close(back, w * factor, rtol=2 * eps, atol=tiny)

    # What each tool computes from the file, against attach with what the file holds.
    inputs = unet_inputs(tiny_pipe.unet)
    base, before = tiny_pipe.unet(**inputs).sample, digest(tiny_pipe.unet)
    with attach(tiny_pipe.unet, layout, adapters=back[None]):
        got = tiny_pipe.unet(**inputs).sample
    assert_same(got, merged(tiny_pipe.unet, stored.modules, 1.0)(**inputs).sample, base)
    with loaded(tiny_pipe, path, format) as unet:
        assert_same(got, unet(**inputs).sample, base)
    if format == "peft":  # the config says the same as diffusers, which does not read it
        tiny_pipe.unet.load_lora_adapter(
            path, weight_name="adapter_model.safetensors", prefix="base_model.model"
        )
        assert_same(got, tiny_pipe.unet(**inputs).sample, base)
        tiny_pipe.unload_lora_weights()

    found = formats.verify(path, tiny_pipe, back, layout)
    assert float(found) <= 1e-5 and found.relative <= 1e-5
    assert found.modules == len(layout.modules)
    meant = formats.verify(path, tiny_pipe, w, layout, strength=strength)
    assert meant.relative <= 20 * eps + 1e-6
    assert digest(tiny_pipe.unet) == before
    torch.testing.assert_close(tiny_pipe.unet(**inputs).sample, base, rtol=0, atol=0)


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft"])
def test_exported_keys(tiny_pipe, layouts, weights, tmp_path, format):
    """The spelling itself: other tools match keys by it."""
    layout = layouts(2, 8.0)
    w = weights(layout)
    path = formats.export(layout, w, tmp_path / "x.safetensors", format=format)
    tensors = load_file(path / "adapter_model.safetensors" if format == "peft" else path)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    a, b = layout.split(w)[name]
    flat = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    keys = {
        "kohya": (f"{flat}.lora_down.weight", f"{flat}.lora_up.weight"),
        "diffusers": (f"unet.{name}.lora_A.weight", f"unet.{name}.lora_B.weight"),
        "peft": (
            f"base_model.model.{name}.lora_A.weight",
            f"base_model.model.{name}.lora_B.weight",
        ),
    }[format]
    assert torch.equal(tensors[keys[0]], a)
    torch.testing.assert_close(tensors[keys[1]], b * 4.0, rtol=1e-6, atol=0)
    assert len(tensors) == len(layout.modules) * (3 if format == "kohya" else 2)
    if format == "kohya":
        assert tensors[f"{flat}.alpha"].shape == () and tensors[f"{flat}.alpha"] == 2.0


def test_verify_sees_a_wrong_file(tiny_pipe, layouts, weights, tmp_path):
    layout = layouts(1, 1.0)
    path = formats.export(layout, weights(layout), tmp_path / "x.safetensors")
    assert formats.verify(path, tiny_pipe, weights(layout, seed=2), layout).relative > 1e-2
    assert formats.verify(path, tiny_pipe, weights(layout), layout, strength=0.5).relative > 1e-3


def test_verify_refuses_a_pipe_with_loras(tiny_pipe, layouts, weights, tmp_path):
    layout = layouts(1, 1.0)
    path = formats.export(layout, weights(layout), tmp_path / "x.safetensors")
    tiny_pipe.load_lora_weights(path, adapter_name="mine")
    try:
        with pytest.raises(InputError, match="mine"):
            formats.verify(path, tiny_pipe, weights(layout), layout)
    finally:
        tiny_pipe.unload_lora_weights()


def test_verify_refuses_a_missing_file(tiny_pipe, layouts, weights, tmp_path):
    layout = layouts(1, 1.0)
    with pytest.raises(InputError, match="me.safetensors"):
        formats.verify(tmp_path / "me.safetensors", tiny_pipe, weights(layout), layout)
