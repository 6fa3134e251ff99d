"""`generate`: images that can be made again alone, delayed edits, identity guidance, schedulers."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from tiny_world import SIZE, distance, make_space

from w2w_fast import InputError, attach, edit, generate, sample
from w2w_fast.verbs.generate import named_scheduler

OPTIONS = {"steps": 4, "guidance": 2.0, "progress": False}


@pytest.fixture
def people(space):
    return sample(space, 3, seed=2, factor=2.0)


@pytest.mark.parametrize("identity_guidance", [False, True])
def test_image_i_of_a_batch_is_the_image_made_alone(space, pipe, people, identity_guidance):
    prompts = ["sks person", "sks person, at the beach", "sks person, at night"]
    options = {**OPTIONS, "identity_guidance": identity_guidance}
    together = generate(space, pipe, people, prompts, seeds=[5, 9, 7], **options)
    assert [image.size for image in together] == [(SIZE, SIZE)] * 3
    for i, seed in enumerate([5, 9, 7]):
        alone = generate(space, pipe, people[i : i + 1], prompts[i], seeds=seed, **options)
        assert distance(alone, together[i : i + 1]) <= 1
    split = generate(space, pipe, people, prompts, seeds=[5, 9, 7], batch=2, **options)
    assert distance(split, together) <= 1
    # The person, the seed and the prompt each matter.
    assert distance(together[:1], together[1:2]) > 3
    first = {"seeds": 5, **options}
    assert distance(together[:1], generate(space, pipe, people[1:2], prompts[0], **first)) > 1


def test_seeds_count_up(space, pipe, people):
    counted = generate(space, pipe, people, seeds=11, **OPTIONS)
    assert distance(counted, generate(space, pipe, people, seeds=[11, 12, 13], **OPTIONS)) == 0


@torch.no_grad()
def by_hand(space, pipe, c, prompt, seed, steps, guidance, strength=1.0):
    """base(unconditional) + g (person(conditional) - base(unconditional)), a loop of its own."""
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    text, empty = pipe.encode_prompt(prompt, "cpu", 1, True)
    z = torch.randn(1, 4, SIZE // 2, SIZE // 2, generator=torch.Generator().manual_seed(seed))
    for t in scheduler.timesteps:
        base = pipe.unet(z, t, empty).sample
        with attach(pipe.unet, space, identities=c, strength=strength):
            person = pipe.unet(z, t, text).sample
        z = scheduler.step(base + guidance * (person - base), t, z).prev_sample
    image = pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample
    return pipe.image_processor.postprocess(image, output_type="pil")


def test_identity_guidance_is_its_definition(space, pipe, people):
    options = {"seeds": 3, **OPTIONS}
    c = people[:1]
    got = generate(space, pipe, c, identity_guidance=True, **options)
    assert distance(got, by_hand(space, pipe, c, "sks person", 3, 4, 2.0)) <= 1
    assert distance(got, generate(space, pipe, c, **options)) > 1


def test_strength_zero_is_the_base_model_and_one_an_image_is_allowed(space, pipe, people):
    base = generate(space, pipe, people, seeds=[1, 1, 1], strength=0.0, **OPTIONS)
    assert distance(base[:1], base[1:2]) == 0
    mixed = torch.tensor([0.0, 1.0, 2.0])
    each = generate(space, pipe, people, seeds=[1, 1, 1], strength=mixed, batch=2, **OPTIONS)
    full = generate(space, pipe, people, seeds=[1, 1, 1], **OPTIONS)
    assert distance(each[:1], base[:1]) <= 1
    assert distance(each[1:2], full[1:2]) <= 1
    assert distance(each[2:], full[2:]) > 1


def test_delayed_edit(space, pipe, people):
    edited = edit(space, people, beard=6.0, age=6.0)
    plain = {"seeds": 4, "batch": 2, **OPTIONS}
    before, after = (generate(space, pipe, c, **plain) for c in (people, edited))
    assert distance(before, after) > 3
    timesteps = pipe.scheduler.timesteps.tolist()  # 4 of them, none is 0

    def delayed(start):
        return generate(space, pipe, edited, before=people, start=start, **plain)

    assert distance(delayed(timesteps[0] + 1), after) == 0  # above the first: edited throughout
    assert distance(delayed(timesteps[0]), after) == 0
    assert distance(delayed(0), before) == 0  # unedited until the end
    assert distance(delayed(timesteps[-1] - 1), before) == 0
    middle = delayed(timesteps[2])
    assert distance(middle, before) > 0 and distance(middle, after) > 0
    assert distance(delayed(timesteps[2] + 1), middle) == 0  # between two timesteps: the later one


def test_other_schedulers_and_the_own_one_comes_back(space, pipe, people):
    own = pipe.scheduler
    other = named_scheduler("DPMSolverMultistepScheduler", pipe)
    assert isinstance(other, DPMSolverMultistepScheduler)
    assert other.config.prediction_type == own.config.prediction_type
    images = generate(space, pipe, people, scheduler=other, **OPTIONS)
    assert pipe.scheduler is own
    assert distance(images, generate(space, pipe, people, **OPTIONS)) > 0
    edited = edit(space, people, beard=6.0)
    late = generate(space, pipe, edited, before=people, start=500, scheduler=other, **OPTIONS)
    assert distance(late, images) > 0

    def fail(done, wanted):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        generate(space, pipe, people, scheduler=other, callback=fail, **OPTIONS)
    assert pipe.scheduler is own
    with attach(pipe, space):  # and nothing stayed attached
        pass


def test_callback_counts_and_nobody_gives_nothing(space, pipe, people):
    seen = []
    generate(space, pipe, people, batch=2, callback=lambda *x: seen.append(x), **OPTIONS)
    assert seen == [(2, 3), (3, 3)]
    assert generate(space, pipe, people[:0], **OPTIONS) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompts": ["a"]}, "prompts"),
        ({"prompts": "x" * 10_001}, "10,000"),
        ({"prompts": [1, 2, 3]}, "text"),
        ({"seeds": [1, 2]}, "seeds"),
        ({"seeds": -5}, "seed"),
        ({"steps": 10**6}, "steps"),
        ({"steps": 0}, "steps"),
        ({"batch": 0}, "batch"),
        ({"guidance": float("nan")}, "guidance"),
        ({"strength": torch.ones(2)}, "strength"),
        ({"strength": float("inf")}, "strength"),
        ({"before": torch.zeros(2, 6)}, "before"),
        ({"before": torch.full((3, 6), torch.inf)}, "before: holds NaN"),
        ({"memory": 1000}, "one picture needs .* tiling, or bfloat16, needs less"),
    ],
)
def test_refusals(space, pipe, people, options, said):
    with pytest.raises(InputError, match=said):
        generate(space, pipe, people, **{**OPTIONS, **options})


def test_refuses_people_of_another_space_and_unknown_schedulers(space, pipe, people):
    with pytest.raises(InputError, match="coefficients"):
        generate(space, pipe, people[:, :2], **OPTIONS)
    with pytest.raises(InputError, match="coefficients: holds NaN"):
        generate(space, pipe, people * torch.nan, **OPTIONS)
    for name in ("NoSuchScheduler", "StableDiffusionPipeline", "torch"):
        with pytest.raises(InputError, match="DDIMScheduler"):
            named_scheduler(name, pipe)


@pytest.mark.parametrize("identity_guidance", [False, True])
def test_in_a_pipeline_whose_unet_is_compiled(space, pipe, identity_guidance):
    people, plain = sample(space, 2, seed=0), pipe.unet
    options = {
        "steps": 2, "guidance": 3.0, "identity_guidance": identity_guidance, "progress": False
    }  # fmt: skip
    want = generate(space, pipe, people, **options)
    try:
        pipe.unet = torch.compile(plain, backend="eager", fullgraph=True)
        got = generate(space, pipe, people, **options)
    finally:
        pipe.unet = plain
    assert distance(got, want) <= 1


def test_warns_of_a_prompt_without_the_spaces_own(layout, pipe, people):
    space = make_space(layout, {"prompt": "sks person"})
    prompts = ["An SKS person", "a beach", "a tree"]
    with pytest.warns(UserWarning, match="'a beach' has no 'sks person' in it") as warned:
        generate(space, pipe, people, prompts, **OPTIONS)
    assert len(warned) == 1 and warned[0].filename == __file__
