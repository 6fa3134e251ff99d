"""attach on a model that is saved, moved, offloaded or quantised meanwhile."""

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from embed_cases import TARGETS, hung_on, make_bases, make_case, near
from tiny_world import tree
from torch import nn
from unet_inputs import adapters

from w2w_fast import InputError, Layout, attach

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return make_bases(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture
def case(request, bases):
    return make_case(getattr(request, "param", "text"), bases)


@pytest.fixture
def layout(case):
    return Layout.discover(case.model, TARGETS, rank=2, alpha=3.0)


@pytest.mark.parametrize("case", ["text", "sd3"], indirect=True)
def test_saving_and_moving_inside(case, layout, tmp_path):
    w, text = adapters(layout, 2), [0, 1]
    case.draw(text)  # a tokenizer's file keeps how it padded last
    state = {name: t.clone() for name, t in case.model.state_dict().items()}
    case.pipe.save_pretrained(tmp_path / "before")
    with attach(case.pipe, layout, adapters=w):
        case.draw(text)
        case.pipe.save_pretrained(tmp_path / "inside")
        assert tree(tmp_path / "inside") == tree(tmp_path / "before")
        inside = case.model.state_dict()
        assert list(inside) == list(state)
        assert all(torch.equal(inside[name], t) for name, t in state.items())
        case.pipe.to(torch.bfloat16)
        moved = case.draw(text)
        assert moved.dtype == torch.bfloat16
        case.pipe.to(torch.float32)
        wide = case.draw(text)
        # Another base under the same people, as a trainer or a loader of checkpoints has it.
        case.model.load_state_dict({name: 0.9 * t for name, t in state.items()})
        other = case.draw(text)
        case.model.load_state_dict(state)
        again = case.draw(text)
    near("bfloat16", moved.float(), wide, 0.2)
    with attach(case.pipe, layout, adapters=w):
        assert torch.equal(case.draw(text), again)
    assert (other - again).abs().max() > 0.02 * again.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["text", "sd3"], indirect=True)
def test_moving_to_another_device_inside(case, layout):
    w = adapters(layout, 2)
    with attach(case.pipe, layout, adapters=w):
        here = case.draw([0, 1])
        case.pipe.to("cuda")
        near("on cuda", case.draw([0, 1]).cpu(), here, 1e-2)
        case.pipe.to("cpu")
        assert torch.equal(case.draw([0, 1]), here)


def offload(how, case, device):
    """Offload to the CPU; with device "cpu" as far as a machine without an accelerator has it."""
    if how == "model":
        case.pipe.enable_model_cpu_offload(device=device)
    elif how == "sequential":  # weights on meta but for their own forward
        if device == "cpu":  # accelerate cannot do it to the text encoder there
            accelerate.cpu_offload(case.model, execution_device=torch.device(device))
        else:
            case.pipe.enable_sequential_cpu_offload(device=device)
    else:
        kind, cpu = how.split()[1], torch.device("cpu")
        blocks = 1 if kind == "block" else None
        apply_group_offloading(
            case.model,
            torch.device(device),
            cpu,
            offload_type=f"{kind}_level",
            num_blocks_per_group=blocks,
        )
        case.pipe.to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", ["model", "sequential", "group leaf", "group block"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("case", ["text", "sd3"], indirect=True)
def test_offloaded(case, layout, how, first, device):
    w = adapters(layout, 2)
    with attach(case.pipe, layout, adapters=w):
        want = case.draw([0, 1])
    if first:
        offload(how, case, device)
    with attach(case.pipe, layout, adapters=w, strength=1.0) as live:
        if not first:
            offload(how, case, device)
        got = case.draw([0, 1]).cpu()
        if device == "cpu":
            assert torch.equal(got, want)
        near("offloaded", got, want, 1e-2)
        live.adapters = w.flip(0)  # swapped while the weights are away
        assert (case.draw([0, 1]).cpu() - want).abs().max() > 0.02 * want.abs().max()
    if how == "sequential":
        with pytest.raises(InputError, match="merged: weights of .* quantised or offloaded"):
            attach(case.pipe, layout, merged=True)


# --- a quantised base


class Int8Linear(nn.Module):
    """A Linear whose weight is stored as integers, by definition."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.step = float(linear.weight.detach().abs().max()) / 127
        weight = (linear.weight / self.step).round().to(torch.int8)
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.step, self.bias)


class Beside(nn.Module):
    """Any Linear and one adapter, by definition."""

    def __init__(self, linear, A, B):
        super().__init__()
        self.linear, self.A, self.B = linear, A, B

    def forward(self, x):
        return self.linear(x) + x @ self.A.T @ self.B.T


def replace(model, names, make):
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, make(name, model.get_submodule(name)))


def torchao_config(name):
    quantization = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    return quantization.quantize_, getattr(quantization, name)()


def bitsandbytes_linear(kind, linear):
    bnb = pytest.importorskip("bitsandbytes", exc_type=ImportError).nn
    shape = (linear.in_features, linear.out_features, linear.bias is not None)
    if kind == "int8":
        quantised = bnb.Linear8bitLt(*shape, has_fp16_weights=False)
    else:
        quantised = bnb.Linear4bit(*shape, quant_type=kind, compute_dtype=torch.float32)
    quantised.load_state_dict(linear.state_dict())
    return quantised.to("cpu")  # which quantises


def quantise(model, names, kind):
    """In place, as the tool's users do it."""
    tool, _, how = kind.partition(" ")
    if tool == "integers":
        replace(model, names, lambda name, linear: Int8Linear(linear))
    elif tool == "torch.ao":
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8, inplace=True)
    elif tool == "torchao":
        quantize_, config = torchao_config(how)
        quantize_(model, config)
    elif tool == "bitsandbytes":
        replace(model, names, lambda name, linear: bitsandbytes_linear(how, linear))
    else:  # diffusers' own: stored in float8, widened for each forward
        model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


# Those that round what a Linear reads, too, round anew what the adapters change.
ROUND_INPUTS = (
    "torch.ao",
    "torchao Int8DynamicActivationInt8WeightConfig",
    "bitsandbytes int8",
)
QUANTISED = (
    "integers",
    "layerwise float8",
    "torchao Int8WeightOnlyConfig",
    "bitsandbytes nf4",
    *ROUND_INPUTS,
)


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("case", ["text", "pixart"], indirect=True)
def test_over_a_quantised_base(case, layout, kind):
    w, plain = adapters(layout, 1), case.draw([0, 1])
    quantise(case.model, layout.names, kind)
    base = case.draw([0, 1])
    before = hung_on(case.model)
    with attach(case.pipe, layout, adapters=w.expand(2, -1)):
        got = case.draw([0, 1])
    assert hung_on(case.model) == before
    assert torch.equal(case.draw([0, 1]), base) and not torch.equal(base, plain)
    with pytest.raises(InputError, match="merged: weights of .* quantised or offloaded"):
        attach(case.pipe, layout, merged=True)
    parts = layout.split(w[0])
    replace(
        case.model,
        layout.names,
        lambda name, linear: Beside(linear, parts[name][0], parts[name][1] * layout.scale),
    )
    near("output", got, case.draw([0, 1]), 0.02 if kind in ROUND_INPUTS else 2e-4)
    assert (got - base).abs().max() > 0.02 * base.abs().max()
