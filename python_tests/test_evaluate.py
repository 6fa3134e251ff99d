"""`evaluate` on a tiny random pipeline, with a judge whose answers are known."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from tiny_world import SIZE, make_pipe, make_space, photographs

from w2w_fast import InputError, Layout, attach
from w2w_fast.evaluate import (
    SECTIONS,
    HeldOut,
    Sight,
    Size,
    Study,
    components,
    edits,
    evaluate,
    inversion,
    outside,
    text_slider,
    told,
)
from w2w_fast.evaluate.clip import ClipJudge, clip_study, held_out_of
from w2w_fast.evaluate.study import draw
from w2w_fast.sources import Subject

TINY = Size(
    people=3, images=1, attributes=2, strengths=(1.0, 2.0), inverted=3, steps=2, photos=2,
    slider_steps=2, permutations=2,
)  # fmt: skip


class Brightness:
    """Attributes are brightnesses of the three colours, identity is a tiny picture."""

    attributes = ("glasses", "beard", "age")

    def read(self, images):
        x = images.float() / 255
        small = F.avg_pool2d(x, SIZE // 2).flatten(1)
        colours = x.mean((2, 3))
        return Sight(colours, F.normalize(small - 0.5), torch.ones(len(x)), small)


def held_out(n, seed):
    photos = photographs(4 * n, seed).unflatten(0, (n, 4))
    masks = torch.ones(n, 2, 1, SIZE, SIZE)
    labels = (torch.arange(3 * n).view(n, 3) % 2).float()
    return HeldOut(labels, photos[:, :2], masks, ("a face", "a face"), photos[:, 2:])


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    pipe = make_pipe(tmp_path_factory.mktemp("tokenizer"))
    space = make_space(Layout.discover(pipe.unet, alpha=4.0))
    return Study(
        space=space,
        pipe=pipe,
        judge=Brightness(),
        prompts=lambda n, seed: [
            f"{{who}}, {['at night', 'in the snow'][i % 2]}" for i in range(n)
        ],
        who="sks person",
        words={"beard": "beard", "glasses": "glasses"},
        settings={"steps": 2, "guidance": 2.0, "identity_guidance": True},
        inversion={"lr": 0.1},
        held_out=held_out,
        photos_of=lambda rows: photographs(len(rows), 9),
        size=TINY,
    )


def test_a_figure_is_a_mean_with_an_interval_that_shrinks_with_people():
    values = torch.randn(400, generator=torch.Generator().manual_seed(1))
    whole, few = told.figure(values), told.figure(values[:25])
    assert whole.value == pytest.approx(float(values.mean()), abs=1e-6)
    assert whole.low < whole.value < whole.high
    # The percentile bootstrap of a mean is 1.96 standard errors on either side, nearly.
    assert whole.high - whole.low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert few.high - few.low > 2.5 * (whole.high - whole.low)
    two = told.figure(torch.stack([values, values], 1))  # pictures of one person are no new people
    assert two == whole


def test_a_claim_fails_when_it_fails():
    assert told.claim("x", 0.5, at_least=0.5)["holds"]
    assert not told.claim("x", 0.49, at_least=0.5)["holds"]
    assert told.claim("x", told.Figure(0.1, 0.0, 0.9), at_most=0.2)["holds"]
    assert not told.claim("x", float("nan"), at_most=0.2)["holds"]


def test_figures_are_interpolated_to_the_same_effect():
    def step(strength, gain, kept):
        n = len(gain)
        rest = {key: torch.zeros(n) for key in edits.MEASURES}
        return strength, torch.tensor(gain), rest | {"identity": torch.tensor(kept)}

    steps = [step(0.0, [0.0, 0.0], [1.0, 1.0]), step(2.0, [0.2, 0.2], [0.9, 0.9])]
    assert edits._matched(steps) is None  # never got there
    steps.append(step(4.0, [0.9, 0.7], [0.5, 0.7]))
    found = edits._matched(steps)
    assert found["strength"] == pytest.approx(3.0)  # half way from .2 to .8
    assert found["identity"]["value"] == pytest.approx((0.7 + 0.8) / 2)


def test_a_fused_slider_is_the_attached_one_and_leaves_no_trace(study):
    model, layout = study.pipe.unet, study.space.layout
    w = 0.1 * torch.randn(1, layout.size, generator=torch.Generator().manual_seed(2))
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor(500), torch.randn(2, 24, 16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        with attach(model, layout, adapters=w, strength=1.5):
            expected = model(x, t, text).sample
        with text_slider.fused(study, w, 1.5):
            made = model(x, t, text).sample
    assert (made - expected).abs().max() < 1e-5 < (made - model(x, t, text).sample).abs().max()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_text_slider_learns_the_contrast(study):
    few, many = (
        text_slider.train_slider(
            dataclasses.replace(study, size=dataclasses.replace(TINY, slider_steps=steps)),
            "beard",
            3,
        )
        for steps in (1, 60)
    )  # fmt: skip
    assert few.shape == (1, study.space.d) and many.isfinite().all()

    def missed(w):
        """How far the slider's prediction is from the contrast that it was to learn."""
        pipe, g = study.pipe, torch.Generator().manual_seed(5)
        z, t = torch.randn(16, 4, 8, 8, generator=g), torch.full((16,), 600)
        plain, wished = (
            pipe.encode_prompt([f"person{x}, at night"] * 16, "cpu", 1, False)[0]
            for x in ("", " with beard")
        )
        with torch.no_grad():
            base, goal = (pipe.unet(z, t, text).sample for text in (plain, wished))
            with attach(pipe.unet, study.space.layout, adapters=w):
                moved = pipe.unet(z, t, plain).sample
        return float((moved - base - text_slider.ETA * (goal - base)).norm())

    assert missed(many) < 0.8 * missed(torch.zeros_like(few)) and missed(few) > missed(many)


def test_least_squares_is_numpys(study):
    space = study.space
    found = edits._least_squares(study, "beard")
    c = (space.coefficients - space.coefficients.mean(0)).double()
    y = space.labels[:, space.attributes.index("beard")].double()
    w = torch.linalg.lstsq(c, (y - y.mean())[:, None]).solution[:, 0]
    assert F.cosine_similarity(found.double(), w, 0) > 1 - 1e-9
    unit = w / w.norm()
    assert found.norm() == pytest.approx(float((c @ unit).std(correction=0)), rel=1e-4)


def test_prompts_go_part_of_the_way(study):
    c, texts, seeds = study.space.coefficients[:2], study.texts(2, 0), [1, 2]
    other = [text + " , beard" for text in texts]
    none = draw(study, c, texts, seeds, towards=other, amount=0.0)
    assert torch.equal(none, draw(study, c, texts, seeds))
    there = draw(study, c, texts, seeds, towards=other).int()
    assert (there - draw(study, c, other, seeds).int()).abs().max() <= 1
    assert not torch.equal(none, draw(study, c, other, seeds))


def test_pictures_of_an_adapter_are_those_of_its_coefficients(study):
    c = study.space.coefficients[:2]
    w = study.space.reconstruct(c)
    a, b = (draw(study, people, study.texts(2, 0), [3, 4]).int() for people in (c, w))
    assert (a - b).abs().max() <= 1


def test_directions_of_few_models_move_what_they_should_not():
    g = torch.Generator().manual_seed(0)
    n, a = 800, 3
    labels = (torch.rand(n, a, generator=g) > 0.5).float()
    c = torch.cat([labels - 0.5, torch.zeros(n, 5)], 1) + 0.7 * torch.randn(n, 8, generator=g)

    class Space:
        coefficients, n, m, attributes = c, 800, 8, ["a", "b", "c"]

    Space.labels = labels

    class Fake:
        space, binary = Space, ["a", "b", "c"]

        @staticmethod
        def generator(seed):
            return torch.Generator().manual_seed(seed)

    figures, rows = components._models(Fake)
    fewest, most = (figures["by_models"][str(k)] for k in (75, 600))
    assert most["moved"] < fewest["moved"] < 0.6 and most["right"] > 0.7 and len(rows) == 4


def test_outside_pictures_are_what_their_names_say():
    photos = photographs(2)
    drawn, colours, hidden = (outside.KINDS[k](photos) for k in ("drawn", "recoloured", "occluded"))
    assert all(x.dtype == torch.uint8 and x.shape == photos.shape for x in (drawn, colours, hidden))
    assert torch.equal(colours[:, 0], photos[:, 2]) and not torch.equal(colours, photos)
    changed = (hidden != photos).flatten(2).float().mean()
    assert 0.1 < changed <= 0.25 and drawn.float().std((1, 2, 3)).min() > 0


def test_the_report_is_whole_goes_on_and_refuses_another_study(study, tmp_path, monkeypatch):
    out = tmp_path / "report"
    evaluate(study, out, ["sampling"], progress=False)
    monkeypatch.setattr("w2w_fast.evaluate.sampling.run", None)  # is not run again
    result = evaluate(study, out, progress=False)
    assert list(result["sections"]) == ["sampling", *(s for s in SECTIONS if s != "sampling")]
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(result))
    for name, part in result["sections"].items():
        assert part["claims"] and part["tables"] and part["seconds"] >= 0, name
    assert len(result["sections"]["inversion"]["figures"]) == 5
    page = (out / "report.md").read_text()
    for name in ("Edits and their rivals", "text slider", "regression from the photo", "occluded"):
        assert name in page
    for line in page.splitlines():  # tables stay tables
        assert not line.startswith("|") or line.count("|") > 2
    assert "<h2" in (out / "report.html").read_text()
    for part in result["sections"]:
        for i in range(len(result["sections"][part]["curves"])):
            assert (out / f"{part}-{i + 1}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="another space, size or seed"):
        evaluate(dataclasses.replace(study, seed=1), out, progress=False)


def test_what_cannot_be_evaluated_is_said_before_any_work(study, tmp_path):
    blind = dataclasses.replace(study, held_out=None)
    with pytest.raises(InputError, match="inversion wants photos"):
        evaluate(blind, tmp_path / "a", ["inversion"])
    with pytest.raises(InputError, match="wanted one of decodability, edits"):
        evaluate(study, tmp_path / "a", ["magic"])
    assert not (tmp_path / "a").exists()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").touch()
    with pytest.raises(InputError, match="not empty"):
        evaluate(study, tmp_path / "b")
    with pytest.raises(InputError, match="holds no labels"):
        nothing = dataclasses.replace(
            study.space, labels=None, directions=None, classifiers=None, attributes=[]
        )
        dataclasses.replace(study, space=nothing)
    judge = Brightness()
    judge.attributes = ("beard", "age")
    with pytest.raises(InputError, match="judge does not read glasses"):
        dataclasses.replace(study, judge=judge)


def test_regression_guesses_what_a_photo_says(study):
    """Photos whose colours are a linear function of the coefficients are read back."""
    space = study.space
    z = (space.coefficients - space.mu) / space.sigma

    def photo(z):
        colours = (128 + 25 * z[:, :3]).clamp(0, 255)
        return colours[:, :, None, None].expand(-1, -1, SIZE, SIZE).to(torch.uint8)

    known = dataclasses.replace(study, photos_of=lambda rows: photo(z[rows]))
    people = HeldOut(torch.zeros(5, 3), photo(z[:5])[:, None], None, ("",), None)
    guess = (inversion._regression(known, people) - space.mu) / space.sigma
    assert (guess[:, :3] - z[:5, :3]).abs().mean() < 0.2 < z[:5, :3].abs().mean()


# --- CLIP as the judge ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory, study):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = study.pipe.tokenizer
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={
            **small, "vocab_size": len(tokenizer), "max_position_embeddings": 24,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**small, "image_size": SIZE, "patch_size": 8},
        projection_dim=8,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=SIZE).save_pretrained(folder)
    return folder


def test_clip_judges_by_its_own_embeddings(clip):
    from transformers import CLIPModel, CLIPProcessor

    words = {"beard": "beard", "long_hair": "long hair"}
    judge = ClipJudge(clip, words, "a person")
    images = photographs(3)
    sight = judge.read(images)
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    texts = ["a photo of a person", "a photo of a person with beard"]
    inputs = processor(
        text=texts, images=[x.permute(1, 2, 0).numpy() for x in images], return_tensors="pt",
        padding=True,
    )  # fmt: skip
    with torch.no_grad():
        logits = model(**inputs).logits_per_image
    assert (sight.attributes[:, 0] - logits.softmax(1)[:, 1]).abs().max() < 1e-5
    assert sight.attributes.shape == (3, 2) and sight.identity.shape == (3, 8)
    assert (sight.identity.norm(dim=1) - 1).abs().max() < 1e-5
    assert (sight.features.square().sum(1) - 1).abs().max() < 1e-5
    with pytest.raises(InputError, match="folder of a CLIP model"):
        ClipJudge(clip / "nowhere", words, "a person")


def test_a_space_of_photographs_is_evaluated_with_clip(clip, study, tmp_path):
    people = [
        Subject(f"p{i}", photographs(4, i), ("sks person",) * (3 + i % 2) if i % 2 else
                ("sks person",) * 4) for i in range(5)
    ]  # fmt: skip
    labels = torch.rand(5, 3).round()
    made = clip_study(
        study.space, study.pipe, clip, ["sks person, at night"], who="sks person",
        settings=study.settings, inversion=study.inversion, photos=people, labels=labels, size=TINY,
    )  # fmt: skip
    assert made.texts(2, 0) == ["sks person, at night"] * 2
    found = made.held_out(3, 0)
    assert found.photos.shape == (3, 2, 3, SIZE, SIZE) == found.others.shape
    assert found.masks.min() >= 0 and len(found.captions) == 2
    result = evaluate(made, tmp_path, ["inversion", "edits"], progress=False)
    assert set(result["sections"]) == {"inversion", "edits"}
    with pytest.raises(InputError, match="'sks person' in each"):
        clip_study(
            study.space, study.pipe, clip, ["a dog"], who="sks person", settings={}, inversion={}
        )
    alone = [Subject("solo", photographs(1), ("sks person",))]
    with pytest.raises(InputError, match="solo: one photo"):
        held_out_of(alone, torch.zeros(1, 3), 1, 2, 0)
