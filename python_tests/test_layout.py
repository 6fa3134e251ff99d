"""Layout: the published order, discovery, checks with counts, JSON."""

import json

import pytest
import torch
from torch import nn

from w2w_fast.errors import InputError
from w2w_fast.layout import Layout, Module


@pytest.fixture(scope="module")
def sd15_unet():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def small(rank=2, alpha=3.0):
    return Layout((Module("a.to_q", 3, 5), Module("a.to_v", 4, 2)), rank, alpha)


def test_sd15_is_the_published_layout():
    layout = Layout.sd15()
    widths = [m.out_features for m in layout.modules[::4]]
    assert layout.size == 99_648 and len(layout.modules) == 64
    assert (layout.rank, layout.alpha, layout.scale) == (1, 27.0, 27.0)
    assert widths == [320] * 2 + [640] * 2 + [1280] * 6 + [640] * 3 + [320] * 3
    assert layout.names[0] == "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    assert layout.names[24] == "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    assert layout.names[-1] == "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_v"
    assert {m.in_features for m in layout.modules if m.name.endswith("attn2.to_v")} == {768}


def test_sd15_equals_discovery_on_the_unet(sd15_unet):
    assert Layout.discover(sd15_unet) == Layout.sd15()
    assert set(Layout.sd15().check(sd15_unet)) == set(Layout.sd15().names)


def test_targets_restrict_and_order(sd15_unet):
    cross = Layout.discover(sd15_unet, targets=("attn2.to_v", "attn2.to_k"), rank=4, alpha=2)
    assert len(cross.modules) == 32 and (cross.rank, cross.scale) == (4, 0.5)
    assert [n.rsplit(".", 1)[1] for n in cross.names[:4]] == ["to_v", "to_k"] * 2
    with pytest.raises(InputError, match="no Linear of UNet2DConditionModel is named to_w"):
        Layout.discover(sd15_unet, targets=("to_w",))
    with pytest.raises(InputError, match="targets: wanted names"):
        Layout.discover(sd15_unet, targets="to_q")


def test_discovery_of_other_models_follows_registration_and_skips_convolutions():
    model = nn.ModuleDict({
        "b": nn.ModuleDict({"to_v": nn.Linear(2, 3), "to_q": nn.Linear(4, 5)}),
        "a": nn.ModuleDict({"to_q": nn.Conv2d(1, 1, 1), "not_to_q": nn.Linear(1, 1)}),
        "to_q": nn.Linear(6, 7),
    })  # fmt: skip
    assert [(m.name, m.in_features, m.out_features) for m in Layout.discover(model).modules] == [
        ("b.to_q", 4, 5),
        ("b.to_v", 2, 3),
        ("to_q", 6, 7),
    ]


def test_split_is_views_in_row_major_order():
    layout = small()
    w = torch.arange(2 * layout.size, dtype=torch.float32).reshape(2, -1)
    parts = layout.split(w)
    A, B = parts["a.to_q"]
    assert layout.size == 2 * (3 + 5) + 2 * (4 + 2) and tuple(parts) == layout.names
    assert A.shape == (2, 2, 3) and B.shape == (2, 5, 2)
    assert A[0].tolist() == [[0, 1, 2], [3, 4, 5]] and B[0, 0].tolist() == [6, 7]
    assert all(t.untyped_storage().data_ptr() == w.data_ptr() for t in (A, B))
    assert torch.equal(layout.flatten(parts), w)
    assert torch.equal(layout.flatten(layout.split(w[0])), w[0])
    for (a_rows, b_rows), (A, B) in zip(layout.slices(), parts.values(), strict=True):
        assert torch.equal(w[:, a_rows], A.flatten(1)) and torch.equal(w[:, b_rows], B.flatten(1))


def test_split_backward_reaches_every_number_once():
    layout = small()
    w = torch.zeros(3, layout.size, requires_grad=True)
    sum(A.sum() + 2 * B.sum() for A, B in layout.split(w).values()).backward()
    is_B = torch.ones(layout.size)
    for _, rows in layout.slices():
        is_B[rows] = 2
    assert torch.equal(w.grad, is_B.expand(3, -1))


def test_flatten_refuses_with_counts():
    parts = small().split(torch.zeros(small().size))
    with pytest.raises(InputError, match=r"1 of 2 modules match; missing: a.to_v; .*: b"):
        small().flatten({"a.to_q": parts["a.to_q"], "b": parts["a.to_v"]})
    parts["a.to_v"] = parts["a.to_v"][::-1]
    with pytest.raises(InputError, match=r"a.to_v: A: wanted \[..., 2, 4\]"):
        small().flatten(parts)
    with pytest.raises(InputError, match=r"w: wanted \[..., 28\], got \[29\]"):
        small().split(torch.zeros(29))


def test_check_refuses_with_counts():
    model = nn.ModuleDict({"a": nn.ModuleDict({"to_q": nn.Linear(3, 6), "to_k": nn.Linear(1, 1)})})
    message = r"0 of 2 modules .* missing: a.to_v; wrong shape: a.to_q: wanted 3->5, got 3->6"
    with pytest.raises(InputError, match=message):
        small().check(model)


def test_json_round_trip():
    for layout in (small(), Layout.sd15()):
        assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout
    assert small() != small(rank=1) and small() != small(alpha=1.0)


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 0},
        {"rank": True},
        {"rank": 1.0},
        {"alpha": float("nan")},
        {"alpha": 0},
        {"alpha": "1"},
        {"modules": []},
        {"modules": [["a", 3, -5]]},
        {"modules": [["a", 3]]},
        {"modules": [["a", 3, 10**12]]},
        {"modules": [["a", 3, 5], ["a", 3, 5]]},
        {"modules": [[1, 3, 5]]},
        {"modules": [["", 3, 5]]},
        {"modules": {"a": [3, 5]}},
        {"extra": 1},
    ],
)
def test_json_refuses(change):
    with pytest.raises(InputError, match="layout"):
        Layout.from_json({**small().to_json(), **change})


@pytest.mark.parametrize("obj", [None, [], "layout", {"rank": 1}])
def test_json_refuses_other_things(obj):
    with pytest.raises(InputError, match="layout"):
        Layout.from_json(obj)
