"""Reading what strangers wrote, and writing so that no half-written file is ever accepted.

Every reader raises InputError, with the file and the key, before it allocates for what it does
not trust. Every writer writes a sibling temporary, flushes it to disk, renames it and flushes the
folder: after a crash there is the old file or the new one. File modes follow the umask.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import secrets
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

Expect = Mapping[str, tuple[tuple[int | None, ...], set[torch.dtype]]]

MANIFEST = "manifest.json"
_MAX_HEADER = 1 << 20
_MAX_ENTRIES = 20_000
_MAX_PIXELS = 16_000_000
_PICKLE_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"}
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


# --- writing ------------------------------------------------------------------------------------


def _sync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _temporary(path: Path) -> Path:
    """A fresh name beside ``path``; opened by its writer, so that its mode follows the umask."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it becomes ``path``, on error it goes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def new_or_empty(folder: str | os.PathLike) -> None:
    """InputError for what exists and is not an empty folder."""
    path = Path(folder)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path}: wanted a new or an empty folder; remove it or name another")


@contextlib.contextmanager
def atomic_dir(path: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside ``path``; on success it becomes ``path``, on error it goes.

    A ``path`` that exists and is not an empty folder is an InputError, unless ``overwrite``, and
    then it is replaced only once the new one is complete.
    """
    path = Path(path)
    if not overwrite:
        new_or_empty(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = _temporary(path), _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        for root, _, names in os.walk(temporary, topdown=False):
            for name in names:
                _sync(Path(root, name))
            _sync(Path(root))
        if path.exists():  # a folder cannot be renamed over a full one
            os.replace(path, old)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException:
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.is_dir():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Write JSON atomically: keys sorted, NaN and infinities refused (InputError)."""
    try:
        text = json.dumps(obj, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be written as JSON: {error}") from None
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def write_tensors(
    path: str | os.PathLike,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file atomically, tensor by tensor; metadata of strings only.

    Not safetensors' own writer: that one neither flushes nor follows the umask, and leaves a
    second temporary when it is killed. The widest dtypes come first, so that all are aligned.
    """
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise InputError(f"{path}: metadata: wanted strings only, got {key!r}: {value!r}")
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    codes = {dtype: code for code, dtype in _DTYPES.items()}
    order = sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key))
    end = 0
    for key in order:
        tensor = tensors[key]
        if key == "__metadata__" or tensor.dtype not in codes:
            raise InputError(f"{path}: {key}: {tensor.dtype} cannot be stored under this name")
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[key] = {
            "dtype": codes[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key in order:
            data = tensors[key].detach().cpu().contiguous().reshape(-1)
            file.write(data.view(torch.uint8).numpy())


# --- reading ------------------------------------------------------------------------------------


def _file(path: str | os.PathLike) -> Path:
    path = Path(path)
    try:
        if path.is_file():
            return path
        reason = "not a file" if path.exists() else "no such file"
    except (OSError, ValueError) as error:  # a name too long, a NUL, no permission
        reason = getattr(error, "strerror", None) or str(error)
    raise InputError(f"{str(path)[:300]}: {reason}")


def refuse_pickle(path: str | os.PathLike) -> None:
    """InputError if ``path`` is a pickle, by its suffix or first bytes: pickles run code."""
    path = _file(path)
    with path.open("rb") as file:
        start = file.read(8)
    # A safetensors header's length is little-endian: a byte 0x80 first can be one, then NULs.
    pickled = len(start) > 1 and start[0] == 0x80 and 0 < start[1] <= 5 and start[2:8] != bytes(6)
    if path.suffix.lower() in _PICKLE_SUFFIXES or start[:4] == b"PK\x03\x04" or pickled:
        raise InputError(
            f"{path}: is a pickle, which can run code when opened; for the published files use "
            "`w2w import-published --allow-pickle`, for anything else convert it to safetensors"
        )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    obj = dict(pairs)
    if len(obj) != len(pairs):
        raise ValueError("a key occurs twice")
    return obj


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _parse_json(data: bytes, what: str) -> Any:
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what}: not valid JSON: {error}") from None


def read_json(path: str | os.PathLike, max_bytes: int = 16 << 20) -> Any:
    """The JSON in ``path``; larger files, duplicate keys and NaN are refused (InputError)."""
    path = _file(path)
    if path.stat().st_size > max_bytes:
        raise InputError(f"{path}: wanted at most {max_bytes} bytes, got {path.stat().st_size}")
    return _parse_json(path.read_bytes(), str(path))


def _read_header(path: Path) -> tuple[dict[str, tuple[torch.dtype, list[int]]], dict[str, str]]:
    """Check every claim of a safetensors header against the file's size, before anyone maps it."""

    def need(holds: bool, what: str) -> None:
        if not holds:
            raise InputError(f"{path}: not a valid safetensors file: {what}")

    total = path.stat().st_size
    need(total >= 10, f"{total} bytes")
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        need(length <= min(_MAX_HEADER, total - 8), f"a header of {length} bytes in {total}")
        header = _parse_json(file.read(length), f"{path}: header")
    need(isinstance(header, dict), "the header is not an object")
    need(len(header) <= _MAX_ENTRIES, f"{len(header)} entries, at most {_MAX_ENTRIES}")
    metadata = header.pop("__metadata__", {})
    need(
        isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values()),
        "metadata is not of strings",
    )
    entries: dict[str, tuple[torch.dtype, list[int]]] = {}
    spans: list[tuple[int, int, str]] = []
    for key, entry in header.items():
        need(
            isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"},
            f"{key!r}: wanted dtype, shape and data_offsets",
        )
        dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
        need(isinstance(dtype, str) and dtype in _DTYPES, f"{key!r}: dtype {dtype!r}")
        for numbers in (shape, span):
            need(
                isinstance(numbers, list)
                and all(type(x) is int and 0 <= x <= total * 8 for x in numbers),
                f"{key!r}: shape or offsets out of range",
            )
        need(len(span) == 2 and len(shape) <= 16, f"{key!r}: wanted two offsets, 16 sizes at most")
        wanted = math.prod(shape) * _DTYPES[dtype].itemsize
        need(span[1] - span[0] == wanted, f"{key!r}: {wanted} bytes wanted, offsets {span}")
        entries[key] = (_DTYPES[dtype], shape)
        spans.append((span[0], span[1], key))
    end = 0
    for start, stop, key in sorted(spans):
        need(start == end, f"{key!r}: starts at {start}, wanted {end} (a hole or an overlap)")
        end = stop
    need(end == total - 8 - length, f"{end} bytes of data wanted, {total - 8 - length} there")
    return entries, metadata


def _check_expected(path: Path, entries: Mapping[str, tuple], expect: Expect) -> None:
    missing, extra = sorted(expect.keys() - entries.keys()), sorted(entries.keys() - expect.keys())
    if missing or extra:
        raise InputError(f"{path}: tensors missing: {missing[:5]}; unknown: {extra[:5]}")
    for key, (shape, dtypes) in expect.items():
        dtype, got = entries[key]
        fits = len(got) == len(shape) and all(
            want in (None, size) for want, size in zip(shape, got, strict=True)
        )
        if not fits or dtype not in dtypes:
            names = " or ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
            raise InputError(
                f"{path}: {key}: wanted {list(shape)} of {names}, got {got} of "
                f"{str(dtype).removeprefix('torch.')}"
            )


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinities."""
    # In pieces: a mask of a 2 GB basis would take another gigabyte.
    rows = max(1, (1 << 24) // max(1, tensor[:1].numel())) if tensor.ndim else 1
    pieces = tensor.split(rows) if tensor.ndim else (tensor,)
    return all(bool(piece.isfinite().all()) for piece in pieces)


def read_tensors(
    path: str | os.PathLike,
    *,
    expect: Expect | None = None,
    finite: bool = True,
    mmap: bool = True,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file, on the CPU; InputError for anything else.

    ``expect`` is key -> (shape, with None for any size; allowed dtypes), exactly the keys wanted.
    ``finite`` refuses NaN and infinities, by key. ``mmap=False`` copies the tensors into memory.
    """
    from safetensors import SafetensorError, safe_open

    path = _file(path)
    refuse_pickle(path)
    entries, metadata = _read_header(path)
    if expect is not None:
        _check_expected(path, entries, expect)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in entries}
    except SafetensorError as error:
        raise InputError(f"{path}: not a valid safetensors file: {error}") from None
    for key, tensor in tensors.items():
        if finite and tensor.is_floating_point() and not all_finite(tensor):
            raise InputError(f"{path}: {key}: holds NaN or infinite numbers")
    if not mmap:
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    return tensors, metadata


def read_image(source: str | os.PathLike | bytes) -> Image:
    """An RGB picture from a PNG, JPEG or WebP file, or its bytes, EXIF rotation applied.

    Other formats, several frames, and more than 16 megapixels are an InputError, the size judged
    from the header before anything is decoded.
    """
    from PIL import Image, ImageOps

    name = "image" if isinstance(source, bytes) else str(source)
    file = io.BytesIO(source) if isinstance(source, bytes) else _file(source)
    try:
        with Image.open(file, formats=["PNG", "JPEG", "WEBP"]) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise InputError(
                    f"{name}: wanted at most 16 megapixels, got {image.width} x {image.height}"
                )
            if getattr(image, "n_frames", 1) != 1:
                raise InputError(f"{name}: wanted one picture, got {image.n_frames} frames")
            return ImageOps.exif_transpose(image).convert("RGB")
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise InputError(f"{name}: wanted at most 16 megapixels") from None
    except Exception as error:  # Pillow raises many kinds on damaged files, SyntaxError included
        # Pillow's own text names the buffer's address, another one each time.
        known = type(error).__name__ != "UnidentifiedImageError"
        reason = str(error) if known else "it is none of them, or damaged"
        raise InputError(f"{name}: wanted a PNG, JPEG or WebP picture: {reason}") from None


# --- manifests ----------------------------------------------------------------------------------


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with _file(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(folder: str | os.PathLike, files: Iterable[Path] | None = None) -> None:
    """Write manifest.json: each file below ``folder``, or each of ``files``, its sha256 and size.

    Names that start with a dot are left out: temporaries, and the locks of work going on.
    """
    folder = Path(folder)
    found = sorted(
        p
        for p in (folder.rglob("*") if files is None else files)
        if p.is_file() and p != folder / MANIFEST and not p.name.startswith(".")
    )
    write_json(
        folder / MANIFEST,
        {
            p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)}
            for p in found
        },
    )


def check_manifest(folder: str | os.PathLike) -> dict[str, str]:
    """name -> sha256 if every file is as manifest.json says; InputError naming the first not.

    A name that leads out of the folder, by itself or through a link, is refused unopened.
    """
    folder = Path(folder)
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or len(manifest) > _MAX_ENTRIES:
        raise InputError(f"{folder / MANIFEST}: wanted an object of at most {_MAX_ENTRIES} files")
    root = folder.resolve()
    for name, entry in manifest.items():
        parts = PurePosixPath(name).parts
        plain = parts and "/".join(parts) == name and ".." not in parts and "\\" not in name
        if not plain or "\0" in name or name.startswith("/"):
            raise InputError(f"{folder / MANIFEST}: {name!r}: not a plain name inside the folder")
        path = folder / name
        try:
            inside = path.resolve().is_relative_to(root)
        except (OSError, RuntimeError) as error:  # a loop of links, a name too long
            raise InputError(f"{folder / MANIFEST}: {name[:300]!r}: {error}") from None
        if not inside:
            raise InputError(f"{path}: links to outside its folder")
        if not isinstance(entry, dict) or set(entry) != {"bytes", "sha256"}:
            raise InputError(f"{folder / MANIFEST}: {name}: wanted bytes and sha256")
        if _file(path).stat().st_size != entry["bytes"]:
            raise InputError(
                f"{path}: wanted {entry['bytes']} bytes by the manifest, "
                f"got {path.stat().st_size}: damaged or incomplete"
            )
        if sha256(path) != entry["sha256"]:
            raise InputError(f"{path}: its sha256 differs from the manifest's: damaged or changed")
    return {name: entry["sha256"] for name, entry in manifest.items()}
