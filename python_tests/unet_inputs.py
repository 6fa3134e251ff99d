"""Random adapters of a known effect, inputs for a UNet, and PEFT, the oracle of both."""

from __future__ import annotations

import hashlib

import awkward
import torch
from peft import LoraConfig, get_peft_model


def adapters(layout, k, seed=0, size=0.4):
    """w [k, d] whose effect on a module is about ``size`` of the base's."""
    w = awkward.normal(k, layout.size, seed=seed)
    for module, (A, B) in zip(layout.modules, layout.slices(), strict=True):
        w[:, A] /= module.in_features**0.5
        w[:, B] *= size / layout.scale
    return w


def inputs(batch, text=24, side=8, seed=5):
    return (
        awkward.normal(batch, 4, side, side, seed=seed),
        torch.tensor(7),
        awkward.normal(batch, 5, text, seed=seed + 1),
    )


def run(model, args):
    with torch.no_grad():
        return model(*args).sample


def with_peft(model, layout, w):
    """PEFT around ``model`` (which it changes; unload() undoes), adapter i holding w[i]."""
    config = LoraConfig(
        r=layout.rank, lora_alpha=layout.alpha, target_modules=list(layout.names), lora_dropout=0.0
    )
    for i in range(len(w)):
        if i == 0:
            wrapped = get_peft_model(model, config, adapter_name="a0")
        else:
            wrapped.add_adapter(f"a{i}", config)
    with torch.no_grad():
        for name, (A, B) in layout.split(w).items():
            module = model.get_submodule(name)
            for i in range(len(w)):
                module.lora_A[f"a{i}"].weight.copy_(A[i])
                module.lora_B[f"a{i}"].weight.copy_(B[i])
    return wrapped.eval()


def state_hash(model):
    """Of the names and the bits of all weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
