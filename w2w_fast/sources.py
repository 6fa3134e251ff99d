"""Photographs of many people, listed at once and read one person at a time.

    folder/anna/1.jpg             a folder of sub-folders, one a subject
    photos.csv, photos.parquet    columns subject, path and, where known, prompt and mask
    shards/{000..003}.tar         webdataset: members anna/1.jpg; also a folder or a glob of tars

Beside a photo of a folder or a tar, `1.txt` is its prompt (an empty one counts as none) and a grey
`1.mask.png` says how much each pixel counts in the loss (white: fully). Nothing is extracted: a
photo is a span of bytes of some file. Names that start with a dot are left out: they are notes of
file managers.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import re
import stat
import tarfile
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .denoise import MOST_CHARACTERS, check_masks, check_prompts
from .errors import InputError
from .files import read_image

if TYPE_CHECKING:
    from PIL.Image import Image

PHOTO_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_MOST_BYTES = 64 << 20
_MOST_NAME = 200
_RANGE = re.compile(r"\{([0-9]{1,6})\.\.([0-9]{1,6})\}")


@dataclass(frozen=True)
class Subject:
    """One person: a name, photographs uint8 [p, 3, h, w], and a prompt for each.

    masks [p, 1, h, w] in [0, 1] say how much each pixel counts in the loss: where the person is
    one learns the person, in fewer steps, and not the places.
    """

    name: str
    images: Tensor
    prompts: tuple[str, ...]
    masks: Tensor | None = None

    def __post_init__(self) -> None:
        images, p = self.images, len(self.prompts)
        photos = images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3
        if not photos or images.shape[0] != p or not p:
            raise InputError(
                f"subject {self.name!r}: wanted uint8 images [p, 3, h, w] and p > 0 prompts, "
                f"got {images.dtype} {tuple(images.shape)} and {p} prompts"
            )
        if self.masks is not None:
            check_masks(self.masks, p)


def digest(subjects: Sequence[Subject]) -> str:
    """The same for the same photographs, prompts and masks; of a listing, its own."""
    known = getattr(subjects, "digest", None)
    if known is not None:
        return known
    total = hashlib.sha256()
    for subject in subjects:
        total.update(json.dumps([subject.name, subject.prompts]).encode())
        total.update(subject.images.contiguous().numpy().tobytes())
        if subject.masks is not None:
            total.update(subject.masks.float().contiguous().numpy().tobytes())
    return total.hexdigest()


class Span(NamedTuple):
    """Bytes of a file: all of it, or one member of a tar. A size of -1: there is no such file."""

    file: str
    offset: int
    size: int
    member: str = ""

    def __str__(self) -> str:
        return f"{self.file}: {self.member}" if self.member else self.file

    def read(self, most: int = _MOST_BYTES) -> bytes:
        """The bytes; InputError for more than ``most``, and for a file that is not as listed."""
        if self.size < 0:
            raise InputError(f"{self}: no such file")
        if self.size > most:
            raise InputError(f"{self}: wanted at most {most:,} bytes, got {self.size:,}")
        try:
            with open(self.file, "rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
                grown = not self.member and bool(file.read(1))
        except OSError as error:
            raise InputError(f"{self}: {error.strerror}") from None
        if grown or len(data) != self.size:
            raise InputError(f"{self}: changed since it was listed: wanted {self.size} bytes")
        return data


class Photo(NamedTuple):
    """A photo as it is listed: nothing of it has been read."""

    name: str
    picture: Span
    prompt: Span | str | None
    mask: Span | None


@dataclass(frozen=True)
class Listing:
    """Whose photos there are: name -> photos, both in natural order ("p-2" before "p-10")."""

    photos: Mapping[str, Sequence[Photo]]

    def __len__(self) -> int:
        return len(self.photos)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(self.photos)

    @cached_property
    def digest(self) -> str:
        """sha256 of names, photos' names and sizes, masks' sizes and prompts; no picture is read.

        The same photos in a folder and in tars have the same digest. The prompt of photos without
        one of their own is not in it.
        """
        digest = hashlib.sha256()
        for name, photos in self.photos.items():
            about = [(p.name, p.picture.size, p.mask and p.mask.size, _said(p)) for p in photos]
            digest.update(json.dumps([name, about]).encode())
        return digest.hexdigest()

    def read(self, i: int, size: int, prompt: str) -> Subject:
        """Subject i, photos and masks cropped to the centre square and scaled to size x size.

        ``prompt`` is for photos without one of their own. InputError, naming the file, for what
        is no picture or no prompt, and for masks beside some photos only; naming the subject, if
        it has no photo.
        """
        name = self.names[i]
        photos = self.photos[name]
        if not photos:
            raise InputError(f"subject {name!r}: no photo ({', '.join(PHOTO_SUFFIXES)}) of it")
        prompts = tuple(_prompt(photo) or prompt for photo in photos)
        check_prompts(prompts)
        masks = None
        if any(photo.mask for photo in photos):
            masks = torch.stack([_mask(photo, size) for photo in photos])
        images = torch.stack([_picture(photo.picture, size) for photo in photos])
        return Subject(name, images, prompts, masks)


def open_photos(path: str | Path, *, absolute: bool = False) -> Listing:
    """List the photos in a folder, a .csv or .parquet table, or .tar shards; see the module.

    A table's paths are relative to its folder and stay inside it, links followed; ``absolute``
    allows absolute ones too. InputError: nothing there, a damaged table or tar, links or devices
    in a tar, a member of more than 64 MB, names that no file should have, and two subjects of one
    name (letters' case and Unicode normalisation apart). What is wrong with one subject's photos
    comes when that subject is read.
    """
    path = Path(path)
    try:
        if path.is_dir():
            found = _in_folder(path)
        elif path.suffix in (".csv", ".parquet"):
            found = _in_table(path, absolute)
        elif path.suffix == ".tar":
            found = _in_tars(_shards(path))
        else:
            raise InputError(
                f"{path}: {'' if path.exists() else 'no such folder; '}wanted a folder with a "
                "sub-folder for each subject, a .csv or .parquet table, or .tar files"
            )
    except OSError as error:
        raise InputError(f"{str(path)[:300]}: {error.strerror}") from None
    check_names(path, found)
    return Listing({name: found[name] for name in sorted(found, key=natural)})


def natural(name: str) -> tuple[list[str | int], str]:
    """A key to sort names by in which numbers count as numbers: "person-2" before "person-10"."""
    parts: list[str | int] = list(re.split("([0-9]+)", name))
    parts[1::2] = map(int, parts[1::2])
    return parts, name  # "01" and "1" are equal numbers


def check_names(where: str | Path, names: Iterable[str]) -> None:
    """InputError unless there are names, all safe as files' and distinct wherever files are."""
    seen: dict[str, str] = {}
    for name in names:
        _check_name(where, name)
        key = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
        if key in seen:
            raise InputError(
                f"{where}: {seen[key]!r} and {name!r} are one name but for case or Unicode's "
                "normal form; rename one"
            )
        seen[key] = name
    if not seen:
        raise InputError(f"{where}: nobody is in it")


def _check_name(where: str | Path, name: str) -> None:
    control = any(unicodedata.category(c) in ("Cc", "Cs") for c in name)
    if name in ("", ".", "..") or len(name) > _MOST_NAME or control or set(name) & set("/\\"):
        raise InputError(
            f"{where}: {name[:_MOST_NAME]!r}: wanted a name of 1 to {_MOST_NAME} characters, "
            "none of them a control character, / or \\"
        )


# --- one person -----------------------------------------------------------------------------------


def photo_tensor(source: str | Path | bytes, size: int) -> Tensor:
    """A photograph as uint8 [3, size, size]: centre square, area-averaged."""
    return fitted(read_image(source), size)


def fitted(image: Image, size: int) -> Tensor:
    """An RGB picture as uint8 [3, size, size]: centre square, area-averaged."""
    from PIL import ImageOps
    from PIL.Image import Resampling

    image = ImageOps.fit(image, (size, size), Resampling.BOX)
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.view(size, size, 3).permute(2, 0, 1).contiguous()


def _picture(span: Span, size: int) -> Tensor:
    data = span.read()
    try:
        return photo_tensor(data, size)
    except InputError as error:
        raise InputError(f"{span}: {str(error).removeprefix('image: ')}") from None


def _mask(photo: Photo, size: int) -> Tensor:
    if photo.mask is None:
        raise InputError(f"{photo.picture}: wanted a mask of it too: this person's others have one")
    return _picture(photo.mask, size).float().mean(0, keepdim=True) / 255


def _prompt(photo: Photo) -> str | None:
    if not isinstance(photo.prompt, Span):
        return photo.prompt
    data = photo.prompt.read(4 * MOST_CHARACTERS)
    try:
        return data.decode("utf-8-sig").strip() or None
    except UnicodeDecodeError as error:
        raise InputError(f"{photo.prompt}: not UTF-8 text: {error}") from None


def _said(photo: Photo) -> str | int | None:
    try:
        return _prompt(photo)
    except InputError:  # told when the subject is read
        return photo.prompt.size


def _photos(files: Mapping[str, Span]) -> list[Photo]:
    """The photos among a subject's files, each with the prompt and the mask beside it."""
    photos = []
    for name in sorted(files, key=natural):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in PHOTO_SUFFIXES and not stem.endswith(".mask"):
            beside = (files.get(stem + end) for end in (".txt", ".mask.png"))
            photos.append(Photo(name, files[name], *beside))
    return photos


# --- the three kinds ------------------------------------------------------------------------------


def _in_folder(folder: Path) -> dict[str, list[Photo]]:
    tars = [path for path in folder.glob("*.tar") if path.name[0] != "."]
    subjects = [entry for entry in _entries(folder) if entry.is_dir()]
    if tars and subjects:
        raise InputError(f"{folder}: wanted .tar files or a sub-folder for each subject, not both")
    if tars:
        return _in_tars(tars)
    if not subjects:
        raise InputError(f"{folder}: no sub-folders and no .tar files; wanted one for each subject")
    return {
        subject.name: _photos(
            {
                entry.name: Span(entry.path, 0, entry.stat().st_size)
                for entry in _entries(subject.path)
                if entry.is_file()
            }
        )
        for subject in subjects
    }


def _entries(folder: str | Path) -> Iterator[os.DirEntry]:
    with os.scandir(folder) as entries:
        yield from (entry for entry in entries if not entry.name.startswith("."))


def _in_table(path: Path, absolute: bool) -> dict[str, list[Photo]]:
    columns = _columns(path)
    root = os.path.realpath(path.parent)
    found: dict[str, dict[str, Photo]] = {}

    def span(value: str, i: int) -> Span:
        parts = PurePosixPath(value).parts
        if "\0" in value or ".." in parts or len(value) > 4096:
            raise InputError(f"{path}: row {i}: {value[:300]!r}: wanted a path without ..")
        file = os.path.join(path.parent, value)
        inside = os.path.commonpath([root, os.path.realpath(file)]) == root
        if not inside and not (absolute and os.path.isabs(value)):
            raise InputError(
                f"{path}: row {i}: {value[:300]!r} is not inside the table's folder"
                + ("" if absolute else " (absolute paths are taken only where that was asked for)")
            )
        try:
            about = os.stat(file)
        except OSError:  # told when the subject is read: the others can do without it
            return Span(file, 0, -1)
        return Span(file, 0, about.st_size if stat.S_ISREG(about.st_mode) else -1)

    for i, (subject, photo, prompt, mask) in enumerate(zip(*columns, strict=True)):
        if not subject or not photo:
            raise InputError(f"{path}: row {i}: no {'path' if subject else 'subject'}")
        of_subject = found.setdefault(subject, {})
        if photo in of_subject:
            raise InputError(f"{path}: row {i}: {photo[:300]!r} occurs twice")
        of_subject[photo] = Photo(
            photo, span(photo, i), prompt.strip() or None, span(mask, i) if mask else None
        )
    return {name: [of[p] for p in sorted(of, key=natural)] for name, of in found.items()}


def _columns(path: Path) -> list[list[str]]:
    """Subject, path, prompt and mask of every row, as texts; "" where there is none."""
    import pyarrow as pa
    from pyarrow import csv, parquet

    wanted = ("subject", "path", "prompt", "mask")
    try:
        if path.suffix == ".csv":  # as texts: 007 is not 7
            texts = csv.ConvertOptions(column_types=dict.fromkeys(wanted, pa.string()))
            table = csv.read_csv(path, convert_options=texts)
        else:
            here = set(parquet.read_schema(path).names)
            table = parquet.read_table(path, columns=[name for name in wanted if name in here])
        missing = [name for name in wanted[:2] if name not in table.column_names]
        if missing:
            raise InputError(
                f"{path}: wanted columns subject and path; got {table.column_names[:10]}"
            )
        there: dict[str, Any] = {
            name: [value or "" for value in table[name].cast(pa.string()).to_pylist()]
            for name in wanted
            if name in table.column_names
        }
    except (pa.ArrowException, OSError, KeyError) as error:
        raise InputError(f"{path}: not such a table: {str(error).splitlines()[0]}") from None
    return [there.get(name, [""] * table.num_rows) for name in wanted]


def _shards(path: Path) -> list[Path]:
    """The files that a path, a glob or a range such as {000..003} names."""
    pattern = str(path)
    if path.exists():
        return [path]
    if match := _RANGE.search(pattern):
        first, last = match.groups()
        head, tail = pattern[: match.start()], pattern[match.end() :]
        numbers = range(int(first), int(last) + 1)
        paths = [Path(f"{head}{i:0{len(first)}d}{tail}") for i in numbers]
    else:
        paths = [Path(name) for name in glob.glob(pattern)]
    if not paths:
        raise InputError(f"{path}: no such file")
    return paths


def _in_tars(paths: Iterable[Path]) -> dict[str, list[Photo]]:
    found: dict[str, list[Photo]] = {}
    tar_of: dict[str, Path] = {}
    for path in sorted(paths, key=lambda path: natural(str(path))):
        for name, files in _index(path).items():
            if name in found:
                raise InputError(f"subject {name!r} is in both {tar_of[name]} and {path}")
            found[name], tar_of[name] = _photos(files), path
    return found


class _Headers(io.FileIO):
    """A tar opened for its headers alone: tarfile would read one of any size into memory."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= 1 << 20:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def _index(path: Path) -> dict[str, dict[str, Span]]:
    """Subject -> file name -> where its bytes are, of one tar."""
    found: dict[str, dict[str, Span]] = {}
    try:
        with _Headers(path) as file, tarfile.TarFile(path, "r", file) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # or it would keep every header
                _check_member(path, member)
                place = PurePosixPath(member.name)
                if member.isdir() or any(part.startswith(".") for part in place.parts):
                    continue
                span = Span(str(path), member.offset_data, member.size, member.name)
                if len(place.parts) != 2:
                    if place.suffix.lower() in PHOTO_SUFFIXES:
                        raise InputError(f"{span}: wanted subject/photo{place.suffix}")
                    continue
                files = found.setdefault(place.parts[0], {})
                if place.name in files:
                    raise InputError(f"{span}: occurs twice")
                files[place.name] = span
            # tarfile takes damage, and a cut between two members, for the end: look for its zeros.
            file.seek(tar.offset)
            rest = file.read(1 << 20)
            if len(rest) < tarfile.BLOCKSIZE or any(rest):
                raise tarfile.ReadError("cut off, damaged, or tars one after the other")
    except InputError:
        raise
    except Exception as error:  # on damage tarfile raises many kinds, RecursionError included
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(f"{path}: not a whole, uncompressed tar: {reason}") from None
    return found


def _check_member(path: Path, member: tarfile.TarInfo) -> None:
    if not (member.isdir() or (member.isreg() and not member.issparse())):
        raise InputError(f"{path}: {member.name!r} is neither a file nor a folder")
    if not 0 <= member.size <= _MOST_BYTES:
        raise InputError(
            f"{path}: {member.name!r}: wanted at most {_MOST_BYTES:,} bytes, got {member.size:,}"
        )
    parts = member.name.removeprefix("./").split("/")
    for part in parts if member.name != "." else ():
        _check_name(path, part)
