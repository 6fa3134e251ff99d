"""attach: against PEFT's mixed batches, alone against together, exact undo, training, compile."""

import copy
import gc
import weakref

import awkward
import pytest
import torch
from peft import LoraConfig
from unet_inputs import adapters, inputs, run, state_hash, with_peft

from w2w_fast.attach import attach
from w2w_fast.errors import InputError
from w2w_fast.layout import Layout
from w2w_fast.space import WeightSpace
from w2w_fast.testing import assert_close


@pytest.fixture
def layout(tiny_unet):
    return Layout.discover(tiny_unet)


@pytest.fixture
def space(layout):
    return WeightSpace.from_population(adapters(layout, 20) + 0.1, layout, 6)


# --- the same as PEFT


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_equals_peft_mixed_batches(tiny_unet, rank, groups):
    layout = Layout.discover(tiny_unet, ("to_q", "to_k", "to_v", "to_out.0"), rank, 3.0)
    w, strength = adapters(layout, 3), torch.tensor([1.0, -0.5, 2.0])
    args, names = inputs(3 * groups), ["a0", "a1", "a2"]
    base = run(tiny_unet, args)
    with attach(tiny_unet, layout, adapters=w, strength=strength) as live:
        ours = run(tiny_unet, args)
        live.identity_guidance = groups > 1
        guided = run(tiny_unet, args)
    scaled = w.clone()
    for _, B in layout.slices():
        scaled[:, B] *= strength[:, None]
    peft = with_peft(tiny_unet, layout, scaled)
    with torch.no_grad():
        want = peft(*args, adapter_names=names * groups).sample
        want_guided = peft(*args, adapter_names=["__base__"] * 3 + names * (groups - 1)).sample
    size = float(want.abs().max())
    assert (want - base).abs().max() > 0.02 * size
    assert_close("output", ours, want, 1e-5 * size)
    if groups > 1:
        assert_close("guided", guided, want_guided, 1e-5 * size)


def test_gradients_equal_peft(tiny_unet, layout):
    w, args = adapters(layout, 3).requires_grad_(), inputs(3)
    g = awkward.normal(3, 4, 8, 8, seed=3)
    with attach(tiny_unet, layout, adapters=w):
        (tiny_unet(*args).sample * g).sum().backward()
    peft = with_peft(tiny_unet, layout, w.detach())
    for name, parameter in peft.named_parameters():
        parameter.requires_grad_("lora_" in name)
    (peft(*args, adapter_names=["a0", "a1", "a2"]).sample * g).sum().backward()
    for i in range(3):
        modules = {name: tiny_unet.get_submodule(name) for name in layout.names}
        want = layout.flatten({
            name: (m.lora_A[f"a{i}"].weight.grad, m.lora_B[f"a{i}"].weight.grad)
            for name, m in modules.items()
        })  # fmt: skip
        assert_close(f"dw[{i}]", w.grad[i], want, 2e-5 * float(want.abs().max()))


@pytest.mark.slow
def test_sd15_size_in_bf16_is_as_near_to_float32_as_peft(sd15_unet):
    layout, k = Layout.sd15(), 4
    w, args = adapters(layout, k), inputs(k, text=768, side=8)
    names = [f"a{i}" for i in range(k)]
    base = run(sd15_unet, args)
    wide = with_peft(sd15_unet, layout, w)
    with torch.no_grad():
        want = wide(*args, adapter_names=names).sample
    wide.unload()
    with torch.device("meta"):
        narrow = type(sd15_unet).from_config(sd15_unet.config)
    state = {name: tensor.bfloat16() for name, tensor in sd15_unet.state_dict().items()}
    narrow.load_state_dict(state, assign=True)
    narrow.eval().requires_grad_(False)
    half = args[0].bfloat16(), args[1], args[2].bfloat16()
    before = state_hash(narrow)
    with attach(narrow, layout, adapters=w):
        ours = run(narrow, half)
    assert state_hash(narrow) == before
    peft = with_peft(narrow, layout, w)
    with torch.no_grad():
        theirs = peft(*half, adapter_names=names).sample
    error, allowed = ((x.float() - want).square().mean().sqrt() for x in (ours, theirs))
    effect = (want - base).square().mean().sqrt()
    print(f"rms: effect {effect:.4f}, attach's error {error:.5f}, PEFT's {allowed:.5f}")
    assert allowed < 0.5 * effect
    assert error <= 2 * allowed


# --- many at once


def test_64_identities_in_a_batch_equal_64_single_runs(tiny_unet, layout):
    w, args = adapters(layout, 64), inputs(64)
    with attach(tiny_unet, layout, adapters=w) as live:
        together = run(tiny_unet, args)
        alone = []
        for i in range(64):
            live.adapters = w[i]
            alone.append(run(tiny_unet, (args[0][i : i + 1], args[1], args[2][i : i + 1])))
    want = torch.cat(alone)
    assert_close("image", together, want, 1e-5 * float(want.abs().max()))


def test_images_per_identity_are_neighbours(tiny_unet, layout):
    w, args = adapters(layout, 2), inputs(12)
    with attach(tiny_unet, layout, adapters=w.repeat_interleave(3, 0)) as live:
        want = run(tiny_unet, args)
        live.adapters = w
        live.images_per_identity = 3
        assert_close("image", run(tiny_unet, args), want, 1e-6)
        live.identity_guidance = True
        got = run(tiny_unet, args)
    assert_close("unconditional", got[:6], run(tiny_unet, args)[:6], 1e-6)
    assert_close("conditional", got[6:], want[6:], 1e-6)


@pytest.mark.parametrize("batch", [1, 5, 12])
def test_one_identity_serves_any_batch(tiny_unet, layout, batch):
    w, args = adapters(layout, 1), inputs(batch)
    with attach(tiny_unet, layout, adapters=w[0]) as live:
        got = run(tiny_unet, args)
        if batch % 2 == 0:
            live.identity_guidance = True
            guided = run(tiny_unet, args)
            assert_close("conditional", guided[batch // 2 :], got[batch // 2 :], 1e-5)
            assert (guided - got)[: batch // 2].abs().max() > 1e-3
    with attach(tiny_unet, layout, adapters=w, merged=True):
        assert_close("merged", run(tiny_unet, args), got, 1e-5)


def test_nan_in_one_sample_stays_there(tiny_unet, layout):
    (z, t, e), w = inputs(3), adapters(layout, 3)
    z[1, 0, 0, 0] = torch.nan
    with attach(tiny_unet, layout, adapters=w):
        got = run(tiny_unet, (z, t, e))
    assert got[1].isnan().all() and got[[0, 2]].isfinite().all()


# --- identities and swaps


def test_identities_are_reconstructed(tiny_unet, space):
    c, args = space.coefficients[:3], inputs(3)
    with attach(tiny_unet, space, identities=c) as live:
        got = run(tiny_unet, args)
        assert torch.equal(live.identities, c)
        assert torch.equal(live.adapters, space.reconstruct(c))
        live.adapters = space.reconstruct(c)
        assert torch.equal(run(tiny_unet, args), got) and live.identities is None


def test_swaps_are_in_place_and_do_not_accumulate(tiny_unet, layout):
    w, args = adapters(layout, 6), inputs(3)
    with attach(tiny_unet, layout, adapters=w[:3]) as live:
        first, where = run(tiny_unet, args), live._buffer.data_ptr()
        for i in range(20):
            live.adapters, live.strength = w[i % 4 : i % 4 + 3], 0.1 * i
        assert live._buffer.data_ptr() == where
        live.adapters, live.strength = w[:3], 1.0
        assert torch.equal(run(tiny_unet, args), first)
        live.strength = 0.0
        assert torch.equal(run(tiny_unet, args), run_detached(live, tiny_unet, args))


def run_detached(live, model, args):
    live.detach()
    return run(model, args)


def test_changes_in_place_are_seen(tiny_unet, space):
    c, args = space.coefficients[:2].clone(), inputs(2)
    with attach(tiny_unet, space, identities=c) as live:
        before = run(tiny_unet, args)
        c.add_(1.0)
        after = run(tiny_unet, args)
        live.identities = c.clone()
        assert torch.equal(run(tiny_unet, args), after) and not torch.equal(before, after)


# --- exact undo


@pytest.mark.parametrize("merged", [False, True])
def test_the_model_is_put_back_bit_for_bit(tiny_unet, layout, merged):
    before, args, w = state_hash(tiny_unet), inputs(1), adapters(layout, 5)
    want = run(tiny_unet, args)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny_unet.modules())
    with attach(tiny_unet, layout, adapters=w[0], merged=merged) as live:
        assert merged or state_hash(tiny_unet) == before
        for row in w:
            live.adapters = row
            assert not torch.equal(run(tiny_unet, args), want)
    assert state_hash(tiny_unet) == before and torch.equal(run(tiny_unet, args), want)
    after = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny_unet.modules())
    assert after == hooks
    live.detach()
    assert state_hash(tiny_unet) == before


def test_an_error_inside_leaves_the_model_as_it_was(tiny_unet, layout):
    before, w = state_hash(tiny_unet), adapters(layout, 1)
    for merged in (False, True):
        with pytest.raises(RuntimeError), attach(tiny_unet, layout, adapters=w, merged=merged):
            raise RuntimeError
        with pytest.raises(InputError, match="adapters: wanted"):
            attach(tiny_unet, layout, adapters=w[:, 1:], merged=merged)
        assert state_hash(tiny_unet) == before
        attach(tiny_unet, layout, merged=merged).detach()


def test_merged_is_the_weight_plus_the_product_rounded_once(tiny_unet, layout):
    tiny_unet.bfloat16()
    w = adapters(layout, 1)
    with attach(tiny_unet, layout, adapters=w, strength=0.7, merged=True) as live:
        assert live.merged
        for name, (A, B) in layout.split(w[0]).items():
            pristine = live._pristine[name].double()
            want = pristine + 0.7 * layout.scale * B.double() @ A.double()
            got = tiny_unet.get_submodule(name).weight
            assert_close(name, got, want, float(want.abs().max()) * 2**-8)


def test_attaching_300_times_leaves_nothing_behind(tiny_unet, layout):
    w, ghosts = adapters(layout, 1), []
    for i in range(300):
        live = attach(tiny_unet, layout, adapters=w, merged=bool(i % 2))
        ghosts.append(weakref.ref(live))
        live.detach()
    del live
    gc.collect()
    assert not any(ghost() for ghost in ghosts)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_unet.modules())


# --- training through it


def test_parameters_moved_by_an_optimiser_are_read_anew(tiny_unet, layout):
    w, args = adapters(layout, 2).requires_grad_(), inputs(2)
    optimiser = torch.optim.SGD([w], lr=0.05)
    with attach(tiny_unet, layout, adapters=w) as live:
        losses = []
        for _ in range(6):
            loss = tiny_unet(*args).sample.square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
        now = run(tiny_unet, args)
        live.adapters = w.detach().clone()
        assert_close("after", run(tiny_unet, args), now, 1e-6)


def test_gradients_reach_the_coefficients(tiny_unet, space):
    c, args = space.coefficients[:2].clone().requires_grad_(), inputs(2)
    with attach(tiny_unet, space, identities=c) as live:
        tiny_unet(*args).sample.square().sum().backward()
        through_space = c.grad.clone()
        w = space.reconstruct(c).detach().requires_grad_()
        live.adapters = w
        tiny_unet(*args).sample.square().sum().backward()
    want = (space.std * w.grad) @ space.basis.float()
    assert_close("dc", through_space, want, 1e-4 * float(want.abs().max()))


def test_two_forwards_and_one_backward(tiny_unet, layout):
    w, args = adapters(layout, 2).requires_grad_(), inputs(2)
    with attach(tiny_unet, layout, adapters=w):
        (tiny_unet(*args).sample + tiny_unet(*args).sample).sum().backward()
        twice = w.grad.clone()
        w.grad = None
        tiny_unet(*args).sample.sum().backward()
    assert_close("dw", twice, 2 * w.grad, 1e-4 * float(w.grad.abs().max()))


def test_checkpointing_and_autocast_give_the_same_gradient(tiny_unet, layout):
    w, args = adapters(layout, 2).requires_grad_(), inputs(2)
    grads = []
    with attach(tiny_unet, layout, adapters=w):
        for mode in ("plain", "checkpointing", "autocast"):
            if mode == "checkpointing":
                tiny_unet.enable_gradient_checkpointing()
                tiny_unet.train()
            with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
                loss = tiny_unet(*args).sample.float().square().sum()
            loss.backward()
            grads.append(w.grad)
            w.grad = None
    size = float(grads[0].abs().max())
    assert_close("checkpointing", grads[1], grads[0], 1e-5 * size)
    assert_close("autocast", grads[2], grads[0], 0.15 * size)


# --- torch.compile


def test_compiled_whole_and_never_again_over_swaps(tiny_unet, layout):
    from torch._dynamo.testing import CompileCounter

    counter, args = CompileCounter(), inputs(6)
    compiled = torch.compile(tiny_unet, backend=counter, fullgraph=True)
    base = run(compiled, args)
    frames = counter.frame_count
    with attach(compiled, layout, adapters=adapters(layout, 3), identity_guidance=True) as live:
        people = adapters(layout, 3 * 20).unflatten(0, (20, 3))
        for i in range(1000):
            live.adapters = people[i % 20]
            if i % 100 < 2:
                live.strength = 0.01 * i if i % 2 else [0.01 * i, 1.0, -1.0]
            got = run(compiled, args)
            if i in (0, 1, 999):
                # The graph holds the definition, eager the kernels: other orders of sums.
                assert_close("output", got, run(tiny_unet, args), 5e-6)
                assert (got - base)[3:].abs().max() > 1e-3
        assert counter.frame_count == frames + 1
    assert_close("detached", run(compiled, args), base, 1e-6)


# --- on other people's bases


def test_over_a_users_own_lora(tiny_unet, layout):
    args, own, w = inputs(2), adapters(layout, 1, seed=9), adapters(layout, 2)
    config = LoraConfig(r=1, lora_alpha=layout.alpha, target_modules=list(layout.names))
    tiny_unet.add_adapter(config, adapter_name="own")
    tiny_unet.eval()
    with torch.no_grad():
        for name, (A, B) in layout.split(own[0]).items():
            module = tiny_unet.get_submodule(name)
            module.lora_A["own"].weight.copy_(A)
            module.lora_B["own"].weight.copy_(B)
    with attach(tiny_unet, layout, adapters=w):
        got = run(tiny_unet, args)
    tiny_unet.delete_adapters("own")
    tiny_unet = unwrap(tiny_unet)
    double = Layout(layout.modules, 2, 2 * layout.alpha)
    both = double.flatten({
        name: (torch.cat([A, o_A.expand_as(A)], 1), torch.cat([B, o_B.expand_as(B)], 2))
        for (name, (A, B)), (o_A, o_B) in zip(
            layout.split(w).items(), layout.split(own).values(), strict=True
        )
    })  # fmt: skip
    with attach(tiny_unet, double, adapters=both):
        assert_close("output", got, run(tiny_unet, args), 1e-5)


def unwrap(model):
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.base_layer)
    return model


def test_over_weights_stored_in_fp8(tiny_unet, layout):
    rounded, args, w = copy.deepcopy(tiny_unet), inputs(2), adapters(layout, 2)
    tiny_unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    stored = {p.dtype for p in tiny_unet.parameters()}
    assert torch.float8_e4m3fn in stored
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            parameter.copy_(tiny_unet.get_parameter(name).float())
    with attach(tiny_unet, layout, adapters=w):
        got = run(tiny_unet, args)
    with attach(rounded, layout, adapters=w):
        assert_close("output", got, run(rounded, args), 1e-5)
    with pytest.raises(InputError, match="merged: weights of .* are quantised"):
        attach(tiny_unet, layout, merged=True)
