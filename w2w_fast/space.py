"""WeightSpace: the mean, the spread and the principal components of a population of adapters.

    w = mean + std * (c V^T)        c = ((w - mean) / std) V

A model is a point c ``[m]``. On disk a space is a folder: space.safetensors (tensors), space.json
(layout, names, attributes, meta) and manifest.json (sha256 of both). Dravid et al., "Interpreting
the Weight Space of Customized Diffusion Models", 2024.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import ops
from .components import (
    PASSES,
    Stack,
    Standardised,
    check_components,
    coefficients,
    moments,
    principal_components,
)
from .errors import InputError
from .files import (
    all_finite,
    atomic_dir,
    check_manifest,
    read_json,
    read_tensors,
    write_json,
    write_manifest,
    write_tensors,
)
from .layout import Layout
from .ops._basis import quantized
from .readers import PERMUTATIONS, fit_readers
from .start import Start, warn_of_many

_FORMAT, _VERSION = "w2w_fast.space", 1
_TENSORS, _JSON = "space.safetensors", "space.json"
_BASIS_DTYPES = {torch.float32, torch.bfloat16, torch.int8, torch.uint8}
_BITS = {"int8": 8, "int4": 4}
# Every tensor and its sizes: d numbers of an adapter, m components, n models, a attributes.
_SHAPES = {
    "mean": "d",
    "std": "d",
    "basis": "dm",
    "row_scale": "d",
    "mu": "m",
    "sigma": "m",
    "coefficients": "nm",
    "labels": "na",
    "directions": "am",
    "classifiers": "am",
    "explained": "m",
}
_REQUIRED = ("mean", "std", "basis", "mu", "sigma")


@dataclass(repr=False)
class WeightSpace:
    """A space, validated on construction. float32, but for the basis: see ``quantize`` and ``to``.

    mean, std ``[d]`` (std 0: the coordinate is fixed), basis ``[d, m]`` (float32 or bfloat16, or
    integers in units of row_scale ``[d]``: int8, or uint8 of two 4-bit numbers); coefficients
    ``[n, m]`` of the population, with names (n), labels ``[n, a]`` and attributes (a); directions
    ``[a, m]``, one population standard deviation long (edit: c + t * row); classifiers ``[a, m]``,
    linear readers (score = (c - mu) @ row, in the label's units above its mean); explained
    ``[m]``, share of variance; mu, sigma ``[m]`` of the coefficients, wanted where those are left
    out; meta, free JSON: base model, prompt, guidance.
    """

    layout: Layout
    mean: Tensor
    std: Tensor
    basis: Tensor
    coefficients: Tensor | None = None
    names: list[str] | None = None
    labels: Tensor | None = None
    attributes: list[str] = field(default_factory=list)
    directions: Tensor | None = None
    classifiers: Tensor | None = None
    explained: Tensor | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    mu: Tensor | None = None
    sigma: Tensor | None = None
    row_scale: Tensor | None = None

    def __repr__(self) -> str:
        return (
            f"WeightSpace({self.n} models, {self.m} components of {self.d} numbers, "
            f"attributes: {', '.join(self.attributes) or 'none'})"
        )

    def __post_init__(self) -> None:
        if self.coefficients is not None and self.mu is None:
            self.mu = self.coefficients.mean(0)
        if self.coefficients is not None and self.sigma is None:
            self.sigma = self.coefficients.std(0, correction=0)
        self.attributes = list(self.attributes)
        self._check()
        for name in _SHAPES:
            tensor = getattr(self, name)
            if tensor is not None and tensor.is_floating_point() and not all_finite(tensor):
                raise InputError(f"space: {name}: holds NaN or infinite numbers")

    def _check(self) -> None:
        missing = [name for name in _REQUIRED if getattr(self, name) is None]
        if missing:
            raise InputError(f"space: wanted {', '.join(missing)} (or coefficients)")
        sizes = {"d": self.layout.size, "m": self.mu.shape[-1], "a": len(self.attributes)}
        if self.names is not None:
            sizes["n"] = len(self.names)
        for name, spec in _SHAPES.items():
            tensor = getattr(self, name)
            if tensor is None:
                continue
            dtypes = _BASIS_DTYPES if name == "basis" else {torch.float32}
            shape = tensor.shape
            if name == "basis" and tensor.dtype == torch.uint8 and tensor.ndim == 2:
                # Two numbers a byte: of an odd m the last half is unused.
                shape = (shape[0], 2 * shape[1] - self.mu.shape[-1] % 2)
            fits = tensor.ndim == len(spec) and all(
                sizes.setdefault(letter, size) == size
                for letter, size in zip(spec, shape, strict=True)
            )
            if not fits or tensor.dtype not in dtypes:
                wanted = ", ".join(f"{x} = {sizes[x]}" if x in sizes else x for x in spec)
                raise InputError(
                    f"space: {name}: wanted [{wanted}] of {' or '.join(map(str, dtypes))}, "
                    f"got {list(tensor.shape)} of {tensor.dtype}"
                )
        if self.m < 1 or bool((self.std < 0).any()):
            raise InputError("space: wanted at least one component, and no negative std")
        if self.quantized != (self.row_scale is not None):
            raise InputError(
                "space: row_scale: wanted it with a basis of integers and only there; the basis is "
                f"{self.basis.dtype}"
            )

    @property
    def d(self) -> int:
        return self.basis.shape[0]

    @property
    def m(self) -> int:
        return self.mu.shape[0]

    @property
    def quantized(self) -> bool:
        """Whether the basis holds integers, in units of row_scale."""
        return not self.basis.is_floating_point()

    @property
    def n(self) -> int:
        """Models whose coefficients are held, 0 if none are."""
        return 0 if self.coefficients is None else self.coefficients.shape[0]

    def covariance(self) -> Tensor:
        """S ``[m, m]`` float64 of the coefficients; diag(sigma^2) where they are not held."""
        if self.coefficients is None:
            return self.sigma.double().square().diag()
        z = self.coefficients.double() - self.mu.double()
        return z.mT @ z / self.n

    def project(self, w: Tensor) -> Tensor:
        """w ``[k, d]`` -> c ``[k, m]``, float32 or float64."""
        return ops.project(w, self.basis, self.mean, self.std, row_scale=self.row_scale, m=self.m)

    def reconstruct(self, c: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """c ``[k, m]`` -> w ``[k, d]`` in ``dtype`` (c's), differentiable in c."""
        return ops.reconstruct(c, self.basis, self.mean, self.std, dtype, row_scale=self.row_scale)

    def delta(self, direction: Tensor) -> Tensor:
        """The step ``[d]`` of adapters that is the step ``direction [m]`` of coefficients.

        std * (V direction): computed once, ``edit`` then moves adapters along it without V.
        """
        step = direction[None].to(self.std)
        return ops.reconstruct(step, self.basis, None, self.std, row_scale=self.row_scale)[0]

    def quantize(self, kind: str) -> WeightSpace:
        """This space with a basis of ``"int8"`` or ``"int4"``: half or a quarter of bfloat16's.

        Each row of V gets a scale of its own, which costs nothing (it multiplies std). What it
        costs in accuracy is kept as ``meta["quantized"]``: the rms error of the population's
        adapters (of up to 64 of them, or of people drawn from mu and sigma) relative to the rms
        of their distance from the mean.
        """
        if kind not in _BITS or self.quantized:
            raise InputError(
                f"quantize: wanted {' or '.join(_BITS)} of a space of floats, got {kind!r} of "
                f"{self.basis.dtype}"
            )
        basis, row_scale = quantized(self.basis, _BITS[kind])
        if self.coefficients is None:
            noise = torch.randn(64, self.m, generator=torch.Generator().manual_seed(0))
            c = self.mu + self.sigma * noise.to(self.mu)
        else:
            c = self.coefficients[torch.linspace(0, self.n - 1, min(self.n, 64)).long()]
        space = dataclasses.replace(self, basis=basis, row_scale=row_scale, meta=dict(self.meta))
        exact = self.reconstruct(c)
        error = (space.reconstruct(c) - exact).square().mean().sqrt()
        spread = (exact - self.mean).square().mean().sqrt()
        space.meta["quantized"] = {"kind": kind, "relative_error": float(error / spread)}
        return space

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> WeightSpace:
        """This space on ``device``; ``dtype`` (float32 or bfloat16) is the basis's alone."""
        if dtype is not None and self.quantized:
            raise InputError("to: dtype: the basis is quantised; only its device can change")
        moved = {
            name: tensor.to(device=device, dtype=dtype if name == "basis" else None)
            for name in _SHAPES
            if (tensor := getattr(self, name)) is not None
        }
        return dataclasses.replace(self, **moved)

    def cut(self, m: int) -> WeightSpace:
        """The space of the first ``m`` components; directions keep the length of one sd."""
        if not 1 <= m <= self.m:
            raise InputError(f"m: wanted 1 to {self.m} components, got {m}")
        parts = {
            name: tensor[..., :m]
            for name, spec in _SHAPES.items()
            if spec.endswith("m") and (tensor := getattr(self, name)) is not None
        }
        if self.basis.dtype == torch.uint8:
            parts["basis"] = self.basis[:, : -(-m // 2)]
        meta = dict(self.meta)
        if isinstance(readers := meta.get("readers"), dict):  # what a score meant, it means no more
            meta["readers"] = {
                name: {k: v for k, v in entry.items() if k != "calibration"}
                if isinstance(entry, dict) else entry
                for name, entry in readers.items()
            }  # fmt: skip
        space = dataclasses.replace(self, **parts, meta=meta)
        if space.classifiers is not None:
            space.set_directions()
        return space

    def fit_directions(
        self,
        labels: Tensor,
        attributes: Sequence[str],
        *,
        method: str = "ridge",
        permutations: int = PERMUTATIONS,
    ) -> dict[str, dict[str, Any]]:
        """Fit a reader and a direction to each column of labels ``[n, a]``; returns how well.

        The direction is S c / |S c|, S the coefficients' covariance, c the reader: what changes in
        the population along with the reader's score; one standard deviation long, raising the
        label. Methods, figures and errors are ``readers.fit_readers``'s, and the answer is kept as
        ``meta["readers"]``.
        """
        if self.coefficients is None:
            raise InputError("fit_directions: this space holds no coefficients to fit to")
        attributes = list(attributes)
        labels = labels.to(self.coefficients.device, torch.float32)
        weights, report = fit_readers(
            self.coefficients, labels, attributes, method=method, permutations=permutations,
            origin=self.mu,
        )  # fmt: skip
        self.labels, self.attributes = labels, attributes
        self.classifiers = weights.to(labels.device)
        self.set_directions()
        self.meta = {**self.meta, "readers": report}
        return report

    def set_directions(self) -> None:
        """Directions of the classifiers that are there: S c / |S c|, one sd long."""
        covariance = self.covariance()
        along = self.classifiers.double() @ covariance
        unit = along / along.norm(dim=1, keepdim=True)
        sd = ((unit @ covariance) * unit).sum(1, keepdim=True).sqrt()
        self.directions = (unit * sd).float()

    @classmethod
    def from_population(
        cls,
        w: Tensor | Sequence[Tensor],
        layout: Layout,
        components: int,
        *,
        labels: Tensor | None = None,
        attributes: Sequence[str] = (),
        method: str = "ridge",
        names: Sequence[str] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        meta: dict[str, Any] | None = None,
        device: torch.device | str = "cpu",
        route: str = "auto",
        passes: int = PASSES,
        oversample: int | None = None,
    ) -> WeightSpace:
        """The space of a population w ``[n, d]``, and its directions if labels ``[n, a]`` come.

        w may be a list of shards ``[n_i, d]``: they are read block by block, on ``device``, and the
        space comes back on the CPU. route, passes and oversample: see ``components``.
        Coefficients are those of the stored (rounded) basis. Warns where the population did not
        start from one A (see ``start``), where numbers never moved, and where m > n / 3.
        """
        shards = [w] if isinstance(w, Tensor) else list(w)
        for part in shards:
            if part.ndim != 2 or part.shape[1] != layout.size or not part.is_floating_point():
                raise InputError(f"w: wanted floats [n, {layout.size}], got {list(part.shape)}")
        check_components(components, sum(map(len, shards)))
        stack, start = Stack(shards).near(device), Start(layout, device)
        known = moments(stack, names, start.add, device)
        pca = principal_components(
            Standardised(stack, known.mean, known.std, device=device), known.n, components,
            way=route, passes=passes, oversample=oversample,
        )  # fmt: skip
        mean, std = known.mean.float(), known.std.float()
        basis = pca.basis.to(dtype)
        facts = {"route": pca.route, **start.check(known.n, std)}
        space = cls(
            layout=layout,
            mean=mean.cpu(),
            std=std.cpu(),
            basis=basis.cpu(),
            coefficients=coefficients(stack, basis, mean, std).cpu(),
            names=None if names is None else list(names),
            explained=pca.explained.float().cpu(),
            meta={**(meta or {}), "fit": facts},
        )
        if labels is not None:
            space.fit_directions(labels, attributes, method=method)
        elif 3 * space.m > space.n:
            warn_of_many(space.m, space.n)
        return space

    def save(self, folder: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Write the space to ``folder``, whole or not at all. InputError if it is not empty."""
        self._check()
        tensors = {k: t for k in _SHAPES if (t := getattr(self, k)) is not None}
        with atomic_dir(folder, overwrite=overwrite) as temporary:
            write_tensors(temporary / _TENSORS, tensors)
            write_json(
                temporary / _JSON,
                {
                    "format": _FORMAT,
                    "version": _VERSION,
                    "layout": self.layout.to_json(),
                    "tensors": {k: list(t.shape) for k, t in tensors.items()},
                    "names": self.names,
                    "attributes": self.attributes,
                    "meta": self.meta,
                },
            )
            write_manifest(temporary)

    @classmethod
    def load(
        cls,
        folder_or_name: str | os.PathLike,
        *,
        mmap: bool = True,
        verify: bool = True,
        device: torch.device | str | None = None,
    ) -> WeightSpace:
        """Read a space from a folder, or by name from ``$W2W_HOME/spaces`` (~/.cache/w2w_fast).

        ``verify`` compares both files with the manifest's sha256. InputError, naming the file and
        the key, for whatever is missing, damaged, inconsistent or of another version.
        """
        folder = _folder(folder_or_name)
        if verify:
            listed = check_manifest(folder)
            for name in (_TENSORS, _JSON):
                if name not in listed:
                    raise InputError(f"{folder}: {name} is not in the manifest")
        info = read_json(folder / _JSON)
        if not isinstance(info, dict) or info.get("format") != _FORMAT:
            raise InputError(f"{folder / _JSON}: not a weight space")
        if info.get("version") != _VERSION:
            raise InputError(
                f"{folder / _JSON}: version {info.get('version')!r}, this w2w_fast reads {_VERSION}"
            )
        kinds = {"tensors": dict, "attributes": list, "names": (list, type(None)), "meta": dict}
        for key, kind in kinds.items():
            if not isinstance(info.get(key), kind):
                raise InputError(f"{folder / _JSON}: {key}: missing or of the wrong kind")
        texts = [*info["attributes"], *(info["names"] or [])]
        shapes = info["tensors"]
        if not all(isinstance(text, str) for text in texts) or not set(shapes) <= set(_SHAPES):
            raise InputError(f"{folder / _JSON}: names, attributes or tensors of the wrong kind")
        expect = {
            key: (tuple(shape), _BASIS_DTYPES if key == "basis" else {torch.float32})
            for key, shape in shapes.items()
            if isinstance(shape, list)
        }
        # Construction looks for NaN, once; two gigabytes are not looked at twice.
        tensors, _ = read_tensors(folder / _TENSORS, expect=expect, mmap=mmap, finite=False)
        layout = Layout.from_json(info.get("layout"))
        required = {key: tensors.pop(key, None) for key in ("mean", "std", "basis")}
        told = {key: info[key] for key in ("names", "attributes", "meta")}
        try:
            space = cls(layout=layout, **required, **told, **tensors)
        except InputError as error:
            raise InputError(f"{folder / _TENSORS}: {error}") from None
        return space if device is None else space.to(device)


def _folder(name: str | os.PathLike) -> Path:
    path = Path(name)
    if path.is_dir():
        return path
    home = Path(os.environ.get("W2W_HOME") or "~/.cache/w2w_fast").expanduser() / "spaces"
    if path.name == str(name) and (home / path).is_dir():
        return home / path
    raise InputError(f"space: no folder {path}, and no space of that name in {home}")
