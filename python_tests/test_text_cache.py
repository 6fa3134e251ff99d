"""cache_text: the same bits as without, computed once, never stale, and no trace afterwards."""

from __future__ import annotations

import pytest
import torch
from tiny_world import make_pipe, make_space
from torch import nn
from unet_inputs import adapters, inputs, state_hash

from w2w_fast import InputError, Layout, attach, edit, generate, prepared, sample

ALL = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture(params=[("to_q", "to_v"), ALL], ids=["qv", "all"])
def layout(request, tiny_unet):
    """Without and with adapters on to_k."""
    return Layout.discover(tiny_unet, targets=request.param, alpha=2.0)


@pytest.fixture
def computed(monkeypatch):
    """The Linears that computed something, in order."""
    seen, real = [], nn.Linear.forward

    def forward(self, x):
        seen.append(self)
        return real(self, x)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    return seen


def text_linears(unet):
    crossed = [m for m in unet.modules() if getattr(m, "is_cross_attention", False)]
    assert crossed
    return {linear for m in crossed for linear in (m.to_k, m.to_v)}


@torch.no_grad()
def steps(unet, text, n=3):
    """What n steps give: other latents and another timestep each, the same text."""
    return [
        unet(inputs(len(text), seed=i)[0], torch.tensor(9 * i), encoder_hidden_states=text).sample
        for i in range(n)
    ]


def same(got, want):
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("guided", [False, True])
def test_same_bits_and_computed_once(tiny_unet, layout, computed, guided):
    text, w = inputs(6)[2], adapters(layout, 3)
    options = {"adapters": w, "identity_guidance": guided}
    with attach(tiny_unet, layout, **options):
        want = steps(tiny_unet, text)
    computed.clear()
    with attach(tiny_unet, layout, **options, cache_text=True):
        got = steps(tiny_unet, text)
    assert same(got, want)
    of_text = text_linears(tiny_unet)
    counts = {module: computed.count(module) for module in computed}
    assert {module for module, n in counts.items() if n == 1 and module in of_text} == of_text
    assert all(n % 3 == 0 for module, n in counts.items() if module not in of_text)


def _to_k(unet):
    return unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k


LIVE = {
    "adapters": lambda live: setattr(live, "adapters", live.adapters.flip(0)),
    "adapters in place": lambda live: live.adapters.mul_(2),
    "strength": lambda live: setattr(live, "strength", [0.5, 1.0, 2.0]),
    "one, with neighbours": lambda live: (
        setattr(live, "images_per_identity", 3), setattr(live, "adapters", live.adapters[:1])
    ),
    "guided": lambda live: setattr(live, "identity_guidance", True),
}  # fmt: skip
MODEL = {
    "text in place": lambda unet, text: text.add_(1),
    "weight in place": lambda unet, text: _to_k(unet).weight.mul_(2),
    "weight replaced": lambda unet, text: setattr(
        _to_k(unet), "weight", nn.Parameter(2 * _to_k(unet).weight, requires_grad=False)
    ),
}


@pytest.mark.parametrize("change", [*LIVE, *MODEL])
def test_nothing_is_stale(tiny_unet, layout, change):
    """After a change between two steps the next one is as without a cache."""
    text, w = inputs(6)[2], adapters(layout, 3)
    with torch.no_grad(), attach(tiny_unet, layout, adapters=w.clone(), cache_text=True) as live:
        first = steps(tiny_unet, text)
        if change in LIVE:
            LIVE[change](live)
        else:
            MODEL[change](tiny_unet, text)
        got = steps(tiny_unet, text)
    assert not same(got, first)
    with attach(tiny_unet, layout, adapters=w.clone()) as live:
        if change in LIVE:
            LIVE[change](live)
        assert same(got, steps(tiny_unet, text))


def test_another_tensor_is_other_text_even_with_the_same_numbers(tiny_unet, layout, computed):
    text, w = inputs(3)[2], adapters(layout, 3)
    with attach(tiny_unet, layout, adapters=w, cache_text=True):
        first = steps(tiny_unet, text)
        computed.clear()
        assert same(steps(tiny_unet, text.clone()), first)
        assert text_linears(tiny_unet) <= set(computed)
        other = steps(tiny_unet, text.flip(0))
    with attach(tiny_unet, layout, adapters=w):
        assert same(other, steps(tiny_unet, text.flip(0)))


def test_what_was_kept_and_then_changed_is_computed_again(tiny_unet, layout):
    text, w = inputs(3)[2], adapters(layout, 3)
    with torch.no_grad(), attach(tiny_unet, layout, adapters=w, cache_text=True) as live:
        first = steps(tiny_unet, text)
        for kept in live._text._kept.values():
            kept.out.zero_()
        assert same(steps(tiny_unet, text), first)


def test_under_autocast_and_without(tiny_unet, layout):
    text, w = inputs(3)[2], adapters(layout, 3)

    def both():
        with torch.autocast("cpu", torch.bfloat16):
            low = steps(tiny_unet, text)
        return low + steps(tiny_unet, text) + low

    with attach(tiny_unet, layout, adapters=w):
        want = both()
    with attach(tiny_unet, layout, adapters=w, cache_text=True):
        assert same(both(), want)


@pytest.mark.parametrize("first", [True, False])
def test_beside_other_hooks(tiny_unet, layout, first):
    """They see what they see without the cache, at every step."""
    text, w, seen = inputs(3)[2], adapters(layout, 3), []
    module = tiny_unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_v

    def hook(module, args, out):
        seen.append(out.clone())
        return out + len(seen)

    results = []
    for cached in (False, True):
        seen.clear()
        handles = [module.register_forward_hook(hook)] if first else []
        with attach(tiny_unet, layout, adapters=w, cache_text=cached):
            if not first:
                handles = [module.register_forward_hook(hook)]
            results.append((steps(tiny_unet, text), list(seen)))
        handles[0].remove()
    for got, want in zip(results[1], results[0], strict=True):
        assert len(want) == 3 and same(got, want)


def test_with_gradients_nothing_is_kept(tiny_unet, layout):
    args, grads = inputs(2), []
    for cached in (False, True):
        w = adapters(layout, 2).requires_grad_()
        with attach(tiny_unet, layout, adapters=w, cache_text=cached):
            for _ in range(2):
                tiny_unet(*args).sample.square().sum().backward()
        grads.append(w.grad)
    assert torch.equal(*grads)


def test_in_inference_mode(tiny_unet, layout):
    with torch.inference_mode():
        text, w = inputs(3)[2], adapters(layout, 3)
        with attach(tiny_unet, layout, adapters=w):
            want = steps(tiny_unet, text)
        with attach(tiny_unet, layout, adapters=w, cache_text=True):
            got = steps(tiny_unet, text)
            text.add_(1)  # which inference tensors do not count
            assert not same(steps(tiny_unet, text), got)
    assert same(got, want)


def test_leaves_no_trace(tiny_unet, layout):
    modules = text_linears(tiny_unet)
    keys, bits = {m: set(m.__dict__) for m in tiny_unet.modules()}, state_hash(tiny_unet)
    replaced, taken = sorted(modules, key=id)[:2]
    replaced.forward = own = lambda x: nn.functional.linear(x, replaced.weight, replaced.bias)
    with attach(tiny_unet, layout, adapters=adapters(layout, 3), cache_text=True) as live:
        steps(tiny_unet, inputs(3)[2])
        assert state_hash(tiny_unet) == bits and set(live._text._kept) == modules
        taken.forward = later = lambda x: nn.functional.linear(x, taken.weight, taken.bias)
    assert replaced.forward is own and taken.forward is later
    del replaced.forward, taken.forward
    assert {m: set(m.__dict__) for m in tiny_unet.modules()} == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_unet.modules())


def test_merged_weights_have_none(tiny_unet, layout):
    with pytest.raises(InputError, match="cache_text: wanted with merged=False"):
        attach(tiny_unet, layout, adapters=adapters(layout, 1), merged=True, cache_text=True)


@pytest.mark.parametrize("identity_guidance", [False, True])
def test_generate_with_a_delayed_edit(tmp_path, monkeypatch, computed, identity_guidance):
    """Identities change between two steps; the pictures are those without."""
    pipe = make_pipe(tmp_path)
    space = make_space(Layout.discover(pipe.unet, alpha=8.0))
    people = sample(space, 3, seed=2, factor=2.0)
    prompts = ["sks person", "sks person, at the beach", "sks person, at night"]
    options = {
        "before": people, "start": [900, 600, 300], "strength": torch.tensor([1.0, 0.5, 2.0]),
        "steps": 5, "guidance": 2.0, "identity_guidance": identity_guidance, "batch": 2,
        "progress": False,
    }  # fmt: skip
    edited = edit(space, people, beard=6.0)
    got = generate(space, pipe, edited, prompts, **options)
    few = len([m for m in computed if m in text_linears(pipe.unet)])
    real = prepared.attach
    monkeypatch.setattr(
        prepared, "attach", lambda *args, **kwargs: real(*args, **{**kwargs, "cache_text": False})
    )
    computed.clear()
    want = generate(space, pipe, edited, prompts, **options)
    assert [image.tobytes() for image in got] == [image.tobytes() for image in want]
    assert few < len([m for m in computed if m in text_linears(pipe.unet)])
