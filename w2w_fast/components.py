"""Principal components of a population that is never in memory, streamed from its shards.

    Z = (W - mean) / std  [n, d]        Z^T Z V = V diag(values)

``route`` chooses one of three ways to the m leading eigenvectors V:

gram        Z Z^T [n, n] in float64, a block of columns at a time, its eigenvectors U, V = Z^T U;
            exact, and the least work for up to a few thousand models
covariance  Z^T Z [d, d] in float64, where there are more models than numbers
subspace    block subspace iteration (Halko, Martinsson and Tropp, 2011): V <- orth(Z^T (Z V)), a
            pass over the rows each, in float32. A plain pass damps what is not wanted by the ratio
            of eigenvalues, which near the m-th is almost 1. So the passes are the steps of a
            Chebyshev filter (Zhou, Saad, Tiago and Chelikowsky, 2006), S = Z^T Z V - (cut / 2) V -
            (cut^2 / 16) P, P the block before V: that damps [0, cut] as plain passes do, twice as
            many of them. cut is the Ritz value in the middle of the columns more than m: it is
            below its eigenvalue, so nothing wanted is damped, and nearer to where the unwanted
            begin than the last one is. Rayleigh-Ritz ends it.

Blocks do not depend on how the population is cut into shards, so neither does a bit of the result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops, ranks
from .errors import InputError
from .linear import BLOCK_NUMBERS, inner, multiply_, orthonormalise_, spans

ROUTES = ("gram", "covariance", "subspace")
PASSES = 8
_SQUARE = 16_384  # the largest Gram matrix: 2 GiB in float64, and its eigenvectors as much again


class Stack:
    """Shards w ``[n_i, d]`` as one matrix ``[n, d]``, of which a block at a time is copied.

    rows ``[n]``: which of the shards' rows, ascending; all by default.
    """

    def __init__(self, shards: Sequence[Tensor], rows: Tensor | None = None) -> None:
        self.d = shards[0].shape[1]
        self._parts: list[tuple[Tensor, Tensor | None]] = []
        self._ends = [0]
        first = 0
        for shard in shards:
            at = None if rows is None else rows[(rows >= first) & (rows < first + len(shard))]
            self._parts.append((shard, None if at is None else at - first))
            self._ends.append(self._ends[-1] + len(shard if at is None else at))
            first += len(shard)

    def __len__(self) -> int:
        return self._ends[-1]

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop); read only: where one shard has them all, they are its own."""
        return self._block(start, stop, slice(None))

    def columns(self, start: int, stop: int) -> Tensor:
        """Columns [start, stop) of every row; read only."""
        return self._block(0, len(self), slice(start, stop))

    def _block(self, start: int, stop: int, columns: slice) -> Tensor:
        found = []
        for (shard, at), first, end in zip(self._parts, self._ends, self._ends[1:], strict=False):
            if start < end and first < stop:
                mine = slice(max(0, start - first), stop - first)
                found.append(shard[mine, columns] if at is None else shard[:, columns][at[mine]])
        return torch.cat(found) if len(found) > 1 else found[0]

    def near(self, device: torch.device | str) -> Stack:
        """Itself, or its copy in a GPU's memory, where that takes half of what is free at most."""
        device = torch.device(device)
        if device.type != "cuda" or 8 * len(self) * self.d > torch.cuda.mem_get_info(device)[0]:
            return self
        w = torch.empty(len(self), self.d, device=device)
        for start, stop in self.spans():
            w[start:stop] = self.rows(start, stop)
        return Stack([w])

    def spans(self) -> list[tuple[int, int]]:
        """The blocks of rows to go through it by."""
        return _blocks(len(self), self.d)


def _blocks(length: int, other: int) -> list[tuple[int, int]]:
    """Blocks of a side of a matrix, as large as memory likes, and eight at least to be shared."""
    return spans(length, min(BLOCK_NUMBERS // other, -(-length // 8)))


@dataclass(frozen=True)
class Moments:
    """n, mean ``[d]`` and squares ``[d]`` (of the distances from the mean, summed), float64."""

    n: int
    mean: Tensor
    squares: Tensor

    def __add__(self, other: Moments) -> Moments:
        """Those of both together (Chan, Golub and LeVeque, 1983)."""
        n, apart = self.n + other.n, other.mean - self.mean
        if n == 0:
            return self
        squares = self.squares + other.squares + apart.square() * (self.n * other.n / n)
        return Moments(n, self.mean + apart * (other.n / n), squares)

    @property
    def std(self) -> Tensor:
        """Standard deviations ``[d]``; 0, of a coordinate that never moved, where at most 1e-7 of
        the mean: that is float32's rounding."""
        std = (self.squares / max(1, self.n)).sqrt()
        return std.masked_fill(std <= (1e-7 * self.mean.abs()).clamp_min(1e-30), 0)


def moments(
    stack: Stack,
    names: Sequence[str] | None = None,
    watch: Callable[[Tensor], None] | None = None,
    device: torch.device | str = "cpu",
) -> Moments:
    """The moments of all rows in one pass; ``watch`` sees this rank's blocks on the way.

    InputError, naming the person, for a row that is not finite.
    """
    nothing = torch.zeros(stack.d, dtype=torch.float64, device=device)
    found, problem = Moments(0, nothing, nothing), None
    for start, stop in ranks.share(stack.spans()):
        w = stack.rows(start, stop).to(device)
        x = w.double()
        mean = x.mean(0)
        if problem is None and not bool(mean.isfinite().all()):
            i = start + int((~x.isfinite().all(1)).nonzero()[0])
            who = f"model {i}" if names is None else names[i]
            problem = f"w: {who} holds NaN or infinite numbers"
        found = found + Moments(len(x), mean, x.sub_(mean).square_().sum(0))
        if watch is not None:
            watch(w)
    ranks.agree(problem)
    # The same formula over the ranks, all at once.
    n = int(ranks.total(torch.tensor(found.n, device=device)))
    mean = ranks.total(found.mean * (found.n / n))
    squares = found.squares + found.n * (found.mean - mean).square()
    return Moments(n, mean, ranks.total(squares))


class Standardised:
    """Z ``[n + k, d]``: (w - mean) / std of a stack, and k rows that are standardised already."""

    def __init__(
        self,
        stack: Stack,
        mean: Tensor,
        std: Tensor,
        others: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.d, self.device, self._stack = stack.d, torch.device(device), stack
        self.mean = mean.to(device)
        self.gain = torch.where(std > 0, 1 / std, 0).to(device)
        # The mean in two float32 halves: what is subtracted is float64's to the last bit of w.
        self._high = self.mean.float()
        self._low = (self.mean - self._high).float()
        self._others = torch.empty(0, self.d) if others is None else others

    def __len__(self) -> int:
        return len(self._stack) + len(self._others)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop), float32."""
        n, parts = len(self._stack), []
        if start < n:
            w = self._stack.rows(start, min(stop, n)).to(self.device, torch.float32)
            parts.append(torch.sub(w, self._high).sub_(self._low).mul_(self.gain.float()))
        if stop > n:
            parts.append(self._others[max(0, start - n) : stop - n].to(self.device))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def columns(self, start: int, stop: int) -> Tensor:
        """Columns [start, stop) of every row, float64."""
        w = self._stack.columns(start, stop).to(self.device).double()
        w = (w - self.mean[start:stop]).mul_(self.gain[start:stop])
        others = self._others[:, start:stop].to(w)
        return torch.cat([w, others]) if len(others) else w


@dataclass(frozen=True)
class Components:
    """basis ``[d, m]`` float32, orthonormal; explained ``[m]`` float64; the route taken."""

    basis: Tensor
    explained: Tensor
    route: str


def check_components(m: int, n: int) -> None:
    """InputError unless n models can have m components."""
    if not 1 <= m <= n - 1:
        raise InputError(f"components: wanted 1 to n - 1 = {n - 1} for {n} models, got {m}")


def work(
    way: str, n: int, d: int, m: int, passes: int = PASSES, oversample: int | None = None
) -> float:
    """Multiplications and additions of a route to m components of ``[n, d]``, in float32's.

    Float64 is taken as two of them, an eigen-decomposition of n x n as 30 n^3, which is what
    libraries take for it.
    """
    if way == "gram":
        return 2 * n * n * d + 2 * n * d * m + 30 * n**3
    if way == "covariance":
        return 4 * n * d * d + 30 * d**3
    width = _width(n, d, m, oversample)
    return (4 * passes + 2) * n * d * width + 12 * (passes + 1) * d * width**2


def route(n: int, d: int, m: int, passes: int = PASSES, oversample: int | None = None) -> str:
    """The way to m components of ``[n, d]`` of the least work, as far as its matrix fits."""
    exact = "gram" if n <= d else "covariance"
    sizes = (n, d, m, passes, oversample)
    if min(n, d) <= _SQUARE and work(exact, *sizes) <= work("subspace", *sizes):
        return exact
    return "subspace"


def principal_components(
    z: Standardised,
    n: int,
    m: int,
    *,
    way: str = "auto",
    passes: int = PASSES,
    oversample: int | None = None,
    at_most: bool = False,
    seed: int = 0,
) -> Components:
    """PCA: the m leading right singular vectors of z, standardised by the moments of n models.

    Each column's largest entry is positive, which fixes the signs. ``way`` is a route, or auto;
    passes and oversample (columns more than m; a quarter of m, and 32, by default) are those of
    ``subspace``, which starts from normal numbers of ``seed``. InputError for more components than
    the population spans, or, ``at_most``, as many as it does.
    """
    check_components(1 if at_most else m, n)
    if way not in ("auto", *ROUTES):
        raise InputError(f"route: wanted auto, {', '.join(ROUTES)}, got {way!r}")
    if passes < 1 or (oversample is not None and oversample < 0):
        raise InputError(f"passes, oversample: wanted 1 and 0 at least, got {passes}, {oversample}")
    wanted, m = m, min(m, len(z), z.d)
    chosen = route(len(z), z.d, m, passes, oversample) if way == "auto" else way
    if chosen == "gram":
        values, basis = _gram(z, m)
    elif chosen == "covariance":
        values, basis = _covariance(z, m)
    else:
        values, basis = _subspace(z, m, passes, _width(len(z), z.d, m, oversample), seed)
    rank = int((values > 1e-12 * values[0]).sum()) if values[0] > 0 else 0
    if rank == 0 or (wanted > rank and not at_most):
        raise InputError(f"components: the population spans {rank} dimensions, got {wanted}")
    basis = basis[:, :rank]
    orthonormalise_(basis)
    basis[z.gain == 0] = 0
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    basis *= largest.sign()
    # Every coordinate that moves has variance 1: the trace is known without being summed.
    moving = int((z.gain > 0).sum())
    return Components(basis, values[:rank] / (n * moving), chosen)


def coefficients(stack: Stack, basis: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """c ``[n, m]`` float32 of a stack in a basis, on its device."""
    out = torch.zeros(len(stack), basis.shape[1], device=basis.device)
    for start, stop in ranks.share(stack.spans()):
        w = stack.rows(start, stop).to(basis.device)
        out[start:stop] = ops.project(w, basis, mean, std)
    return ranks.total(out)


def _width(n: int, d: int, m: int, oversample: int | None) -> int:
    return min(n, d, m + (max(32, m // 4) if oversample is None else oversample))


def _top(square: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The m largest eigenvalues, falling, and their vectors."""
    values, vectors = torch.linalg.eigh(square)
    # Of a pair of signs that is free, another rank's library may take the other.
    return values.flip(0)[:m].clamp_min(0), ranks.same(vectors.flip(1)[:, :m].contiguous())


@contextlib.contextmanager
def _tensor_cores(device: torch.device) -> Iterator[None]:
    """TF32 on a GPU, for the passes: factors of 11 bits, sums in float32. Their rounding turns the
    components as noise of a two-thousandth in the numbers would; Rayleigh-Ritz is in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _gram(z: Standardised, m: int) -> tuple[Tensor, Tensor]:
    n = len(z)
    square = torch.zeros(n, n, dtype=torch.float64, device=z.device)
    blocks = ranks.share(_blocks(z.d, n))
    for start, stop in blocks:
        part = z.columns(start, stop)
        for a, b in spans(n, max(512, -(-n // 8))):  # the lower triangle: all that eigh reads
            square[a:b, :b].addmm_(part[a:b], part[:b].mT)
    values, vectors = _top(ranks.total(square), m)
    weights = vectors * values.clamp_min(1e-300).rsqrt()
    basis = torch.zeros(z.d, m, device=z.device)
    for start, stop in blocks:
        basis[start:stop] = z.columns(start, stop).float().mT @ weights.float()
    return values, ranks.total(basis)


def _covariance(z: Standardised, m: int) -> tuple[Tensor, Tensor]:
    square = torch.zeros(z.d, z.d, dtype=torch.float64, device=z.device)
    for start, stop in ranks.share(_blocks(len(z), z.d)):
        part = z.rows(start, stop).double()
        square.addmm_(part.mT, part)
    values, vectors = _top(ranks.total(square), m)
    return values, vectors.float().contiguous()


def _subspace(z: Standardised, m: int, passes: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    blocks = ranks.share(_blocks(len(z), z.d))
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(z.d, width, generator=generator).to(z.device)
    basis[z.gain == 0] = 0
    orthonormalise_(basis, rounds=1)
    before, cut = torch.zeros_like(basis), 0.0
    with _tensor_cores(z.device):
        for i in range(passes):
            product = torch.zeros_like(basis)
            for start, stop in blocks:
                part = z.rows(start, stop)
                product.addmm_(part.mT, part @ basis)
            ranks.total(product)
            if i:
                ritz = torch.linalg.eigvalsh(inner(basis, product))
                cut = float(ritz[(width - m) // 2].clamp_min(0))
            before.mul_(-(cut**2) / 16).add_(basis, alpha=-cut / 2).add_(product)
            basis, before = before, basis
            orthonormalise_(basis, before, rounds=1)
            del product
    orthonormalise_(basis)
    square = torch.zeros(width, width, dtype=torch.float64, device=z.device)
    for start, stop in blocks:
        part = (z.rows(start, stop) @ basis).double()
        square.addmm_(part.mT, part)
    values, vectors = _top(ranks.total(square), m)
    return values, multiply_(basis, vectors)
