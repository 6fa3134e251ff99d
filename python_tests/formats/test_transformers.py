"""LoRA files of transformers (DiTs), through diffusers' loaders and through ours."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from embed_cases import TARGETS, make_bases, make_case, near
from safetensors.torch import load_file, save_file
from unet_inputs import adapters, with_peft

import w2w_fast as w2w
from w2w_fast import InputError, Layout, attach, formats


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return make_bases(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture
def case(request, bases):
    return make_case(request.param, bases)


@pytest.fixture
def layout(case):
    return Layout.discover(case.model, TARGETS, rank=2, alpha=3.0)


DITS = pytest.mark.parametrize("case", ["sd3", "cogview4"], indirect=True)


@DITS
def test_an_export_loads_with_the_pipeline_and_reads_back(case, layout, tmp_path):
    w, base = adapters(layout, 1), case.draw([0])
    with attach(case.pipe, layout, adapters=w, strength=0.8):
        want = case.draw([0])
    assert (want - base).abs().max() > 0.02 * base.abs().max()

    path = tmp_path / "me.safetensors"
    w2w.export(layout, w, path, format="diffusers", strength=0.8)
    assert all(key.startswith("transformer.") for key in load_file(path))
    case.pipe.load_lora_weights(path)
    near("diffusers", case.draw([0]), want)
    case.pipe.unload_lora_weights()

    folder = w2w.export(layout, w, tmp_path / "peft", format="peft", strength=0.8)
    case.model.load_lora_adapter(
        folder, weight_name="adapter_model.safetensors", prefix="base_model.model"
    )
    near("PEFT", case.draw([0]), want)
    case.pipe.unload_lora_weights()
    assert torch.equal(case.draw([0]), base)

    for written in (path, folder):
        back = formats.to_layout(w2w.read_adapter(written), layout)
        with attach(case.pipe, layout, adapters=back):
            near("read back", case.draw([0]), want)


@DITS
def test_what_diffusers_saved_is_read(case, layout, tmp_path):
    w = adapters(layout, 1)
    peft = with_peft(case.model, layout, w)
    want = case.draw([0])
    parts = {name: t for name, t in peft.state_dict().items() if ".lora_" in name}
    peft.unload()
    layers = {
        name.removeprefix("base_model.model.").replace(".a0.", "."): t for name, t in parts.items()
    }
    fields = {"r": 2, "lora_alpha": 3.0, "target_modules": list(layout.names)}
    case.pipe.save_lora_weights(
        tmp_path, transformer_lora_layers=layers, transformer_lora_adapter_metadata=fields
    )
    read = w2w.read_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    assert read.format == "diffusers" and set(read.modules) == set(layout.names)
    with attach(case.pipe, layout, adapters=formats.to_layout(read, layout)):
        near("read", case.draw([0]), want)


@pytest.mark.parametrize("case", ["pixart"], indirect=True)
@pytest.mark.parametrize("spelling", ["lora_{}", "lora.{}"])
def test_files_without_metadata(case, layout, tmp_path, spelling):
    w = adapters(layout, 1)
    halves = ("A", "B") if spelling == "lora_{}" else ("down", "up")
    tensors = {
        f"transformer.{name}.{spelling.format(half)}.weight": tensor.clone()
        for name, pair in layout.split(w[0]).items()
        for half, tensor in zip(halves, pair, strict=True)
    }
    save_file(tensors, tmp_path / "x.safetensors")
    read = w2w.read_adapter(tmp_path / "x.safetensors")
    unscaled = dataclasses.replace(layout, alpha=float(layout.rank))  # as the file says
    assert torch.equal(formats.to_layout(read, unscaled), w[0])


@pytest.mark.parametrize("case", ["sd3"], indirect=True)
def test_kohya_has_no_names_for_a_transformer(case, layout, tmp_path):
    with pytest.raises(InputError, match="kohya.*UNet.*format='diffusers'"):
        w2w.export(layout, adapters(layout, 1), tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())
