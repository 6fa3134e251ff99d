"""attach through a pipeline, and everything that it refuses."""

import copy

import awkward
import pytest
import torch
from unet_inputs import adapters, inputs, run

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


# --- through a pipeline


def call(pipe, prompts, guidance, **options):
    return pipe(
        prompt_embeds=awkward.normal(8, 5, 24, seed=1)[:prompts],
        negative_prompt_embeds=awkward.normal(8, 5, 24, seed=2)[:prompts],
        height=8, width=8, num_inference_steps=2, guidance_scale=guidance, output_type="latent",
        generator=[torch.Generator().manual_seed(i // options.get("num_images_per_prompt", 1))
                   for i in range(prompts * options.get("num_images_per_prompt", 1))],
        **options,
    ).images  # fmt: skip


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_pipe_draws_each_identity_as_it_would_alone(tiny_pipe, layout, guidance):
    w = adapters(layout, 2)
    with attach(tiny_pipe, layout, adapters=w, identity_guidance=True) as live:
        both = call(tiny_pipe, 2, guidance)
        live.images_per_identity = 2
        doubled = call(tiny_pipe, 2, guidance, num_images_per_prompt=2)
        live.images_per_identity = 1
        assert_close("twins", doubled[::2], both, 1e-4)
        assert_close("twins", doubled[1::2], both, 1e-4)
        live.adapters = w[0]
        assert_close("first", call(tiny_pipe, 1, guidance), both[:1], 1e-4)
        assert_close("twice", call(tiny_pipe, 2, guidance)[:1], both[:1], 1e-4)
        live.adapters = w
        for prompts in (1, 3, 4):
            with pytest.raises(InputError, match="the pipe stacks"):
                call(tiny_pipe, prompts, guidance)


# --- guards


def test_wrong_batches_are_refused(tiny_unet, layout):
    with attach(tiny_unet, layout, adapters=adapters(layout, 3)) as live:
        for batch in (1, 2, 4, 12):
            with pytest.raises(InputError, match=f"a batch of {batch} rows for 3 identities x 1"):
                run(tiny_unet, inputs(batch))
        live.identity_guidance = True
        with pytest.raises(InputError, match="wanted the doubled batch"):
            run(tiny_unet, inputs(3))
        live.adapters = adapters(layout, 1)
        with pytest.raises(InputError, match="a batch of 3 rows for 1 identities"):
            run(tiny_unet, inputs(3))


def test_attaching_twice_is_refused(tiny_unet, layout):
    for merged in (False, True):
        with attach(tiny_unet, layout, merged=merged), pytest.raises(InputError) as error:
            attach(tiny_unet, layout)
        assert f"{len(layout.names)} of {len(layout.names)} modules already" in str(error.value)
    attach(tiny_unet, layout).detach()


def test_forward_without_adapters_is_refused(tiny_unet, layout):
    with attach(tiny_unet, layout), pytest.raises(InputError, match="no adapter set"):
        run(tiny_unet, inputs(1))


def test_modules_not_called_or_replaced_are_noticed(tiny_unet, layout):
    name = layout.names[0]
    parent = tiny_unet.get_submodule(name.rpartition(".")[0])
    n = len(layout.names)
    with attach(tiny_unet, layout, adapters=adapters(layout, 1)) as live:
        run(tiny_unet, inputs(1))
        live.check_called()
        old, parent.to_q = parent.to_q, copy.deepcopy(parent.to_q)
        parent.to_q._forward_hooks.clear()
        with pytest.raises(InputError, match=rf"{n - 1} of {n} .*replaced after.*: {name};"):
            run(tiny_unet, inputs(1))
        parent.to_q = old
        run(tiny_unet, inputs(1))
        tiny_unet.fuse_qkv_projections()
        with pytest.raises(InputError, match=f"not called: {name}"):
            run(tiny_unet, inputs(1))
    with pytest.raises(InputError, match="fused projections bypass"):
        attach(tiny_unet, layout, merged=True)
    tiny_unet.unfuse_qkv_projections()


def test_a_layout_of_another_model_is_refused_with_counts(tiny_unet):
    with pytest.raises(InputError, match="of 64 modules of the layout match"):
        attach(tiny_unet, Layout.sd15())


@pytest.mark.parametrize("merged", [False, True])
def test_bad_values_are_refused_and_change_nothing(tiny_unet, space, merged):
    c, args = space.coefficients[:1], inputs(1)
    with attach(tiny_unet, space, identities=c, merged=merged) as live:
        want = run(tiny_unet, args)
        poisoned = torch.full((1, space.d), torch.nan)
        for name, value, message in [
            ("identities", c[:, :-1], r"identities: wanted \[k, 6\], got \[1, 5\]"),
            ("identities", c[:0], r"identities: wanted \[k, 6\], got \[0, 6\]"),
            ("identities", None, "identities: wanted a floating-point tensor"),
            ("adapters", c, rf"adapters: wanted \[k, {space.d}\]"),
            ("adapters", poisoned, "NaN or infinite"),
            ("strength", [1.0, 2.0], "one of each of 1 identities, got 2"),
            ("strength", float("nan"), "strength: wanted a finite number"),
            ("strength", [[1.0]], "strength: wanted a finite number"),
            ("images_per_identity", 0, "images_per_identity: wanted a positive integer"),
            ("images_per_identity", 1.5, "images_per_identity: wanted a positive integer"),
        ]:
            with pytest.raises(InputError, match=message):
                setattr(live, name, value)
        if merged:
            with pytest.raises(InputError, match="exactly one identity and no gradient"):
                live.identities = space.coefficients[:2]
            with pytest.raises(InputError, match="merged weights serve every row"):
                live.identity_guidance = True
        assert torch.equal(run(tiny_unet, args), want) and torch.equal(live.identities, c)
    with pytest.raises(InputError, match="detached already"):
        live.identities = c


def test_attach_refuses_what_it_cannot_use(tiny_unet, layout, space):
    w = adapters(layout, 1)
    with pytest.raises(InputError, match="a pipeline with a unet or transformer, got str"):
        attach("unet", layout)
    with pytest.raises(InputError, match="wanted a WeightSpace or a Layout, got dict"):
        attach(tiny_unet, {})
    with pytest.raises(InputError, match="got both"):
        attach(tiny_unet, space, adapters=w, identities=space.coefficients)
    with pytest.raises(InputError, match="attach with a space"):
        attach(tiny_unet, layout, identities=space.coefficients)
    attach(tiny_unet, layout).detach()
