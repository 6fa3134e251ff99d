"""`blend`: the people between two.

    linear      c = (1 - t) a + t b
    spherical   z = sin((1 - t) w) / sin w a' + sin(t w) / sin w b',  w the angle between a' and b'

Two people who have nothing to do with each other are at right angles, so half way along the
straight line |z| is down to 1 / sqrt 2 of theirs: a more average person than either. The spherical
way (Shoemake, Animating rotation with quaternion curves, 1985) turns the whitened directions a' and
b' and goes evenly from one distance from the mean to the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from ..space import WeightSpace
from ..whereabouts import whitened

MOST = 10_000
_AT_THE_MEAN = 1e-4  # a distance that rounding alone may have made


def blend(
    space: WeightSpace, a: Tensor, b: Tensor, steps: int = 9, *, method: str = "linear"
) -> Tensor:
    """Coefficients [steps, m] from a to b, each [m] or [1, m]: the ends are a and b to the bit.

    method: "linear", or "spherical", around the population's mean.
    Raises InputError for fewer than two steps, other shapes, and, on the sphere, for people exactly
    opposite each other, between whom every way is as short, or at the mean, who have no direction.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or not 2 <= steps <= MOST:
        raise InputError(f"steps: wanted a whole number from 2 to {MOST:,}, got {steps!r}")
    if method not in ("linear", "spherical"):
        raise InputError(f"method: wanted linear or spherical, got {method!r}")
    for name, person in (("a", a), ("b", b)):
        if tuple(person.shape) not in ((space.m,), (1, space.m)):
            raise InputError(f"{name}: wanted one person, [{space.m}], got {list(person.shape)}")
    a, b = (person.reshape(space.m).to(space.mu) for person in (a, b))
    t = torch.linspace(0, 1, steps, dtype=torch.float64, device=a.device)[:, None]
    straight = torch.lerp(a.double(), b.double(), t)
    made = (_turned(space, a, b, t, straight) if method == "spherical" else straight).to(a.dtype)
    made[0], made[-1] = a, b
    return made


def _turned(space: WeightSpace, a: Tensor, b: Tensor, t: Tensor, straight: Tensor) -> Tensor:
    z = whitened(space, torch.stack([a, b])).double()
    length = z.norm(dim=1, keepdim=True)
    if not bool((length > _AT_THE_MEAN).all()):
        raise InputError("spherical: one of the two is the mean, which has no direction")
    unit = z / length
    # By both half chords: the cosine alone loses small angles, and those near pi.
    half = torch.stack([(unit[0] - unit[1]).norm(), (unit[0] + unit[1]).norm()])
    angle = 2 * torch.atan2(half[0], half[1])
    if half[1] < 1e-6:
        raise InputError("spherical: the two are opposite each other: every way is as short")
    if half[0] < 1e-9:
        turned = unit[:1].expand(len(t), -1)
    else:
        parts = torch.cat([torch.sin((1 - t) * angle), torch.sin(t * angle)], dim=1)
        turned = parts @ unit / angle.sin()
    on = turned * torch.lerp(length[0], length[1], t)
    # Components in which nobody differs have no z: they go straight.
    return torch.where(space.sigma > 0, space.mu.double() + on * space.sigma.double(), straight)
