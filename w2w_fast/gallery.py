"""A gallery on disk: many generated pictures, and a table of what made each.

    gallery.json              format, version, and the job: all that the pictures depend on
    coefficients.safetensors  whose pictures they are; with a delayed edit of other people than
                              these, before.safetensors: who they were until then
    image-000000.png ...      above 1,000 pictures in folders of 1,000, 000/ ...; or
    images-00000.tar ...      in webdataset's form: image-000000.png and .json of each
    images.parquet            a row a picture: its file, sha256, and what made it (COLUMNS)
    contact-sheets/00000.jpg  a hundred pictures each
    manifest.json             sha256 of all of these but the pictures, written last: with it the
                              gallery is finished

It is made in pieces of one batch each. A piece's pictures are written one by one, then small ones
for the contact sheets, then its mark, .done-00012.json. What has no mark is made again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from . import sharing
from .coefficients import write_coefficients
from .errors import InputError
from .files import (
    MANIFEST,
    atomic_path,
    check_manifest,
    read_json,
    sha256,
    write_json,
    write_manifest,
)
from .pictures import contact_sheet, cut, encode, strip
from .sharing import locked

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pyarrow import Table

FORMAT, VERSION = "w2w_fast.gallery", 1
RECORD, PEOPLE, BEFORE = "gallery.json", "coefficients.safetensors", "before.safetensors"
TABLE, SHEETS = "images.parquet", "contact-sheets"
MOST_IMAGES = 1_000_000
COLUMNS = {
    "file": "string", "sha256": "string", "row": "int64", "prompt": "string", "seed": "int64",
    "edits": "string", "start": "int64", "scheduler": "string", "steps": "int64",
    "guidance": "double", "identity_guidance": "bool", "strength": "double", "versions": "string",
}  # fmt: skip
"""Of images.parquet. row is that of coefficients.safetensors; start is null without a delayed
edit; a picture in a tar has the file images-00000.tar/image-000000.png."""

SUFFIXES = {"png": "png", "webp": "webp", "jpeg": "jpg", "tar": "png"}
_TOGETHER = 1000  # pictures in a folder, or about as many in a tar
_PAGE = 100
_ENCODERS = 4  # threads: a large PNG takes a tenth of a second


@dataclass(frozen=True)
class Gallery:
    """A finished gallery, checked: the folder, images.parquet, the job."""

    folder: Path
    table: Table
    job: dict[str, Any]

    def __len__(self) -> int:
        return self.table.num_rows


def open_gallery(folder: str | Path, *, verify: bool = True) -> Gallery:
    """The finished gallery in a folder; InputError, naming the file, for anything else.

    ``verify`` compares every file with its sha256.
    """
    folder = Path(folder)
    job = read_record(folder)["job"]
    if not is_finished(folder):
        raise InputError(f"{folder}: this gallery is not finished; run the same command again")
    if verify:
        listed = check_manifest(folder)
        if not {RECORD, PEOPLE, TABLE} <= set(listed):
            raise InputError(f"{folder}: {RECORD}, {PEOPLE} or {TABLE} is not in the manifest")
    table = _read_table(folder / TABLE)
    draft = Draft(folder, table.num_rows, job["batch"], job["format"])
    files = table["file"].to_pylist()
    # Names are computed, not believed: one could lead out of the folder.
    if files != [draft.name(i) for i in range(job["images"])]:
        raise InputError(f"{folder / TABLE}: wanted a row for each of {job['images']} images")
    if verify and job["format"] != "tar":
        for file, wanted in zip(files, table["sha256"].to_pylist(), strict=True):
            if sha256(folder / file) != wanted:
                raise InputError(f"{folder / file}: differs from the table's sha256: damaged")
    return Gallery(folder, table, job)


@contextmanager
def beginning(folder: Path) -> Iterator[None]:
    """Held by one process at a time, while it finds out how a gallery is to be begun.

    Leaves no folder behind if that fails. InputError for a folder of other things.
    """
    sharing.check_free(folder / RECORD, "gallery")
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder, "begin"):
            yield
    except BaseException:
        if not (folder / RECORD).exists():
            (folder / ".begin.lock").unlink(missing_ok=True)
            with suppress(OSError):  # another process's files: they are left
                if new:
                    folder.rmdir()
        raise


def recorded_batch(folder: Path) -> int | None:
    """The batch of a gallery that was begun, None before."""
    return read_record(folder)["job"]["batch"] if (folder / RECORD).exists() else None


def begin(
    folder: Path, job: Mapping[str, Any], coefficients: Tensor, before: Tensor | None = None
) -> None:
    """Start a gallery's folder, or take up one that was started with the same job.

    job: JSON; images, batch and format are in it. coefficients, before: [k, m].
    InputError, naming what differs, for another one.
    """
    record = {"format": FORMAT, "version": VERSION, "job": dict(job)}
    sharing.begin(folder / RECORD, record, "gallery")
    for name, c in ((PEOPLE, coefficients), (BEFORE, before)):
        if c is not None and not (folder / name).exists():
            write_coefficients(folder / name, c)


def read_record(folder: Path) -> dict[str, Any]:
    """gallery.json, of a finished gallery or one in the making."""
    record = sharing.read_record(folder / RECORD, FORMAT, VERSION, "gallery")
    job = record.get("job", {})
    sizes = [job.get(name) for name in ("images", "batch")]
    if any(type(n) is not int or n < 1 for n in sizes) or job.get("format") not in SUFFIXES:
        raise InputError(f"{folder / RECORD}: wanted a job of images, batch and format")
    return record


def is_finished(folder: Path) -> bool:
    """Whether nothing is left to do but to remove what was needed on the way."""
    return (folder / MANIFEST).exists()


def images_done(folder: Path) -> tuple[int, int | None]:
    """(how many images are made, how many are wanted); (0, None) before a gallery is begun."""
    if not (folder / RECORD).exists():
        return 0, None
    job = read_record(folder)["job"]
    n, marks = job["images"], sum(1 for _ in folder.glob(".done-*.json"))
    return n if is_finished(folder) else min(n, marks * job["batch"]), n


@dataclass(frozen=True)
class Draft:
    """A gallery that is being made: pictures 0 to n - 1, in pieces of one batch.

    record(i): what made picture i, a value for each of COLUMNS but file and sha256.
    """

    folder: Path
    n: int
    batch: int
    format: str
    record: Callable[[int], dict[str, Any]] | None = None

    @property
    def pieces(self) -> int:
        return -(-self.n // self.batch)

    def rows(self, piece: int) -> range:
        """The pictures of a piece."""
        return range(piece * self.batch, min((piece + 1) * self.batch, self.n))

    def name(self, i: int) -> str:
        """The file of picture i, in the folder."""
        name = f"image-{i:06d}.{SUFFIXES[self.format]}"
        if self.format == "tar":
            return f"{self._tar(i // self.batch)}/{name}"
        return name if self.n <= _TOGETHER else f"{i // _TOGETHER:03d}/{name}"

    def done(self, piece: int) -> bool:
        """Whether a piece is written. The marks go when the gallery is finished."""
        return self._hidden("done", piece, ".json").exists() or is_finished(self.folder)

    def write(self, piece: int, images: Sequence[Image.Image]) -> None:
        """Write a piece's pictures and, when all are on disk, its mark."""
        names = [self.name(i) for i in self.rows(piece)]
        records = [self.record(i) for i in self.rows(piece)]
        kind = "png" if self.format == "tar" else self.format
        hashes = {}
        with ThreadPoolExecutor(_ENCODERS) as pool:
            encoded = pool.map(lambda image, record: encode(image, kind, record), images, records)
            if self.format == "tar":
                # A tar's members without its end, so that parts joined are a tar.
                with (
                    atomic_path(self._hidden("part", piece)) as temporary,
                    temporary.open("wb") as file,
                ):
                    for name, record, data in zip(names, records, encoded, strict=True):
                        member = Path(name).name
                        told = json.dumps(record, sort_keys=True, ensure_ascii=False).encode()
                        file.write(_member(member, data))
                        file.write(_member(str(Path(member).with_suffix(".json")), told))
                        hashes[name] = hashlib.sha256(data).hexdigest()
            else:
                for name, data in zip(names, encoded, strict=True):
                    with atomic_path(self.folder / name) as temporary:
                        temporary.write_bytes(data)
                    hashes[name] = hashlib.sha256(data).hexdigest()
        with atomic_path(self._hidden("small", piece)) as temporary:
            strip(images).save(temporary, "PNG")
        write_json(self._hidden("done", piece, ".json"), hashes)

    def finish(self) -> None:
        """Close the gallery, once all pieces are done: table, sheets, manifest; nothing hidden."""
        with locked(self.folder, "finish"):
            if not is_finished(self.folder):
                if self.format == "tar":
                    self._join()
                self._write_sheets()
                self._write_table()
                listed = [RECORD, PEOPLE, BEFORE, TABLE, f"{SHEETS}/*", "images-*.tar"]
                found = [path for pattern in listed for path in self.folder.glob(pattern)]
                write_manifest(self.folder, found)
            # What was only needed on the way, and what killed processes left.
            for path in self.folder.rglob(".*"):
                if path.suffix != ".lock":
                    path.unlink()
        for path in self.folder.glob(".*.lock"):
            path.unlink(missing_ok=True)

    def _hidden(self, what: str, piece: int, suffix: str = "") -> Path:
        return self.folder / f".{what}-{piece:05d}{suffix}"

    def _tar(self, piece: int) -> str:
        return f"images-{piece // max(1, _TOGETHER // self.batch):05d}.tar"

    def _join(self) -> None:
        """The parts to tars, one after the other: there is disk space for one in two copies."""
        tars: dict[str, list[Path]] = {}
        for piece in range(self.pieces):
            tars.setdefault(self._tar(piece), []).append(self._hidden("part", piece))
        for name, parts in tars.items():
            if not (self.folder / name).exists():
                with atomic_path(self.folder / name) as temporary, temporary.open("wb") as tar:
                    for part in parts:
                        with part.open("rb") as file:
                            shutil.copyfileobj(file, tar)
                    tar.write(bytes(2 * tarfile.BLOCKSIZE))
            for part in parts:
                part.unlink(missing_ok=True)

    def _write_sheets(self) -> None:
        small = self._small()
        for page in range(-(-self.n // _PAGE)):
            with atomic_path(self.folder / SHEETS / f"{page:05d}.jpg") as temporary:
                contact_sheet(list(islice(small, _PAGE))).save(temporary, "JPEG", quality=95)

    def _small(self) -> Iterator[Image.Image]:
        """Every picture in small, in order."""
        for piece in range(self.pieces):
            with Image.open(self._hidden("small", piece), formats=["PNG"]) as row:
                yield from cut(row, len(self.rows(piece)))

    def _write_table(self) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        schema = pa.schema(list(COLUMNS.items()))
        with (
            atomic_path(self.folder / TABLE) as temporary,
            parquet.ParquetWriter(temporary, schema) as writer,
        ):
            rows: list[dict[str, Any]] = []
            for piece in range(self.pieces):
                hashes = read_json(self._hidden("done", piece, ".json"))
                for i in self.rows(piece):
                    file = self.name(i)
                    rows.append({"file": file, "sha256": hashes[file], **self.record(i)})
                if len(rows) >= 100_000 or piece == self.pieces - 1:
                    writer.write_table(pa.Table.from_pylist(rows, schema))
                    rows = []


def _member(name: str, data: bytes) -> bytes:
    """A file in a tar: header, data, padding. Its time is 0: the same bytes whenever it is made."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def _read_table(path: Path) -> Table:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
        return table.select(list(COLUMNS)).cast(pa.schema(list(COLUMNS.items())))
    except (pa.ArrowException, OSError, KeyError) as error:
        raise InputError(f"{path}: not a table of images: {str(error).splitlines()[0]}") from None
