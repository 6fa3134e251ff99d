"""A real LoRA in the oldest layout, put on a UNet of SD1.5's size."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from w2w_fast import formats
from w2w_fast.attach import attach
from w2w_fast.errors import InputError
from w2w_fast.files import read_tensors, write_tensors
from w2w_fast.formats import cloneofsimo

REAL = Path(
    os.environ.get(
        "W2W_REAL_LORA",
        Path(__file__).parents[3] / "shared" / "data" / "analog_svd_rank4.safetensors",
    )
)


@pytest.fixture(scope="module")
def real():
    if not REAL.is_file():
        pytest.skip(f"no real LoRA at {REAL}; set W2W_REAL_LORA to a file of cloneofsimo/lora")
    return REAL


@pytest.fixture(scope="module")
def sd15_linears():
    """name -> (in, out) of the Linears in attention and GEGLU modules, from the config alone."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
        )
    return {
        f"{name}.{child}": (linear.in_features, linear.out_features)
        for name, module in unet.named_modules()
        if type(module).__name__ in ("Attention", "GEGLU")
        for child, linear in module.named_modules()
        if isinstance(linear, torch.nn.Linear)
    }


def test_order_names_every_linear_once(sd15_linears):
    order = {name: widths for name, *widths in cloneofsimo.sd15_modules()}
    assert {name: tuple(widths) for name, widths in order.items()} == sd15_linears
    assert len(order) == 144 and len(list(cloneofsimo.sd15_modules(geglu=False))) == 128


def test_shapes_fit_one_order_only(real, sd15_linears):
    """Of all orders of the UNet's blocks and of a block's parts, the file's shapes allow one."""
    tensors, _ = read_tensors(real)
    shapes = [
        (tensors[f"unet:{i}:down"].shape[1], tensors[f"unet:{i}:up"].shape[0]) for i in range(144)
    ]

    def names(blocks, parts):
        for block in blocks:
            inside = [name for name in sd15_linears if name.startswith(block)]
            for transformer in dict.fromkeys(
                name.split(".transformer_blocks")[0] for name in inside
            ):
                for part in parts:
                    prefix = f"{transformer}.transformer_blocks.0.{part}."
                    yield from (name for name in inside if name.startswith(prefix))

    fitting = []
    for blocks in itertools.permutations(("down_blocks", "mid_block", "up_blocks")):
        for parts in itertools.permutations(("attn1", "attn2", "ff")):
            order = list(names(blocks, parts))
            assert len(order) == 144
            if [sd15_linears[name] for name in order] == shapes:
                fitting.append(order)
    assert fitting == [[name for name, _, _ in cloneofsimo.sd15_modules()]]


def test_read(real):
    adapter = formats.read_adapter(real)
    assert (adapter.format, adapter.ranks, len(adapter.modules)) == ("cloneofsimo", (4,), 144)
    assert adapter.text_encoder_keys == 96
    tensors, _ = read_tensors(real)
    assert all(tensor.dtype == torch.float16 for tensor in tensors.values())
    name = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj"
    a, b = adapter.modules[name]
    assert torch.equal(a, tensors["unet:4:down"].float())
    assert torch.equal(b, tensors["unet:4:up"].float())


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("unet:17:up"), "143 adapted modules"),
        (lambda t: t.pop("unet:17:down"), "unet:17:up.*no A"),
        (lambda t: t.update({"unet:143:up": torch.ones(640, 4)}), "unet:143.*mid_block.*1280"),
        (lambda t: t.update({"unet:144:up": torch.ones(320, 4)}), "145 adapted modules"),
        (lambda t: t.update({"unet:144:down": torch.ones(4, 320)}), "unknown key 'unet:144:down'"),
        (lambda t: t.update({"unet:0:alpha": torch.ones(1)}), "unknown key 'unet:0:alpha'"),
        (lambda t: t.update({"unet:0:up": torch.ones(320, 3)}), "unequal ranks.*unet:0"),
        (lambda t: t.update({"unet:0:up": torch.full((320, 4), torch.nan)}), "unet:0:up"),
    ],
)
def test_refused(tmp_path, change, words):
    """The layout itself needs no real file: one of our own with each fault."""
    tensors, metadata = {}, {"unet": '["CrossAttention", "Attention", "GEGLU"]'}
    for i, (_, in_features, out_features) in enumerate(cloneofsimo.sd15_modules()):
        tensors[f"unet:{i}:down"] = torch.ones(4, in_features)
        tensors[f"unet:{i}:up"] = torch.ones(out_features, 4)
        metadata[f"unet:{i}:rank"] = "4"
    path = tmp_path / "lora.safetensors"
    write_tensors(path, tensors, metadata)
    assert len(formats.read_adapter(path).modules) == 144
    change(tensors)
    path.unlink()
    _save_unchecked(path, tensors, metadata)
    with pytest.raises(InputError, match=words):
        formats.read_adapter(path)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"unet": '["ResnetBlock2D"]'}, "ResnetBlock2D"),
        ({"unet": "no JSON"}, "no JSON"),
        ({"unet": "5"}, "wanted a JSON"),
        ({"unet:3:rank": "8"}, "unet:3 has rank 4, metadata says '8'"),
        ({"unet": '["CrossAttention"]'}, "144 adapted modules.*has 128"),
    ],
)
def test_metadata_refused(tmp_path, changes, words):
    tensors, metadata = {}, {"unet": '["CrossAttention", "GEGLU"]'} | changes
    for i, (_, in_features, out_features) in enumerate(cloneofsimo.sd15_modules()):
        tensors[f"unet:{i}:down"] = torch.ones(4, in_features)
        tensors[f"unet:{i}:up"] = torch.ones(out_features, 4)
    path = tmp_path / "lora.safetensors"
    _save_unchecked(path, tensors, metadata)
    with pytest.raises(InputError, match=words):
        formats.read_adapter(path)


def _save_unchecked(path, tensors, metadata):
    from safetensors.torch import save_file

    save_file(tensors, path, metadata)


@pytest.mark.slow
@torch.no_grad()
def test_real_lora_on_sd15(real, big_pipe, unet_inputs, tmp_path):
    """attach's output equals diffusers' own loader's and that of W + B A written out."""
    adapter = formats.read_adapter(real)
    layout = formats.layout_of(adapter)
    w = formats.to_layout(adapter, layout)
    unet, inputs = big_pipe.unet, unet_inputs(big_pipe.unet)
    base = unet(**inputs).sample
    with attach(big_pipe, layout, adapters=w[None]):
        got = unet(**inputs).sample
    assert torch.equal(unet(**inputs).sample, base)

    atol = 1e-5 * base.abs().max().item()
    tensors, _ = read_tensors(real)
    pristine = {}
    for i, (name, _, _) in enumerate(cloneofsimo.sd15_modules()):
        weight = unet.get_submodule(name).weight
        pristine[name] = weight.clone()
        weight += (tensors[f"unet:{i}:up"].double() @ tensors[f"unet:{i}:down"].double()).float()
    wanted = unet(**inputs).sample
    for name, weight in pristine.items():
        unet.get_submodule(name).weight.copy_(weight)
    assert (wanted - base).abs().max() > 100 * atol
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)

    kohya = formats.export(layout, w, tmp_path / "kohya.safetensors")
    big_pipe.load_lora_weights(kohya)
    loaded = unet(**inputs).sample
    big_pipe.unload_lora_weights()
    torch.testing.assert_close(loaded, got, rtol=0, atol=atol)
    other = formats.export(layout, w, tmp_path / "diffusers.safetensors", format="diffusers")
    found = formats.verify(other, big_pipe, w, layout)
    assert found.modules == 144 and found.relative <= 1e-5
    assert torch.equal(unet(**inputs).sample, base)
