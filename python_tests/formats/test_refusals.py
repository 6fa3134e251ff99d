"""Broken and foreign LoRA files: refused, and the message names the key."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from w2w_fast import formats
from w2w_fast.errors import InputError
from w2w_fast.formats import cloneofsimo, kohya
from w2w_fast.layout import Layout, Module

NAME = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
FLAT = f"lora_unet_{NAME.replace('.', '_')}"
PAIRS = {
    "kohya": (f"{FLAT}.lora_down.weight", f"{FLAT}.lora_up.weight"),
    "diffusers": (f"unet.{NAME}.lora_A.weight", f"unet.{NAME}.lora_B.weight"),
    "diffusers-old": (f"unet.{NAME}.lora.down.weight", f"unet.{NAME}.lora.up.weight"),
}


def save(path, tensors, metadata=None):
    path = path / "lora.safetensors"
    save_file(tensors, path, metadata)
    return path


def pair(spelling, rank=2):
    a, b = PAIRS[spelling]
    return {a: torch.randn(rank, 8), b: torch.randn(6, rank)}


def refused(path, *words):
    with pytest.raises(InputError) as error:
        formats.read_adapter(path)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spelling", PAIRS)
class TestPairs:
    def test_unknown_key(self, tmp_path, spelling):
        key = f"{PAIRS[spelling][0].removesuffix('.weight')}.dora_scale"
        refused(save(tmp_path, {**pair(spelling), key: torch.ones(1)}), repr(key))

    @pytest.mark.parametrize("half", [0, 1])
    def test_missing_half(self, tmp_path, spelling, half):
        tensors = pair(spelling)
        del tensors[PAIRS[spelling][half]]
        refused(save(tmp_path, tensors), PAIRS[spelling][1 - half], f"no {'AB'[half]}")

    def test_unequal_ranks(self, tmp_path, spelling):
        tensors = pair(spelling)
        tensors[PAIRS[spelling][1]] = torch.randn(6, 3)
        refused(save(tmp_path, tensors), *PAIRS[spelling], "[2, 8]", "[6, 3]")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("half", [0, 1])
    def test_not_finite(self, tmp_path, spelling, value, half):
        tensors = pair(spelling)
        tensors[PAIRS[spelling][half]][0, 1] = value
        refused(save(tmp_path, tensors), PAIRS[spelling][half])

    def test_convolution(self, tmp_path, spelling):
        tensors = pair(spelling)
        tensors[PAIRS[spelling][0]] = torch.randn(2, 8, 1, 1)
        refused(save(tmp_path, tensors), PAIRS[spelling][0], "convolution")

    def test_integers(self, tmp_path, spelling):
        tensors = pair(spelling)
        tensors[PAIRS[spelling][1]] = torch.ones(6, 2, dtype=torch.int32)
        refused(save(tmp_path, tensors), PAIRS[spelling][1], "int32")

    def test_rank_zero(self, tmp_path, spelling):
        a, b = PAIRS[spelling]
        refused(save(tmp_path, {a: torch.ones(0, 8), b: torch.ones(6, 0)}), a)


@pytest.mark.parametrize("alpha", [[0.0], [-1.0], [float("nan")], [1.0, 2.0], []])
def test_kohya_alpha(tmp_path, alpha):
    key = f"{FLAT}.alpha"
    refused(save(tmp_path, {**pair("kohya"), key: torch.tensor(alpha)}), key)


def test_alpha_alone(tmp_path):
    refused(save(tmp_path, {f"{FLAT}.alpha": torch.tensor(1.0)}), f"{FLAT}.alpha")


def test_scale_that_overflows(tmp_path):
    tensors = {**pair("kohya"), f"{FLAT}.alpha": torch.tensor(3e38)}
    tensors[PAIRS["kohya"][1]] *= 1e5
    refused(save(tmp_path, tensors), PAIRS["kohya"][1], "overflows")


def test_two_spellings_of_one_half(tmp_path):
    tensors = pair("diffusers") | pair("diffusers-old")
    refused(save(tmp_path, tensors), PAIRS["diffusers"][0], PAIRS["diffusers-old"][0])


def test_mixed_formats(tmp_path):
    refused(save(tmp_path, pair("kohya") | pair("diffusers")), PAIRS["diffusers"][0])


def test_a_checkpoint_is_not_a_lora(tmp_path):
    key = "model.diffusion_model.input_blocks.0.0.weight"
    refused(save(tmp_path, {key: torch.ones(2, 2)}), key, "wanted")


def test_sdxl_block_names_do_not_fit(tmp_path):
    """Names of another UNet are read as they are, and no layout takes them."""
    flat = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    a, b = torch.randn(1, 8), torch.randn(6, 1)
    path = save(tmp_path, {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b})
    with pytest.raises(InputError, match="0/64 modules fit; 64 missing.*1 not in the layout"):
        formats.to_layout(formats.read_adapter(path), Layout.sd15())


def test_text_encoder_only(tmp_path):
    key = "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight"
    refused(save(tmp_path, {key: torch.ones(1, 4)}), "1 text encoder keys")


def test_text_encoder_keys_are_counted(tmp_path):
    te = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    extra = {f"{te}.lora_down.weight": torch.ones(1, 4), f"{te}.alpha": torch.ones(())}
    adapter = formats.read_adapter(save(tmp_path, pair("kohya") | extra))
    assert adapter.text_encoder_keys == 2 and list(adapter.modules) == [NAME]


class Payload:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".safetensors"])
def test_pickles_are_not_opened(tmp_path, suffix):
    for name, write in (("raw", pickle.dumps), ("zip", None)):
        path = tmp_path / f"{name}{suffix}"
        if write:
            path.write_bytes(write(Payload()))
        else:
            torch.save(Payload(), path)
        refused(path)


def test_missing_file(tmp_path):
    refused(tmp_path / "nothing.safetensors", "nothing.safetensors")


class TestPeft:
    @pytest.fixture
    def folder(self, tmp_path, write_lora):
        a, b = pair("kohya").values()
        path, _ = write_lora("peft", tmp_path / "lora", {NAME: (a, b)}, alpha=3.0)
        return path

    def edit(self, folder, **changes):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    def test_scale(self, folder):
        b = load_file(folder / "adapter_model.safetensors")[
            f"base_model.model.{NAME}.lora_B.weight"
        ]
        for changes, scale in (
            ({}, 1.5),
            ({"use_rslora": True}, 3.0 / 2**0.5),
            ({"use_rslora": False, "alpha_pattern": {"attn1.to_q": 5}}, 2.5),
            ({"alpha_pattern": {f"^{NAME}": 7}}, 3.5),
            ({"alpha_pattern": {"^attn1.to_q": 7, "to_v": 9}}, 1.5),
            ({"r": 16, "rank_pattern": {"to_q": 2}, "alpha_pattern": {}}, 1.5),
            ({"r": 2, "target_modules": ["to_q"]}, 1.5),
            ({"target_modules": ".*to_q"}, 1.5),
        ):
            self.edit(folder, **changes)
            read = formats.read_adapter(folder).modules[NAME][1]
            torch.testing.assert_close(read, b * scale, msg=str(changes))

    @pytest.mark.parametrize(
        "changes, words",
        [
            ({"r": 4}, ("rank 4", NAME, "have 2")),
            ({"r": 0}, ("r = 0",)),
            ({"r": "2"}, ("r = '2'",)),
            ({"r": True}, ("r = True",)),
            ({"r": None}, ("r = None",)),
            ({"lora_alpha": None}, ("lora_alpha",)),
            ({"lora_alpha": -1}, ("lora_alpha = -1",)),
            ({"use_rslora": "yes"}, ("use_rslora",)),
            ({"use_dora": True}, ("use_dora",)),
            ({"bias": "all"}, ("bias",)),
            ({"peft_type": "LOHA"}, ("peft_type", "LOHA")),
            ({"modules_to_save": ["conv_in"]}, ("modules_to_save",)),
            ({"rank_pattern": {"(a+)+$": 2}}, ("rank_pattern", "(a+)+$")),
            ({"alpha_pattern": {"to_q": "x"}}, ("alpha_pattern", "to_q")),
            ({"alpha_pattern": [1]}, ("alpha_pattern",)),
            ({"target_modules": ["to_v"]}, ("target_modules", NAME)),
            ({"target_modules": 3}, ("target_modules",)),
        ],
    )
    def test_config_refused(self, folder, changes, words):
        self.edit(folder, **changes)
        refused(folder, "adapter_config.json", *words)

    @pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"r": NaN}', "[" * 10**5])
    def test_config_is_not_an_object(self, folder, text):
        (folder / "adapter_config.json").write_text(text)
        refused(folder, "adapter_config.json")

    def test_missing_files(self, folder):
        (folder / "adapter_config.json").unlink()
        refused(folder, "adapter_config.json")
        (folder / "adapter_model.safetensors").unlink()
        refused(folder, "adapter_model.safetensors")

    def test_weights_file_finds_its_config(self, folder):
        adapter = formats.read_adapter(folder / "adapter_model.safetensors")
        assert adapter.format == "peft" and list(adapter.modules) == [NAME]

    def test_unknown_key(self, folder):
        key = f"base_model.model.{NAME}.lora_magnitude_vector"
        file = folder / "adapter_model.safetensors"
        save_file({**load_file(file), key: torch.ones(6)}, file)
        refused(folder, repr(key))

    def test_adapter_names_in_keys(self, folder):
        """The published code writes `lora_A.identity1.weight`."""
        file = folder / "adapter_model.safetensors"
        renamed = {k.replace(".weight", ".identity1.weight"): v for k, v in load_file(file).items()}
        save_file(renamed, file)
        assert list(formats.read_adapter(folder).modules) == [NAME]


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"unet.r": 4}', '{"unet.r": 2, "unet.lora_alpha": 2, "unet.use_dora": true}'],
)
def test_diffusers_metadata_refused(tmp_path, text):
    path = save(tmp_path, pair("diffusers"), {"lora_adapter_metadata": text})
    refused(path, "lora_adapter_metadata")


class TestToLayout:
    layout = Layout((Module(NAME, 8, 6),), rank=2, alpha=4.0)

    def test_values(self, tmp_path):
        tensors = pair("kohya")
        w = formats.to_layout(formats.read_adapter(save(tmp_path, tensors)), self.layout)
        a, b = tensors.values()
        torch.testing.assert_close(w, torch.cat([a.flatten(), (b / 2).flatten()]))

    def test_layout_of(self, tmp_path):
        adapter = formats.read_adapter(save(tmp_path, pair("kohya")))
        layout = formats.layout_of(adapter)
        assert layout.scale == 1.0 and layout.modules == self.layout.modules

    @pytest.mark.parametrize(
        "layout, words",
        [
            (Layout((Module(NAME, 8, 6), Module("other", 8, 6)), rank=2, alpha=4.0), "1/2.*other"),
            (Layout((Module("other", 8, 6),), rank=2, alpha=4.0), f"0/1.*other.*{NAME}"),
            (Layout((Module(NAME, 9, 6),), rank=2, alpha=4.0), f"0/1.*{NAME}.*9->6.*8->6"),
            (Layout((Module(NAME, 8, 6),), rank=3, alpha=4.0), f"{NAME}.*rank 3.*rank 2"),
        ],
    )
    def test_refused(self, tmp_path, layout, words):
        adapter = formats.read_adapter(save(tmp_path, pair("kohya")))
        with pytest.raises(InputError, match=words):
            formats.to_layout(adapter, layout)

    def test_mixed_ranks_have_no_layout(self, tmp_path):
        other = {k.replace("to_q", "to_v"): v for k, v in pair("kohya", rank=3).items()}
        adapter = formats.read_adapter(save(tmp_path, pair("kohya") | other))
        assert adapter.ranks == (2, 3)
        with pytest.raises(InputError, match=r"\[2, 3\]"):
            formats.layout_of(adapter)


class TestExport:
    layout = Layout((Module(NAME, 8, 6),), rank=2, alpha=4.0)

    @pytest.mark.parametrize(
        "changes, words",
        [
            ({"format": "a1111"}, "a1111.*kohya"),
            ({"dtype": torch.float64}, "float64"),
            ({"dtype": torch.float16, "strength": 1e6}, f"{NAME}.*float16"),
            ({"strength": float("nan")}, NAME),
            ({"metadata": {"author": 3}}, "metadata"),
            ({"path": "x.pt"}, "x.pt.*safetensors"),
        ],
    )
    def test_refused_and_nothing_written(self, tmp_path, changes, words):
        changes = dict(changes)
        path = tmp_path / changes.pop("path", "x.safetensors")
        with pytest.raises(InputError, match=words):
            formats.export(self.layout, torch.ones(28), path, **changes)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("shape", [(27,), (2, 28), (1, 1, 28), ()])
    def test_shape(self, tmp_path, shape):
        with pytest.raises(InputError, match=r"one identity.*\[28\]"):
            formats.export(self.layout, torch.ones(shape), tmp_path / "x.safetensors")

    def test_nan(self, tmp_path):
        w = torch.ones(28)
        w[3] = float("nan")
        with pytest.raises(InputError, match=NAME):
            formats.export(self.layout, w, tmp_path / "x.safetensors")

    def test_metadata_is_kept(self, tmp_path):
        metadata = {"who": "me", "ss_network_dim": "3"}  # the second would be untrue
        path = formats.export(
            self.layout, torch.ones(1, 28), tmp_path / "x.safetensors", metadata=metadata
        )
        metadata = formats.read_adapter(path).metadata
        assert metadata["who"] == "me" and metadata["ss_network_dim"] == "2"

    def test_name_that_kohya_cannot_hold(self, tmp_path):
        layout = Layout((Module("up_blocks.0.my_attention.q_proj", 8, 6),), rank=2, alpha=4.0)
        with pytest.raises(InputError, match="q_proj.*diffusers"):
            formats.export(layout, torch.ones(28), tmp_path / "x.safetensors")
        formats.export(layout, torch.ones(28), tmp_path / "x.safetensors", format="diffusers")
        assert torch.equal(
            formats.to_layout(formats.read_adapter(tmp_path / "x.safetensors"), layout),
            torch.ones(28),
        )


def test_kohya_names_read_back():
    """Every Linear of an SD1.5 UNet that a LoRA may adapt."""
    names = [name for name, _, _ in cloneofsimo.sd15_modules()]
    names += ["down_blocks.0.resnets.1.time_emb_proj", "time_embedding.linear_1"]
    names += ["up_blocks.1.attentions.0.transformer_blocks.0.ff.net.2", "mid_block.resnets.0.conv1"]
    for name in names + list(Layout.sd15().names):
        assert kohya.module_name(kohya.flat_name(name)) == name
