"""The judge of the embedded world: reads attributes and identity from a picture of a face.

A small convolutional network trained on rendered photographs only, never on generated ones,
blurred and disturbed so that it reads generated pictures too. It answers with a logit for each
binary attribute, a number for each continuous one, the place, the direction of the look, whether
there is a face at all, and an embedding that is the same for all photographs of one person.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..files import read_tensors, write_tensors
from ..pictures import stack
from . import render
from .steps import fast_autocast, train_steps

EMBEDDING = 32
_HEADS = (len(render.BINARY), len(render.CONTINUOUS), len(render.PLACES), 1, 1, EMBEDDING)


@dataclass(frozen=True)
class Reading:
    """What the reader saw on n pictures."""

    binary: Tensor
    """[n, 8] probabilities, columns as `render.BINARY`."""
    continuous: Tensor
    """[n, 8] in about [0, 1], columns as `render.CONTINUOUS`."""
    place: Tensor
    """[n, 10] probabilities, columns as `render.PLACES`."""
    yaw: Tensor
    """[n] from -1 (left) to 1 (right)."""
    face: Tensor
    """[n] probability that the picture is one whole face."""
    embedding: Tensor
    """[n, 32] unit vectors; cosine similarity compares people."""

    @property
    def attributes(self) -> Tensor:
        """[n, 16], columns as `render.ATTRIBUTES`."""
        return torch.cat([self.binary, self.continuous], 1)


class Reader(nn.Module):
    """uint8 pictures [n, 3, 64, 64] to a `Reading`."""

    def __init__(self) -> None:
        super().__init__()
        widths = (32, 64, 96, 128)
        layers: list[nn.Module] = []
        before = 3
        for width in widths:
            layers += [nn.Conv2d(before, width, 3, 2, 1), nn.GroupNorm(8, width), nn.SiLU()]
            layers += [nn.Conv2d(width, width, 3, 1, 1), nn.GroupNorm(8, width), nn.SiLU()]
            before = width
        self.body = nn.Sequential(*layers)
        self.hidden = nn.Linear(before * 16, 192)
        self.head = nn.Linear(192, sum(_HEADS))

    def forward(self, unit: Tensor) -> tuple[Tensor, ...]:
        """Pictures in [-1, 1] to the raw answers, one tensor a head."""
        h = F.silu(self.hidden(self.body(unit).flatten(1)))
        return self.head(h).split(_HEADS, 1)

    @torch.no_grad()
    def read(self, images: Tensor | Sequence, batch: int = 128) -> Reading:
        """uint8 [n, 3, 64, 64], or PIL images of that size."""
        if not isinstance(images, Tensor):
            images = stack(images)
        parts = []
        for part in images.split(batch):
            binary, continuous, place, yaw, face, embedding = self(part.float() / 127.5 - 1)
            parts.append(
                (
                    binary.sigmoid(),
                    continuous,
                    place.softmax(1),
                    yaw[:, 0],
                    face[:, 0].sigmoid(),
                    F.normalize(embedding),
                )
            )
        return Reading(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def save(self, path: Path) -> None:
        tensors = {name: value.half() for name, value in self.state_dict().items()}
        write_tensors(path, tensors, {"what": "w2w_fast reader"})

    @classmethod
    def load(cls, path: Path) -> Reader:
        reader = cls().eval().requires_grad_(False)
        tensors, _ = read_tensors(path)
        reader.load_state_dict({name: value.float() for name, value in tensors.items()})
        return reader


def _disturb(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, noise and colour shifts of random strength: what generation does to a photograph."""
    x = images.float() / 127.5 - 1
    n = len(x)
    u = torch.rand(n, 4, generator=generator)
    small = F.avg_pool2d(x, 2)
    soft = F.interpolate(small, scale_factor=2.0, mode="bilinear", align_corners=False)
    x = x.lerp(soft, u[:, 0].view(n, 1, 1, 1))
    x = x + 0.12 * u[:, 1].view(n, 1, 1, 1) * torch.randn(x.shape, generator=generator)
    gain = 1 + 0.2 * (torch.rand(n, 3, 1, 1, generator=generator) - 0.5)
    return (x * gain + 0.1 * (u[:, 2].view(n, 1, 1, 1) - 0.5)).clamp(-1.1, 1.1)


def _broken(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures that are not one whole face: quarters shuffled, two people mixed, heavy noise."""
    n = len(x)
    kind = torch.randint(0, 3, (n,), generator=generator).view(n, 1, 1, 1)
    tiles = x.unflatten(3, (4, 16)).unflatten(2, (4, 16))
    order = torch.randperm(16, generator=generator)
    tiles = tiles.permute(0, 1, 2, 4, 3, 5).flatten(2, 3)[:, :, order]
    shuffled = tiles.unflatten(2, (4, 4)).permute(0, 1, 2, 4, 3, 5).flatten(4, 5).flatten(2, 3)
    mixed = 0.5 * (x + x.roll(1, 0).roll(9, 3))
    noisy = 0.25 * x + 0.6 * torch.randn(x.shape, generator=generator)
    return torch.where(kind == 0, shuffled, torch.where(kind == 1, mixed, noisy))


def train_reader(out: Path, steps: int = 900, pairs: int = 48, seed: int = 3) -> Reader:
    """Train on `pairs` people with two photographs each a step; the photographs are drawn anew."""
    torch.manual_seed(seed)
    reader = Reader().to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(2 * pairs).roll(pairs)
    checkpoint = out.with_name("training") / "reader.safetensors"
    for step, bar in train_steps(reader, steps, 2e-3, checkpoint, generator):
        persons = render.people(pairs, generator).repeat(2, 1)
        conditions = render.conditions(2 * pairs, generator)
        x = _disturb(render.render(persons, conditions), generator)
        broken = _broken(x[: pairs // 2], generator)
        with fast_autocast():
            every = reader(torch.cat([x, broken]).contiguous(memory_format=torch.channels_last))
        every = [answer.float() for answer in every]
        binary, continuous, place, yaw, _, embedding = (a[: 2 * pairs] for a in every)
        e = F.normalize(embedding)
        likeness = (e @ e.T / 0.1).fill_diagonal_(-1e4)
        is_face = (torch.arange(len(every[4])) < 2 * pairs).float()
        column = dict(zip(render.CONDITIONS, conditions.T, strict=True))
        n = len(render.BINARY)
        loss = (
            F.binary_cross_entropy_with_logits(binary, persons[:, :n])
            + 8 * F.mse_loss(continuous, persons[:, n:])
            + 0.3 * F.cross_entropy(place, column["place"].long())
            + 0.5 * F.mse_loss(yaw[:, 0], column["yaw"])
            + 0.2 * F.binary_cross_entropy_with_logits(every[4][:, 0], is_face)
            + 0.2 * F.cross_entropy(likeness, labels)
        )
        loss.backward()
        if step % 20 == 0:
            right = ((binary > 0) == (persons[:, :n] > 0.5)).float().mean()
            bar.set_postfix(loss=f"{loss:.3f}", right=f"{right:.3f}")
    reader = reader.eval().requires_grad_(False).to(memory_format=torch.contiguous_format)
    reader.save(out)
    return reader


def measure(reader: Reader, name: str) -> Callable[[Sequence], Tensor]:
    """images -> how much of an attribute each shows [n]: what `verbs.calibrate` measures.

    Log odds, within 6 either way, of an attribute of two values; the number read of any other.
    """
    if name not in render.ATTRIBUTES:
        raise InputError(f"reader: it reads {', '.join(render.ATTRIBUTES)}, not {name!r}")
    column = render.ATTRIBUTES.index(name)

    def read(images: Sequence) -> Tensor:
        seen = reader.read(images).attributes[:, column]
        return seen.logit(eps=1e-9).clamp(-6, 6) if name in render.BINARY else seen

    return read
