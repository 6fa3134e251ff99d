"""Listings of photographs: three kinds, one result; and what strangers put into tables and tars."""

from __future__ import annotations

import csv
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from tiny_world import SIZE, photographs

from w2w_fast.errors import InputError
from w2w_fast.sources import Listing, Subject, natural, open_photos

PROMPT = "sks person"
NAMES = ["person-1", "person-2", "person-10", "Zoë"]


def png(photo: torch.Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray(photo.permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def files() -> dict[str, bytes]:
    """subject/file -> bytes: two photos each; the first person has a prompt, the last has masks."""
    found = {}
    for i, name in enumerate(NAMES):
        for j, photo in enumerate(photographs(2, seed=i)):
            found[f"{name}/{j + 9}.png"] = png(photo)
    found["person-1/10.txt"] = "\ufeff sks person, bei Nacht ü\n".encode()
    found["person-2/9.txt"] = b" \n"
    for j in (9, 10):
        found[f"Zoë/{j}.mask.png"] = png(photographs(1, seed=j)[0] // 2 + 1)
    return found


def as_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root / "photos"


def rows(root: Path, files: dict[str, bytes]) -> list[dict[str, str]]:
    folder = as_folder(root, files)
    found = []
    for name in files:
        stem, suffix = os.path.splitext(name)
        if suffix == ".png" and not stem.endswith(".mask"):
            text = folder / f"{stem}.txt"
            mask = f"photos/{stem}.mask.png" if f"{stem}.mask.png" in files else ""
            prompt = text.read_text("utf-8-sig") if text.exists() else ""
            found.append({"mask": mask, "subject": name.split("/")[0], "age": "7",
                          "path": f"photos/{name}", "prompt": prompt})  # fmt: skip
    return found


def as_csv(root: Path, files: dict[str, bytes]) -> Path:
    table = rows(root, files)
    with open(root / "photos.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    return root / "photos.csv"


def as_parquet(root: Path, files: dict[str, bytes]) -> Path:
    table = [{k: v or None for k, v in row.items()} for row in rows(root, files)]
    parquet.write_table(pa.Table.from_pylist(table), root / "photos.parquet")
    return root / "photos.parquet"


def as_tar(root: Path, files: dict[str, bytes], name: str = "photos.tar", prefix: str = "") -> Path:
    root.mkdir(exist_ok=True)
    with tarfile.open(root / name, "w") as tar:
        for member, data in files.items():
            info = tarfile.TarInfo(prefix + member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return root / name


def as_tars(root: Path, files: dict[str, bytes]) -> Path:
    (root / "shards").mkdir()
    for i in range(2):
        part = {n: d for n, d in files.items() if (n.split("/")[0] in NAMES[:2]) == bool(i)}
        as_tar(root / "shards", part, f"{9 + i:03d}.tar", prefix="./")
    return root / "shards"


def as_glob(root: Path, files: dict[str, bytes]) -> Path:
    return as_tars(root, files) / "*.tar"


def as_range(root: Path, files: dict[str, bytes]) -> Path:
    return as_tars(root, files) / "{009..010}.tar"


KINDS = [as_folder, as_csv, as_parquet, as_tar, as_tars, as_glob, as_range]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_gives_the_same_people(kind: Callable, files, tmp_path):
    listing = open_photos(kind(tmp_path, files))
    assert listing.names == ("Zoë", "person-1", "person-2", "person-10") and len(listing) == 4
    for i, name in enumerate(listing.names):
        subject = listing.read(i, SIZE, PROMPT)
        assert isinstance(subject, Subject) and subject.name == name
        assert torch.equal(subject.images, photographs(2, seed=NAMES.index(name)))
    assert listing.read(1, SIZE, PROMPT).prompts == (PROMPT, "sks person, bei Nacht ü")
    assert listing.read(2, SIZE, "a man").prompts == ("a man", "a man")
    masks = [photographs(1, seed=j)[0] // 2 + 1 for j in (9, 10)]
    want = torch.stack(masks).float().mean(1, keepdim=True) / 255
    assert torch.equal(listing.read(0, SIZE, PROMPT).masks, want)
    assert listing.read(1, SIZE, PROMPT).masks is None
    assert listing.read(1, SIZE // 2, PROMPT).images.shape == (2, 3, SIZE // 2, SIZE // 2)


def test_the_digest_tells_what_matters_and_not_where(files, tmp_path):
    first = open_photos(as_folder(tmp_path / "a", files)).digest
    assert open_photos(as_tars(tmp_path, files)).digest == first
    assert open_photos(as_folder(tmp_path / "b", dict(reversed(files.items())))).digest == first
    changes = {
        "person-1/11.png": files["person-1/9.png"],
        "person-1/9.png": files["person-1/9.png"] + b"\0",
        "person-1/10.txt": b"sks person, bei Tag",
        "Zoë/9.mask.png": files["Zoë/9.mask.png"] + b"\0",
        "person-3/9.png": files["person-1/9.png"],
    }
    digests = {
        open_photos(as_folder(tmp_path / f"c{i}", files | {name: data})).digest
        for i, (name, data) in enumerate(changes.items())
    }
    assert len(digests | {first}) == 1 + len(changes)


def test_listing_reads_no_picture(files, tmp_path):
    listing = open_photos(as_folder(tmp_path, dict.fromkeys(files, b"")))
    assert len(listing.digest) == 64


def test_numbers_in_names_count():
    names = ["b1", "a10", "a2", "a02", "a", "10", "9", "a2b", "a2a"]
    want = ["9", "10", "a", "a02", "a2", "a2a", "a2b", "a10", "b1"]
    assert sorted(names, key=natural) == want


def test_notes_of_file_managers_are_left_out(files, tmp_path):
    junk = {".git/1.png": b"", "person-1/._9.png": b"", "person-1/.DS_Store": b""}
    for kind in (as_folder, as_tar):
        listing = open_photos(kind(tmp_path / kind.__name__, files | junk))
        assert ".git" not in listing.names
        assert listing.read(1, SIZE, PROMPT).images.shape[0] == 2


def test_suffixes_and_what_is_no_photo(tmp_path):
    small = Image.new("RGB", (40, 30), "red")
    (tmp_path / "anna").mkdir()
    for name in ("1.JPG", "2.jpeg", "3.webp", "4.png"):
        small.save(tmp_path / "anna" / name)
    (tmp_path / "anna" / "notes.md").write_text("hello")
    (tmp_path / "anna" / "more").mkdir()
    (tmp_path / "notes.txt").write_text("not a person")
    (subject,) = (open_photos(tmp_path).read(0, SIZE, PROMPT),)
    assert subject.images.shape == (4, 3, SIZE, SIZE)


def test_a_photo_taken_sideways_stands_upright(tmp_path):
    picture = Image.new("RGB", (32, 32), "blue")
    picture.paste((255, 0, 0), (0, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    (tmp_path / "anna").mkdir()
    picture.save(tmp_path / "anna" / "1.png", exif=exif)
    image = open_photos(tmp_path).read(0, SIZE, PROMPT).images[0]
    assert image[2, 0].eq(255).all() and image[0, -1].eq(255).all()


# --- what is wrong with one person is told when that person is read -------------------------------


TROUBLES = {
    "person-1/9.png": (b"\x89PNG\r\n\x1a\nno more", "person-1/9.png: wanted a PNG"),
    "person-2/11.jpg": (b"GIF89a" + bytes(99), "person-2/11.jpg: wanted a PNG"),
    "person-1/9.txt": ("Müller".encode("latin-1"), "person-1/9.txt: not UTF-8"),
    "person-10/9.txt": (b"x" * 50_000, "person-10/9.txt: wanted at most 40,000 bytes"),
    "person-2/9.txt": (b"x" * 20_000, "10,000 characters"),
    "person-1/9.mask.png": (png(photographs(1)[0]), "person-1/10.png: wanted a mask"),
    "Zoë/9.mask.png": (b"", "Zoë/9.mask.png: wanted a PNG"),
}


@pytest.mark.parametrize("kind", [as_folder, as_tar])
@pytest.mark.parametrize("name", TROUBLES)
def test_a_bad_photo_is_told_by_its_name(kind, name, files, tmp_path):
    data, said = TROUBLES[name]
    listing = open_photos(kind(tmp_path, files | {name: data}))
    assert len(listing.digest) == 64
    for i, person in enumerate(listing.names):
        if person == name.split("/")[0]:
            with pytest.raises(InputError, match=said):
                listing.read(i, SIZE, PROMPT)
        else:
            listing.read(i, SIZE, PROMPT)


def test_a_person_without_a_photo_is_told_by_name(files, tmp_path):
    for kind in (as_folder, as_tar):
        listing = open_photos(kind(tmp_path / kind.__name__, files | {"person-3/a.txt": b"hello"}))
        with pytest.raises(InputError, match="'person-3': no photo"):
            listing.read(listing.names.index("person-3"), SIZE, PROMPT)


def test_a_photo_that_changed_or_went_is_told(files, tmp_path):
    folder = as_folder(tmp_path, files)
    listing = open_photos(folder)
    for change in (lambda p: p.write_bytes(b"x"), lambda p: p.unlink()):
        change(folder / "person-1" / "9.png")
        with pytest.raises(InputError, match=r"person-1/9.png: (changed|No such)"):
            listing.read(1, SIZE, PROMPT)
    with open(folder / "person-2" / "9.png", "ab") as file:
        file.write(b"more")
    with pytest.raises(InputError, match="changed since"):
        listing.read(2, SIZE, PROMPT)


def test_a_photo_too_large_is_not_read(files, tmp_path):
    folder = as_folder(tmp_path, files)
    with open(folder / "person-1" / "9.png", "wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(InputError, match="person-1/9.png: wanted at most 67,108,864 bytes"):
        open_photos(folder).read(1, SIZE, PROMPT)


# --- what is refused at once ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda root: root / "nowhere", "no such folder"),
        (lambda root: root / "nowhere.csv", "No such file"),
        (lambda root: root / "nowhere.tar", "no such file"),
        (lambda root: root / "*.tar", "no such file"),
        (lambda root: root / "{003..001}.tar", "no such file"),
        (lambda root: root / "{001..002}.tar", "001.tar: .*No such file"),
        (lambda root: root / ("x" * 5000), "File name too long"),
        (lambda root: root, "no sub-folders"),
        (lambda root: as_tar(root, {}), "nobody"),
        (lambda root: as_tar(root, {"README.md": b"x"}), "nobody"),
        (lambda root: as_tars(root, {}), "nobody"),
    ],
)
def test_nothing_there(make, said, tmp_path):
    with pytest.raises(InputError, match=said):
        open_photos(make(tmp_path))


def test_a_folder_is_of_one_kind(files, tmp_path):
    as_tar(as_folder(tmp_path, files), {"eve/1.png": b""})
    with pytest.raises(InputError, match="not both"):
        open_photos(tmp_path / "photos")


@pytest.mark.parametrize("other", ["PERSON-1", "Zoe\u0308", "ZOË"])
def test_two_people_of_one_name(other, files, tmp_path):
    more = files | {f"{other}/1.png": b""}
    for kind in KINDS[:4]:
        with pytest.raises(InputError, match="one name but for case"):
            open_photos(kind(tmp_path / kind.__name__, more))


def test_one_person_in_two_tars(files, tmp_path):
    as_tar(tmp_path, files, "a.tar")
    as_tar(tmp_path, {"person-1/x.png": b""}, "b.tar")
    with pytest.raises(InputError, match=r"'person-1' is in both .*a\.tar and .*b\.tar"):
        open_photos(tmp_path)


@pytest.mark.parametrize("name", ["x" * 201, "a\nb", "a\x1b[31m", "a\\b", ".."])
def test_unsafe_names(name, files, tmp_path):
    table = tmp_path / "photos.parquet"
    as_folder(tmp_path, files)
    row = {"subject": name, "path": "photos/person-1/9.png"}
    parquet.write_table(pa.Table.from_pylist([row]), table)
    with pytest.raises(InputError, match="wanted a name"):
        open_photos(table)
    if len(name) < 201:
        with pytest.raises(InputError, match="wanted a name"):
            open_photos(as_tar(tmp_path, {f"{name}/1.png": b""}))


# --- hostile tables -------------------------------------------------------------------------------


def table(root: Path, text: str) -> Path:
    (root / "t.csv").write_text(text, encoding="utf-8")
    return root / "t.csv"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("subject\nanna\n", "columns subject and path"),
        ("subject,path\n", "nobody"),
        ("", "not such a table"),
        ("subject,path\nanna\n", "not such a table"),
        ("subject,path\nanna,\n", "row 0: no path"),
        ("subject,path\n,1.png\n", "row 0: no subject"),
        ("subject,path\nanna,1.png\nanna,1.png\n", "row 1: '1.png' occurs twice"),
        ("subject,path\nanna,../1.png\n", r"without \.\."),
        ("subject,path\nanna,a/../../1.png\n", r"without \.\."),
        ("subject,path\nanna,/etc/passwd\n", "not inside"),
        ("subject,path\nanna,link/passwd\n", "not inside"),
        ("subject,path,mask\nanna,1.png,link/passwd\n", "not inside"),
        (f"subject,path\nanna,{'x' * 5000}\n", r"without \.\."),
    ],
)
def test_tables_that_are_refused(text, said, tmp_path):
    (tmp_path / "link").symlink_to("/etc")
    with pytest.raises(InputError, match=said):
        open_photos(table(tmp_path, text))


def test_a_table_that_is_none(tmp_path):
    for name, data in (("t.parquet", b"PAR1 no"), ("t.csv", b"subject,path\n\xff,1.png\n")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match="not such a table"):
            open_photos(tmp_path / name)


def test_absolute_paths_where_they_are_asked_for(files, tmp_path):
    folder = as_folder(tmp_path / "elsewhere", files)
    (tmp_path / "here").mkdir()
    listed = table(tmp_path / "here", f"subject,path\nanna,{folder}/person-1/9.png\n")
    with pytest.raises(InputError, match="absolute"):
        open_photos(listed)
    subject = open_photos(listed, absolute=True).read(0, SIZE, PROMPT)
    assert torch.equal(subject.images, photographs(2, seed=0)[:1])
    (tmp_path / "here" / "link").symlink_to(folder)
    linked = table(tmp_path / "here", "subject,path\nanna,link/person-1/9.png\n")
    with pytest.raises(InputError, match="not inside"):
        open_photos(linked, absolute=True)


def test_subjects_of_a_table_are_texts(tmp_path):
    listing = open_photos(table(tmp_path, "subject,path\n007,1.png\nNA,2.png\n7,3.png\n"))
    assert listing.names == ("007", "7", "NA")
    with pytest.raises(InputError, match="1.png: no such file"):
        listing.read(0, SIZE, PROMPT)


# --- hostile tars ---------------------------------------------------------------------------------


def member(name: str, **fields) -> Callable[[tarfile.TarFile], None]:
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return lambda tar: tar.addfile(info)


@pytest.mark.parametrize(
    ("add", "said"),
    [
        (member("anna/1.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "neither"),
        (member("anna/1.png", type=tarfile.LNKTYPE, linkname="person-1/9.png"), "neither"),
        (member("anna/1.png", type=tarfile.CHRTYPE), "neither"),
        (member("anna/1.png", type=tarfile.FIFOTYPE), "neither"),
        (member("anna/1.png", type=tarfile.GNUTYPE_SPARSE), "not a whole|neither"),
        (member("/anna/1.png"), "wanted a name"),
        (member("../anna/1.png"), "wanted a name"),
        (member("anna/../1.png"), "wanted a name"),
        (member("anna//1.png"), "wanted a name"),
        (member("1.png"), "wanted subject/photo.png"),
        (member("a/b/1.png"), "wanted subject/photo.png"),
        (member("person-1/9.png"), "occurs twice"),
        (member("anna/" + "1" * 300 + ".png"), "wanted a name"),
    ],
)
def test_members_that_are_refused(add, said, files, tmp_path):
    path = as_tar(tmp_path, files)
    with tarfile.open(path, "a") as tar:
        add(tar)
    with pytest.raises(InputError, match=f"photos.tar.*({said})"):
        open_photos(path)


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """One header block with a size that its data does not have, negative ones included."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ([header("a/1.png", 65 << 20)], "wanted at most 67,108,864 bytes"),
        ([header("a/1.png", -1024)], "wanted at most"),
        ([header("a/1.png", 1 << 40)], "wanted at most"),
        ([header("a", 1 << 40, tarfile.GNUTYPE_LONGNAME)], "a header of"),
        ([header("a", -5120, tarfile.GNUTYPE_LONGNAME)], "a header of"),
        ([header("a", 1 << 40, tarfile.XHDTYPE)], "a header of"),
        ([header("a", 0, tarfile.XGLTYPE)] * 5000, "recursion|whole"),
        ([header("a/1.png", 512), b"\0" * 100], "whole"),
        ([header("a/1.png", 0), b"\0" * 100], "cut off"),
        ([header("a/1.png", 0), b"x" * 512, b"\0" * 1024], "cut off"),
        ([header("a/1.png", 0), b"\0" * 1024, header("b/1.png", 0), b"\0" * 1024], "one after"),
        ([b"no tar at all"], "whole"),
        ([b"\x1f\x8b\x08" + b"x" * 600], "uncompressed"),
        ([], "whole"),
    ],
)
def test_damaged_tars(blocks, said, tmp_path):
    path = tmp_path / "bad.tar"
    path.write_bytes(b"".join(blocks))
    with pytest.raises(InputError, match=f"bad.tar.*({said})"):
        open_photos(path)


def test_a_tar_cut_anywhere(files, tmp_path):
    path = as_tar(tmp_path, files)
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0"))
    for length in {*range(0, end, 512), *range(0, end, 997)}:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="photos.tar"):
            open_photos(path)


def test_nothing_is_written(files, tmp_path):
    for kind in (as_folder, as_tar, as_csv):
        path = kind(tmp_path, files)
        before = sorted(p for p in tmp_path.rglob("*"))
        listing: Listing = open_photos(path)
        listing.read(0, SIZE, PROMPT)
        assert sorted(p for p in tmp_path.rglob("*")) == before
