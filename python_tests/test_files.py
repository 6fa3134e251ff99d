"""Safe reading and writing: hostile files, flipped bits, crashes, modes."""

import io
import json
import os
import pickle
import random
import struct
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from w2w_fast import files
from w2w_fast.errors import InputError

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "c": torch.tensor(7, dtype=torch.int64),
    "empty": torch.zeros(0, 3),
    "mask": torch.tensor([True, False, True]),
}


def raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype="F32", shape=(1,), span=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


def leftovers(folder):
    return sorted(p.name for p in folder.rglob("*") if p.name.startswith("."))


# --- tensors


def test_tensors_round_trip_and_safetensors_agrees(tmp_path):
    path = tmp_path / "t.safetensors"
    views = {**TENSORS, "view": TENSORS["a"].T, "again": TENSORS["a"]}
    files.write_tensors(path, views, {"k": "v"})
    for got in (files.read_tensors(path)[0], load_file(path)):
        assert got.keys() == views.keys()
        for key, tensor in views.items():
            assert got[key].dtype == tensor.dtype and torch.equal(got[key], tensor)
    assert files.read_tensors(path)[1] == {"k": "v"}
    save_file(TENSORS, path, metadata={"x": "y"})
    got, metadata = files.read_tensors(path, mmap=False)
    assert all(torch.equal(got[k], t) for k, t in TENSORS.items()) and metadata == {"x": "y"}


def test_same_tensors_same_bytes(tmp_path):
    for name, order in (("x", list(TENSORS)), ("y", list(TENSORS)[::-1])):
        files.write_tensors(tmp_path / name, {k: TENSORS[k] for k in order}, {"n": "1", "m": "2"})
    assert files.sha256(tmp_path / "x") == files.sha256(tmp_path / "y")


def test_expected_shapes_and_dtypes(tmp_path):
    path = tmp_path / "t.safetensors"
    files.write_tensors(path, {"a": torch.zeros(2, 3)})
    floats = {torch.float32}
    assert files.read_tensors(path, expect={"a": ((2, None), floats)})[0]["a"].shape == (2, 3)
    for expect, message in [
        ({"a": ((3, None), floats)}, r"a: wanted \[3, None\] of float32, got \[2, 3\]"),
        ({"a": ((2,), floats)}, r"a: wanted \[2\]"),
        ({"a": ((2, 3), {torch.bfloat16})}, "a: wanted .* of bfloat16"),
        ({}, "unknown: .'a'."),
        ({"a": ((2, 3), floats), "b": ((1,), floats)}, "missing: .'b'."),
    ]:
        with pytest.raises(InputError, match=message):
            files.read_tensors(path, expect=expect)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_is_refused_by_name(tmp_path, value, dtype):
    tensor = torch.zeros(40_000, 9, dtype=dtype)
    tensor[-1, -1] = value
    files.write_tensors(tmp_path / "t", {"fine": torch.zeros(1), "sick": tensor})
    with pytest.raises(InputError, match="sick: holds NaN or infinite"):
        files.read_tensors(tmp_path / "t")
    assert files.read_tensors(tmp_path / "t", finite=False)[0]["sick"].shape == (40_000, 9)


HOSTILE = {
    "empty": b"",
    "short": b"\x08\0\0\0\0\0\0\0",
    "huge header": struct.pack("<Q", 1 << 62) + b"{}",
    "header past the end": struct.pack("<Q", 100) + b"{}",
    "not json": b"{'a': 1}",
    "not utf-8": b'{"a\xff": 1}',
    "list": [1],
    "duplicate key": b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
    b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
    "NaN": b'{"a": NaN}',
    "deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "metadata of numbers": {"__metadata__": {"a": 1}},
    "metadata list": {"__metadata__": []},
    "entry of text": {"a": "b"},
    "entry without shape": {"a": {"dtype": "F32", "data_offsets": [0, 4]}},
    "entry with more": {"a": {**entry(), "x": 1}},
    "unknown dtype": {"a": entry("F31")},
    "dtype of another kind": {"a": entry(["F32"])},
    "negative size": {"a": entry(shape=(-1, -1))},
    "fractional size": {"a": entry(shape=(1.0,))},
    "true size": {"a": entry(shape=(True,))},
    "1e12": {"a": entry(shape=(10**12,), span=(0, 4 * 10**12))},
    "overflow": {"a": entry(shape=(2**32, 2**32), span=(0, 0))},
    "many sizes": {"a": entry(shape=(1,) * 17)},
    "span too short": {"a": entry(span=(0, 3))},
    "span reversed": {"a": entry(span=(4, 0))},
    "three offsets": {"a": entry(span=(0, 4, 4))},
    "hole": {"a": entry(span=(4, 8))},
    "overlap": {"a": entry(), "b": entry()},
    "truncated data": {"a": entry(shape=(4,), span=(0, 16))},
    "data left over": {"a": entry("U8", span=(0, 1))},
    "too many entries": {f"{i}": entry("U8", (0,), (0, 0)) for i in range(20_001)},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused_fast(tmp_path, name):
    case, path = HOSTILE[name], tmp_path / "x.safetensors"
    if isinstance(case, bytes) and case[:1] not in (b"{",):
        path.write_bytes(case)
    else:
        raw(path, case, b"\0" * 4)
    start = time.perf_counter()
    with pytest.raises(InputError, match="x.safetensors"):
        files.read_tensors(path)
    assert time.perf_counter() - start < 1.0


def test_random_damage_to_a_header_never_escapes_the_typed_error(tmp_path):
    path, rng = tmp_path / "t.safetensors", random.Random(0)
    files.write_tensors(path, TENSORS, {"k": "v"})
    good = path.read_bytes()
    length = struct.unpack("<Q", good[:8])[0]
    refused = 0
    for _ in range(500):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            bad[rng.randrange(8 + length)] = rng.randrange(256)
        path.write_bytes(bytes(bad[: rng.choice([len(bad), rng.randrange(len(bad))])]))
        try:
            files.read_tensors(path, finite=False)
        except InputError:
            refused += 1
    assert refused > 440  # a few change only a name or the metadata


def test_writer_refuses_metadata_that_is_not_text(tmp_path):
    with pytest.raises(InputError, match="wanted strings only, got 'rank': 1"):
        files.write_tensors(tmp_path / "t", {}, {"rank": 1})
    with pytest.raises(InputError, match="complex64 cannot be stored"):
        files.write_tensors(tmp_path / "t", {"z": torch.zeros(1, dtype=torch.complex64)})
    assert list(tmp_path.iterdir()) == []


class Payload:
    def __reduce__(self):
        return os.mkdir, (os.environ["W2W_TEST_PAYLOAD"],)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "x.PKL"])
def test_pickles_are_never_opened(tmp_path, monkeypatch, protocol, name):
    monkeypatch.setenv("W2W_TEST_PAYLOAD", str(tmp_path / "ran"))
    path = tmp_path / name
    path.write_bytes(pickle.dumps(Payload(), protocol=protocol))
    with pytest.raises(InputError):
        files.read_tensors(path)
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="allow-pickle"):
        files.read_tensors(path)
    assert not (tmp_path / "ran").exists()


def test_a_header_of_128_bytes_is_not_taken_for_a_pickle(tmp_path):
    for length in (0x80, 0x280):
        text = json.dumps({"a": entry()}).encode().ljust(length)
        raw(tmp_path / "x.safetensors", text, b"\0" * 4)
        assert files.read_tensors(tmp_path / "x.safetensors")[0]["a"].item() == 0


# --- atomic


def test_atomic_path_replaces_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "x"
    with files.atomic_path(path) as temporary:
        temporary.write_text("one")
    with pytest.raises(RuntimeError), files.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "one" and leftovers(tmp_path) == []


def test_atomic_dir_replaces_whole_or_not_at_all(tmp_path):
    path = tmp_path / "d"
    with files.atomic_dir(path) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_text("one")
    with pytest.raises(InputError, match="wanted a new or an empty folder"), files.atomic_dir(path):
        pass
    with pytest.raises(RuntimeError), files.atomic_dir(path, overwrite=True) as folder:
        (folder / "y").write_text("half")
        raise RuntimeError
    assert (path / "sub" / "x").read_text() == "one" and not (path / "y").exists()
    with files.atomic_dir(path, overwrite=True) as folder:
        (folder / "y").write_text("two")
    assert [p.name for p in path.iterdir()] == ["y"] and leftovers(tmp_path) == []


def test_a_failed_last_rename_leaves_the_old_folder(tmp_path, monkeypatch):
    path = tmp_path / "d"
    with files.atomic_dir(path) as folder:
        (folder / "x").write_text("one")
    real, calls = os.replace, []

    def replace(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("disk full")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="disk full"), files.atomic_dir(path, overwrite=True) as new:
        (new / "y").write_text("two")
    assert (path / "x").read_text() == "one" and leftovers(tmp_path) == []


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path, umask):
    old = os.umask(umask)
    try:
        files.write_tensors(tmp_path / "t", TENSORS)
        files.write_json(tmp_path / "j", {})
        with files.atomic_dir(tmp_path / "d"):
            pass
    finally:
        os.umask(old)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in "tjd"]
    assert modes == [0o666 & ~umask, 0o666 & ~umask, 0o777 & ~umask]


def test_everything_is_flushed_before_the_rename(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(os, "fsync", lambda handle: events.append("fsync"))
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda *a: (events.append("rename"), real(*a)))
    files.write_json(tmp_path / "j", {})
    assert events == ["fsync", "rename", "fsync"]


# --- JSON


def test_json(tmp_path):
    files.write_json(tmp_path / "j", {"b": [1, 2.5], "a": "é"})
    assert files.read_json(tmp_path / "j") == {"a": "é", "b": [1, 2.5]}
    assert (tmp_path / "j").read_text("utf-8").index("a") < 5
    for bad in ({"x": float("nan")}, {"x": float("inf")}, {"x": {1}}):
        with pytest.raises(InputError, match="cannot be written as JSON"):
            files.write_json(tmp_path / "j", bad)
    assert files.read_json(tmp_path / "j")["a"] == "é"


@pytest.mark.parametrize(
    "text", ["", "{", "NaN", "[Infinity]", '{"a": 1, "a": 2}', "[" * 200_000, "9" * 5_000 + "x"]
)
def test_json_refuses(tmp_path, text):
    (tmp_path / "j").write_text(text)
    with pytest.raises(InputError, match="not valid JSON"):
        files.read_json(tmp_path / "j")


def test_json_limits_and_absence(tmp_path):
    (tmp_path / "j").write_text("[" + "1," * 100 + "1]")
    with pytest.raises(InputError, match="at most 100 bytes"):
        files.read_json(tmp_path / "j", max_bytes=100)
    with pytest.raises(InputError, match="no such file"):
        files.read_json(tmp_path / "none")
    with pytest.raises(InputError, match="not a file"):
        files.read_json(tmp_path)


# --- manifests


def folder_with_manifest(tmp_path):
    folder = tmp_path / "f"
    (folder / "sub").mkdir(parents=True)
    (folder / "x").write_bytes(bytes(range(256)) * 4)
    (folder / "sub" / "y").write_text("hello")
    files.write_manifest(folder)
    return folder


def test_manifest_detects_every_flipped_bit(tmp_path):
    folder, rng = folder_with_manifest(tmp_path), random.Random(1)
    assert sorted(files.check_manifest(folder)) == ["sub/y", "x"]
    good = (folder / "x").read_bytes()
    for _ in range(500):
        bad, bit = bytearray(good), rng.randrange(8 * len(good))
        bad[bit // 8] ^= 1 << bit % 8
        (folder / "x").write_bytes(bad)
        with pytest.raises(InputError, match="f/x: its sha256 differs"):
            files.check_manifest(folder)


def test_manifest_detects_missing_and_truncated(tmp_path):
    folder = folder_with_manifest(tmp_path)
    (folder / "x").write_bytes(b"short")
    with pytest.raises(InputError, match="x: wanted 1024 bytes by the manifest, got 5"):
        files.check_manifest(folder)
    (folder / "x").unlink()
    with pytest.raises(InputError, match="x: no such file"):
        files.check_manifest(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(InputError, match="manifest.json: no such file"):
        files.check_manifest(folder)


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/passwd", "sub/../../secret", "..", ".", "", "sub//y", "./x", "a\0b",
     "..\\secret", "link", "linked/secret", "loop", "n" * 5_000],
)  # fmt: skip
def test_manifest_names_stay_inside(tmp_path, name):
    folder = folder_with_manifest(tmp_path)
    secret = tmp_path / "secret"
    secret.write_text("hello")
    (folder / "link").symlink_to(secret)
    (folder / "linked").symlink_to(tmp_path)
    (folder / "loop").symlink_to(folder / "loop")
    listed = {name: {"bytes": 5, "sha256": files.sha256(secret)}}
    (folder / "manifest.json").write_text(json.dumps(listed))
    with pytest.raises(InputError):
        files.check_manifest(folder)


@pytest.mark.parametrize("manifest", [[], {"x": 1}, {"x": {"bytes": 1}}, {"x": None}])
def test_manifest_of_another_shape(tmp_path, manifest):
    folder = folder_with_manifest(tmp_path)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="wanted"):
        files.check_manifest(folder)


# --- images


def picture(format, size=(6, 4), frames=1, mode="RGB", **options):
    images = [Image.new(mode, size, 80 * i) for i in range(frames)]
    buffer = io.BytesIO()
    images[0].save(
        buffer, format, **({"save_all": True, "append_images": images[1:]} if frames > 1 else {}),
        **options,
    )  # fmt: skip
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_images(tmp_path, format):
    data = picture(format)
    (tmp_path / "x").write_bytes(data)
    for source in (data, tmp_path / "x", str(tmp_path / "x")):
        image = files.read_image(source)
        assert image.mode == "RGB" and image.size == (6, 4)


def test_image_is_turned_as_its_exif_says():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert files.read_image(picture("JPEG", exif=exif)).size == (4, 6)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "wanted a PNG, JPEG or WebP"),
        (b"GIF89a", "wanted a PNG, JPEG or WebP"),
        (picture("GIF", mode="L"), "wanted a PNG, JPEG or WebP"),
        (picture("TIFF"), "wanted a PNG, JPEG or WebP"),
        (picture("BMP"), "wanted a PNG, JPEG or WebP"),
        (picture("PNG", size=(300, 300))[:50], "wanted a PNG, JPEG or WebP"),
        (picture("PNG", frames=2), "wanted one picture, got 2 frames"),
        (picture("WEBP", frames=3), "wanted one picture, got 3 frames"),
        (picture("PNG", size=(4001, 4000), mode="L"), "at most 16 megapixels, got 4001 x 4000"),
        (picture("PNG", size=(20_000, 20_000), mode="1"), "at most 16 megapixels$"),
    ],
    ids=lambda value: value[:16] if isinstance(value, str) else str(value[:4]),
)
def test_image_refuses(data, message):
    with pytest.raises(InputError, match=message):
        files.read_image(data)
    with pytest.raises(InputError, match="no such file"):
        files.read_image("absent.png")
