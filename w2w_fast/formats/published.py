"""The files published with the paper (Dravid et al. 2024, arXiv 2406.09413) as a weight space.

    V.pt                  [d, 10000]   right singular vectors of the standardised population
    mean.pt, std.pt       [d]
    proj_1000pc.pt        [n, 1000]    the population's coefficients
    weight_dimensions.pt  name of A or B -> ((count,), shape), in the order of w

They are pickles. They are opened only with allow_pickle=True, after a look at the archive, with
torch's restricted unpickler (`weights_only=True`), never with a fallback. identity_df.pt (a pickled
pandas frame) is never opened: labels come as CSV or Parquet. pinverse_1000pc.pt is the
pseudo-inverse of proj_1000pc.pt and is not needed.
"""

from __future__ import annotations

import dataclasses
import re
import reprlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..labels import read_labels
from ..layout import Layout
from ..space import WeightSpace

_ROWS = 4096
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_KEY = re.compile(
    r"(?:base_model\.model\.|lora_unet_|unet\.)?(?P<module>[\w.]+?)"
    r"[._]lora[._](?P<half>A|B|down|up)(?:\.\w+)?\.weight"
)

# As in the published code: the base the adapters were trained on, and the settings used with them.
_META = {
    "base": "stablediffusionapi/realistic-vision-v51",
    "prompt": "sks person",
    "class_prompt": "person",
    "generate": {"steps": 50, "guidance": 3.0},
    "invert": {"steps": 400, "lr": 0.1, "weight_decay": 1e-10, "whiten": False},
    "source": "the published weights2weights files",
}


def import_published(
    folder: str | Path,
    out: str | Path,
    *,
    components: int = 1000,
    labels: str | Path | None = None,
    dtype: str = "bf16",
    allow_pickle: bool = False,
) -> WeightSpace:
    """Convert the published files in `folder` to a space in the directory `out`, and load it.

    components: how many principal components to keep, at most V.pt's. Beyond proj_1000pc.pt's the
        population's coefficients are not known: the space then holds none, and the spread of the
        further components continues a power law (meta["sigma_known"] says from where).
    labels: CSV or Parquet, one row a model in the order of proj_1000pc.pt, numeric columns are
        attributes; their directions are fitted.
    std has negative entries in the published files. A row of V and its std change sign together
    without changing a single adapter, so both are negated; the number is kept in
    meta["negative_std"].
    dtype: how the basis is stored, bf16 or int8 (see ``WeightSpace.quantize``).
    Raises InputError: no allow_pickle, torch < 2.10, a file that is missing, malformed, of the
    wrong shape or not finite, names not in the order of Layout.sd15.
    """
    folder = Path(folder)
    if dtype not in ("bf16", "int8"):
        raise InputError(f"dtype: wanted bf16 or int8, got {dtype!r}")
    if not allow_pickle:
        raise InputError(
            f"{folder}: the published files are pickles; if you trust where they come from, pass "
            "allow_pickle=True (w2w import-published --allow-pickle)"
        )
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 10):
        raise InputError(f"torch {torch.__version__}: pickles are opened with torch >= 2.10 only")
    layout = Layout.sd15()
    check_dimensions(folder / "weight_dimensions.pt", layout)
    d = layout.size
    mean, std = (_tensor(folder / f"{name}.pt", (d,)).float() for name in ("mean", "std"))
    proj = _tensor(folder / "proj_1000pc.pt", (None, None))
    v = _tensor(folder / "V.pt", (d, None), finite=False)  # 4 GB: looked at row by row below
    if not 1 <= components <= v.shape[1]:
        raise InputError(f"components = {components}; V.pt has {v.shape[1]}")
    sign = torch.where(std < 0, -1.0, 1.0)
    basis = _basis(folder / "V.pt", v[:, :components], sign)
    known = min(components, proj.shape[1])
    space = WeightSpace(
        layout=layout,
        mean=mean,
        std=std.abs(),
        basis=basis[:, :known],
        coefficients=proj[:, :known].float().contiguous(),
        meta={**_META, "n": proj.shape[0], "negative_std": int((sign < 0).sum())},
    )
    if labels is not None:
        space.names, attributes, table = read_labels(labels)
        if table.shape[0] != proj.shape[0]:
            raise InputError(
                f"labels: {labels}: {table.shape[0]} rows; wanted one for each of "
                f"{proj.shape[0]} models"
            )
        space.fit_directions(table, attributes)
    if components > known:
        space = _continued(space, basis)
    if dtype == "int8":
        space = space.quantize("int8")
    space.save(out)
    return WeightSpace.load(out)


def _continued(space: WeightSpace, basis: Tensor) -> WeightSpace:
    """The space with all columns of a wider basis [d, m]; what is known of it comes first.

    Standard deviations of principal components fall roughly as a power of their index: the later
    half of the known ones gives the line, log sigma = a log index + b by least squares.
    """
    known, m = space.m, basis.shape[1]
    index = torch.arange(1, m + 1, dtype=torch.float64).log()
    line = torch.stack([index, torch.ones_like(index)], dim=1)
    later = slice(known // 2, known)
    floor = torch.finfo(torch.float32).tiny
    spread = space.sigma.double().clamp_min(floor).log()[later, None]
    further = (line @ torch.linalg.lstsq(line[later], spread).solution).exp()[known:, 0]

    def pad(rows: Tensor | None) -> Tensor | None:
        return None if rows is None else torch.nn.functional.pad(rows, (0, m - known))

    return dataclasses.replace(
        space,
        basis=basis,
        coefficients=None,
        mu=pad(space.mu),
        sigma=torch.cat([space.sigma, further.float()]),
        directions=pad(space.directions),
        classifiers=pad(space.classifiers),
        meta={**space.meta, "sigma_known": known},
    )


def check_dimensions(path: Path, layout: Layout) -> None:
    """InputError unless the file lists A and B of the layout's modules, by name and in order."""
    table = _unpickle(path)
    if not isinstance(table, Mapping) or not all(isinstance(key, str) for key in table):
        raise InputError(f"{path}: wanted a mapping from names to ((count,), shape)")
    names = {name.replace(".", "_"): name for name in layout.names}
    wanted = []
    for module in layout.modules:
        wanted += [(module.name, "A", (layout.rank, module.in_features))]
        wanted += [(module.name, "B", (module.out_features, layout.rank))]
    if len(table) != len(wanted):
        raise InputError(f"{path}: {len(table)} entries; wanted {len(wanted)}")
    for (key, value), (name, half, shape) in zip(table.items(), wanted, strict=True):
        match = _KEY.fullmatch(key)
        if (
            match is None
            or names.get(match["module"].replace(".", "_")) != name
            or {"down": "A", "up": "B"}.get(match["half"], match["half"]) != half
        ):
            raise InputError(f"{path}: entry {key[:200]!r}; the layout has {half} of {name} there")
        try:
            (count,), got = value
            same = (int(count), tuple(got)) == (shape[0] * shape[1], shape)
        except (TypeError, ValueError):
            same = False
        if not same:
            raise InputError(
                f"{path}: {key[:200]!r} is {reprlib.repr(value)}; wanted "
                f"(({shape[0] * shape[1]},), {shape})"
            )


def _basis(path: Path, v: Tensor, sign: Tensor) -> Tensor:
    """V [d, m] times sign [d] as bfloat16, a few rows at a time from the mapped file."""
    basis = torch.empty(v.shape, dtype=torch.bfloat16)
    squares = torch.zeros(v.shape[1], dtype=torch.float64)
    for start in range(0, v.shape[0], _ROWS):
        rows = v[start : start + _ROWS].float()
        squares += rows.double().square().sum(0)
        basis[start : start + _ROWS] = rows * sign[start : start + _ROWS, None]
    # NaN and infinity fail this too.
    wrong = torch.nonzero(~((squares - 1).abs() < 0.05)).flatten().tolist()
    if wrong:
        raise InputError(
            f"{path}: {len(wrong)} columns are not of length 1 (column {wrong[0]} has "
            f"{squares[wrong[0]].sqrt():.4g}); wanted orthonormal principal components"
        )
    return basis


def _tensor(path: Path, shape: tuple[int | None, ...], *, finite: bool = True) -> Tensor:
    """A plain tensor of the shape (None: any length), mapped; [1, d] counts as [d]."""
    tensor = _unpickle(path)
    # Exactly Tensor: the unpickler may build subclasses, sparse, quantised and meta tensors.
    plain = type(tensor) is Tensor and tensor.layout == torch.strided and tensor.dtype in _FLOATS
    if not plain or tensor.device.type != "cpu":
        kind = f"{type(tensor).__name__} {getattr(tensor, 'dtype', '')}"
        raise InputError(f"{path}: wanted a plain floating point tensor, got {kind}")
    if len(shape) == 1 and tensor.ndim == 2 and 1 in tensor.shape:
        tensor = tensor.flatten() if tensor.numel() == shape[0] else tensor
    fits = tensor.ndim == len(shape) and all(
        got > 0 and want in (None, got) for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        raise InputError(
            f"{path}: shape {list(tensor.shape)}; wanted "
            f"[{', '.join('any' if want is None else str(want) for want in shape)}]"
        )
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        raise InputError(f"{path}: shape {list(tensor.shape)} is larger than the data stored")
    if finite and not torch.isfinite(tensor).all():
        raise InputError(f"{path}: has NaN or infinite values")
    return tensor.detach()


def _unpickle(path: Path) -> Any:
    """torch.load of a zip archive in which nothing is compressed, with no code run."""
    if not path.is_file():
        raise InputError(f"{path}: not found among the published files")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise InputError(f"{path}: not an archive written by torch.save: {error}") from None
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise InputError(f"{path}: {member.filename!r} is compressed; torch.save never does")
        if member.filename.endswith(".pkl") and member.file_size > 1 << 20:
            raise InputError(f"{path}: {member.filename!r} is {member.file_size} bytes long")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the unpickler raises whatever the bytes make it raise
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise InputError(f"{path}: refused by torch's restricted unpickler: {reason}") from None
