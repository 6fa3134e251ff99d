"""attach inside pipelines of every kind, against PEFT, beside what else a user puts on a model."""

import pytest
import torch
from diffusers import CogView4Pipeline
from embed_cases import (
    KINDS,
    PROMPTS,
    TARGETS,
    make_bases,
    make_case,
    near,
    style_lora,
    trace,
)
from tiny_world import make_space
from unet_inputs import adapters, with_peft

import w2w_fast as w2w
from w2w_fast import InputError, Layout, attach
from w2w_fast.testing import assert_close


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return make_bases(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture
def case(request, bases):
    return make_case(getattr(request, "param", "text"), bases)


@pytest.fixture
def layout(case):
    return Layout.discover(case.model, TARGETS, rank=2, alpha=3.0)


# --- every kind of pipeline


@pytest.mark.parametrize("case", KINDS, indirect=True)
def test_each_person_of_a_batch_is_as_peft_draws_him_alone(case, layout):
    w, base, order = adapters(layout, 3), case.draw([0, 1, 2]), [2, 0, 1]
    before = trace(case.model)  # once it has drawn: diffusers hangs things on a model by then
    with attach(case.pipe, layout, adapters=w) as live:
        together = case.draw([0, 1, 2])
        live.adapters = w[order]
        near("any order", case.draw(order), together[order])
        if not isinstance(case.pipe, CogView4Pipeline):  # it leaves negative embeddings as they are
            live.images_per_identity = 2
            twins = case.draw(order, each=2)
            live.images_per_identity = 1
            near("first of two", twins[0::2], together[order])
            near("second of two", twins[1::2], together[order])
        live.adapters, live.strength = w, [1.0, 0.0, -0.5]
        mixed = case.draw([0, 1, 2])
        near("strength 1", mixed[:1], together[:1])
        near("strength 0", mixed[1:2], base[1:2])
        live.strength = 1.0
        live.adapters = w[1]
        near("alone", case.draw([1]), together[1:2])
    assert trace(case.model) == before
    assert torch.equal(case.draw([0, 1, 2]), base)
    for i in range(3):
        peft = with_peft(case.model, layout, w[i : i + 1])
        near("PEFT", together[i : i + 1], case.draw([i]))
        if i == 2:  # and a strength
            for name in layout.names:
                case.model.get_submodule(name).scale_layer(-0.5)
            near("PEFT at -0.5", mixed[2:], case.draw([2]))
        peft.unload()
    assert (together - base).abs().max() > 0.02 * base.abs().max()


@pytest.mark.parametrize("case", ["xl", "sd3", "controlnet"], indirect=True)
def test_identity_guidance_runs_the_first_half_without(case, layout):
    w = adapters(layout, 2)
    seen = {}
    with attach(case.pipe, layout, adapters=w, identity_guidance=True):
        name = layout.names[0]
        spy = case.model.get_submodule(name).register_forward_hook(
            lambda module, args, out: seen.setdefault("change", out - module.forward(args[0]))
        )
        case.draw([0, 1])
        spy.remove()
    change = seen["change"].abs().amax((1, 2))
    assert change.shape == (4,) and (change[:2] < 1e-6).all() and (change[2:] > 1e-3).all()


@pytest.mark.parametrize(
    ("case", "guidance"), [("cogview4", 3.0), ("pixart", 1.0)], indirect=["case"]
)
def test_identity_guidance_is_refused_where_no_half_can_be_told(case, layout, guidance):
    with (
        attach(case.pipe, layout, adapters=adapters(layout, 2), identity_guidance=True),
        pytest.raises(InputError, match="identity_guidance: wanted the doubled batch"),
    ):
        case.draw([0, 1], guidance=guidance)


# --- one identity a sample, over the steps


@pytest.fixture
def space(case):
    return make_space(Layout.discover(case.model, alpha=8.0))


@pytest.mark.parametrize("case", ["text", "xl", "sd3"], indirect=True)
def test_a_start_an_image_is_each_image_with_its_start(case, space):
    people = w2w.sample(space, 3, seed=2)
    edited = w2w.edit(space, people, beard=torch.tensor([2.0, -2.0, 0.0]), age=2.0)
    options = {"steps": 4, "guidance": 2.0, "progress": False, "output_type": "np"}

    def draw(rows=slice(None), **more):
        seeds = [5, 6, 7][rows]
        images = w2w.generate(
            space, case.pipe, edited[rows], PROMPTS[rows], seeds=seeds, **options, **more
        )
        return torch.stack([torch.as_tensor(image) for image in images])

    draw(before=people)
    t = case.pipe.scheduler.timesteps.tolist()
    starts = [t[0], t[2], -1.0]  # edited throughout, in the second half, never
    together = draw(before=people, start=starts, batch=2)
    for i, start in enumerate(starts):
        row = slice(i, i + 1)
        assert_close("alone", together[row], draw(row, before=people[row], start=start), 0.01)
    assert_close("throughout", together[:1], draw()[:1], 0.01)
    assert (together[1:] - draw()[1:]).abs().amax((1, 2, 3)).min() > 0

    # The same by hand: the pipeline's own callback, live changes between steps.
    def at_step(pipe, i, now, tensors):
        later = pipe.scheduler.timesteps[i + 1 :]
        if len(later):
            late = torch.tensor(starts) >= later[0]
            live.identities = torch.where(late[:, None], edited, people)
        return tensors

    with attach(case.pipe, space, identities=torch.cat([edited[:1], people[1:]])) as live:
        by_hand = case.pipe(
            PROMPTS,
            num_inference_steps=4,
            guidance_scale=2.0,
            generator=[torch.Generator().manual_seed(s) for s in (5, 6, 7)],
            callback_on_step_end=at_step,
            output_type="np",
        ).images
    assert_close("by hand", torch.as_tensor(by_hand), together, 0.01)


def test_generate_draws_with_pipelines_that_take_no_callback(bases):
    case = make_case("pixart", bases)
    space = make_space(Layout.discover(case.model, alpha=8.0))
    people = w2w.sample(space, 2, seed=2)

    class Prompted:
        """PixArt with a text encoder, as far as ``generate`` can see."""

        def __getattr__(self, name):
            return getattr(case.pipe, name)

        def __call__(self, prompts, **options):
            options |= {**case.options, **{n: t[: len(prompts)] for n, t in case.embeds.items()}}
            return case.pipe(**options)

    images = w2w.generate(space, Prompted(), people, steps=2, progress=False)
    assert len(images) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"start": [1, 2]}, r"start: wanted a finite number or \[3\], got \[1.0, 2.0\]"),
        ({"start": float("nan")}, "start: wanted a finite number"),
        ({"start": "late"}, r"start: wanted a finite number or \[3\], got 'late'"),
        ({"strength": "strong"}, r"strength: wanted a finite number or \[3\], got 'strong'"),
        ({"start": 500, "before": None}, "start: wanted with before"),
    ],
)
def test_refusals_of_generate(case, space, options, said):
    people = w2w.sample(space, 3)
    with pytest.raises(InputError, match=said):
        w2w.generate(space, case.pipe, people, **{"before": people, **options})


@pytest.mark.parametrize("case", ["text", "img2img", "controlnet", "xl", "inpaint"], indirect=True)
def test_one_prompt_too_few_is_refused(case, space):
    with attach(case.pipe, space, identities=w2w.sample(space, 2)):
        for guidance in (1.0, 3.0):
            with pytest.raises(InputError, match="give it one prompt an identity"):
                case.draw([0], guidance=guidance)


# --- blending, and another LoRA beside


def test_a_blend_of_two_is_between_them(case, space):
    a, b = w2w.sample(space, 2, seed=4, factor=2.0)
    path = torch.stack([torch.lerp(a, b, part) for part in (0.0, 0.3, 1.0)])
    w = space.reconstruct(path)
    near("weights", w[1], torch.lerp(w[0], w[2], 0.3), 1e-5)
    with attach(case.pipe, space, identities=path):
        drawn = case.draw([0, 1, 2])
    peft = with_peft(case.model, space.layout, w[1:2])
    near("PEFT", drawn[1:2], case.draw([1]))
    peft.unload()


@pytest.mark.parametrize("case", ["text", "xl", "controlnet"], indirect=True)
@pytest.mark.parametrize("style_first", [True, False])
def test_a_style_lora_beside(case, space, tmp_path, style_first):
    pipe, style, c = case.pipe, style_lora(case.model), w2w.sample(space, 2, seed=3)
    plain = trace(case.model)[0]
    if style_first:
        pipe.load_lora_weights(style, adapter_name="style")
    with attach(pipe, space, identities=c):
        if not style_first:
            pipe.load_lora_weights(style, adapter_name="style")
        pipe.set_adapters(["style"], [0.7])
        got = case.draw([0, 1])
        pipe.disable_lora()
        alone = case.draw([0, 1])
        pipe.enable_lora()
        assert torch.equal(case.draw([0, 1]), got)
    # Oracle: both by PEFT, from the file that other tools load.
    for i in range(2):
        file = w2w.export(space, c[i], tmp_path / f"{i}.safetensors", format="diffusers")
        pipe.load_lora_weights(file, adapter_name="person")
        pipe.set_adapters(["style", "person"], [0.7, 1.0])
        near("both", got[i : i + 1], case.draw([i]))
        pipe.set_adapters(["person"], [1.0])
        near("person", alone[i : i + 1], case.draw([i]))
        pipe.delete_adapters("person")
    pipe.unload_lora_weights()
    assert trace(case.model)[0] == plain
    assert (got - alone).abs().max() > 0.01 * alone.abs().max()
