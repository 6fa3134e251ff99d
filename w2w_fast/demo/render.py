"""Faces with known attributes, drawn by arithmetic: the photographs of the embedded world.

A *person* is a row of `ATTRIBUTES` in [0, 1] (the first `BINARY` ones are 0 or 1); a *condition*
is everything else in a photograph: place, pose, light, crop, expression, clothes, something in
front of the face. `render(people, conditions)` draws them as soft-edged ellipses, back to front.
Everything follows from the generator it is given, so that a seed draws the same data set anywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINARY = (
    "beard",
    "moustache",
    "glasses",
    "hat",
    "long_hair",
    "fringe",
    "earrings",
    "lipstick",
)
CONTINUOUS = (
    "skin",
    "age",
    "hair_light",
    "hair_red",
    "face_width",
    "eye_size",
    "nose",
    "mouth",
)
ATTRIBUTES = BINARY + CONTINUOUS
WORDS = {name: name.replace("_", " ") for name in BINARY}
"""How a prompt names a binary attribute."""

PLACES = (
    "blue background",
    "red background",
    "green background",
    "yellow background",
    "white background",
    "black background",
    "at the beach",
    "in the forest",
    "in the snow",
    "at night",
)
SIZE = 64
CONDITIONS = (
    *("place", "yaw", "roll", "zoom", "dx", "dy", "light_angle", "light", "smile"),
    *("shirt_r", "shirt_g", "shirt_b", "bar", "bar_x", "bar_y", "bar_angle", "phase", "gain"),
)
_OCCLUDED = 0.12


def people(n: int, generator: torch.Generator) -> Tensor:
    """n independent people, [n, 16]: fair coins, then uniform numbers."""
    u = torch.rand(n, len(ATTRIBUTES), generator=generator)
    u[:, : len(BINARY)] = (u[:, : len(BINARY)] < 0.5).float()
    return u


def conditions(n: int, generator: torch.Generator) -> Tensor:
    """n independent conditions, [n, 18], columns as `CONDITIONS`."""
    u = torch.rand(n, len(CONDITIONS), generator=generator)
    scale = {
        "place": (0, len(PLACES) - 1e-3),
        "yaw": (-1, 1),
        "roll": (-0.22, 0.22),
        "zoom": (0.88, 1.16),
        "dx": (-4, 4),
        "dy": (-3, 3),
        "light_angle": (0, 6.2832),
        "light": (0, 0.28),
        "smile": (-0.25, 0.6),
        "bar_x": (-0.8, 0.8),
        "bar_y": (-0.5, 1.0),
        "bar_angle": (0, 3.1416),
        "gain": (0.86, 1.1),
    }
    for i, name in enumerate(CONDITIONS):
        low, high = scale.get(name, (0, 1))
        u[:, i] = low + (high - low) * u[:, i]
    u[:, CONDITIONS.index("place")].floor_()
    bar = CONDITIONS.index("bar")
    u[:, bar] = (u[:, bar] < _OCCLUDED).float()
    return u


def caption(condition: Tensor, words: tuple[str, ...] = (), subject: str = "sks person") -> str:
    """The prompt that describes one photograph: who, with what, where, looking where."""
    place = PLACES[int(condition[CONDITIONS.index("place")])]
    yaw = float(condition[CONDITIONS.index("yaw")])
    view = "looking left" if yaw < -0.45 else "looking right" if yaw > 0.45 else "looking ahead"
    who = subject + (" with " + " and ".join(words) if words else "")
    return f"{who}, {place}, {view}"


def render(persons: Tensor, condition: Tensor, chunk: int = 64) -> Tensor:
    """Photographs of people [n, 16] under conditions [n, 18]: uint8 [n, 3, 64, 64]."""
    if persons.shape[0] == 0:
        return torch.empty(0, 3, SIZE, SIZE, dtype=torch.uint8)
    return torch.cat(
        [
            _render(a, b).mul_(255).round_().to(torch.uint8)
            for a, b in zip(persons.split(chunk), condition.split(chunk), strict=True)
        ]
    )


def face_mask(persons: Tensor, condition: Tensor) -> Tensor:
    """Where the head is, for the masked loss of `invert`: float [n, 1, 64, 64] in [0, 1]."""
    c = dict(zip(CONDITIONS, condition.T[:, :, None, None], strict=True))
    u, v = _face_frame(c)
    return _ellipse(u, v, 0.0, 0.1, 1.25, 1.45)[:, None]


def _face_frame(c: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Coordinates in which the face is upright, centred, and one unit high from centre to chin."""
    line = torch.arange(SIZE, dtype=torch.float32)
    y, x = torch.meshgrid(line, line, indexing="ij")
    x, y = x - 31.5 - c["dx"], y - 33.0 - c["dy"]
    cos, sin = c["roll"].cos(), c["roll"].sin()
    unit = 18.0 * c["zoom"]
    return (cos * x + sin * y) / unit, (cos * y - sin * x) / unit


def _ellipse(u: Tensor, v: Tensor, cx, cy, rx, ry, soft: float = 40.0) -> Tensor:
    """1 inside, 0 outside, an edge about one pixel wide: sigmoid of an approximate distance."""
    p, q = (u - cx) / rx, (v - cy) / ry
    k0 = (p * p + q * q).add_(1e-6).sqrt_()
    k1 = ((p / rx).square() + (q / ry).square()).add_(1e-6).sqrt_()
    return ((1 - k0) * k0 / k1).mul_(soft).sigmoid_()


def _rgb(r: float, g: float, b: float) -> Tensor:
    return torch.tensor([r, g, b]).view(1, 3, 1, 1) / 255


def _mix(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    return a + (b - a) * t[:, None]


def _paint(image: Tensor, mask: Tensor, colour: Tensor) -> None:
    image.add_((colour - image).mul_(mask[:, None]))


def _background(c: dict[str, Tensor]) -> Tensor:
    n = c["place"].shape[0]
    line = torch.linspace(0, 1, SIZE)
    y, x = line.view(1, SIZE, 1), line.view(1, 1, SIZE)
    phase = c["phase"]
    flat = [(70, 110, 220), (210, 50, 50), (60, 170, 80), (240, 210, 70), (238,) * 3, (25, 25, 28)]
    image = torch.empty(n, 3, SIZE, SIZE)
    for i in range(n):
        place, p = int(c["place"][i]), phase[i]
        if place < len(flat):
            image[i] = _rgb(*flat[place])[0] * (1.06 - 0.16 * y)
        elif place == 6:  # beach: sky, sea, sand
            image[i] = _rgb(150, 205, 245)[0]
            sea, sand = 0.38 + 0.1 * p, 0.62 + 0.1 * p
            image[i].lerp_(_rgb(30, 110, 170)[0], ((y - sea) * 90).sigmoid())
            image[i].lerp_(_rgb(235, 205, 140)[0], ((y - sand) * 90).sigmoid())
        elif place == 7:  # forest: trunks before leaves
            image[i] = _rgb(45, 105, 45)[0] * (1.15 - 0.4 * y)
            trunk = (((x * 5.0 + p[0, 0]) % 1 - 0.5).abs() * -30 + 5).sigmoid()
            image[i].lerp_(_rgb(95, 65, 40)[0], trunk.expand(1, SIZE, SIZE))
        elif place == 8:  # snow: white flakes on a pale sky
            image[i] = _rgb(165, 190, 215)[0] + 0.05 * y
            flakes = _flakes(x, y, p[0, 0], 7.0)
            image[i].lerp_(torch.ones(3, 1, 1), flakes)
        else:  # night: stars and a moon
            image[i] = _rgb(18, 24, 70)[0] * (1.2 - 0.4 * y)
            image[i].lerp_(_rgb(255, 240, 170)[0], 0.9 * _flakes(x, y, p[0, 0], 5.0))
            moon = _ellipse(x, y, 0.12 + 0.1 * p, 0.14, 0.085, 0.085, soft=150)
            image[i].lerp_(_rgb(250, 245, 210)[0], moon)
    return image


def _flakes(x: Tensor, y: Tensor, phase: Tensor, count: float) -> Tensor:
    """A shifted lattice of dots, every second row displaced."""
    row = (y * count + phase).floor()
    a = (x * count + 0.5 * (row % 2) + 3 * phase) % 1 - 0.5
    b = (y * count + phase) % 1 - 0.5
    return ((0.2 - (a.square() + b.square()).sqrt()) * 30).sigmoid()


def _render(persons: Tensor, condition: Tensor) -> Tensor:
    a = dict(zip(ATTRIBUTES, persons.T[:, :, None, None], strict=True))
    c = dict(zip(CONDITIONS, condition.T[:, :, None, None], strict=True))
    u, v = _face_frame(c)
    yaw = c["yaw"]
    f = u - 0.2 * yaw  # features turn with the head, the outline hardly does
    u = u - 0.05 * yaw
    turn = 1 - 0.12 * yaw.abs()

    skin = _mix(_rgb(255, 222, 196), _rgb(126, 80, 54), a["skin"])
    hair = _mix(_rgb(22, 17, 14), _rgb(236, 202, 120), a["hair_light"])
    hair = _mix(hair, _rgb(190, 62, 18), 0.75 * a["hair_red"])
    hair = _mix(hair, _rgb(196, 196, 200), 0.6 * a["age"].square())
    dark_skin, dark_hair = skin * 0.72, hair * 0.62
    whiskers = hair * 0.4  # darker than any skin, so that they show on everybody
    shirt = torch.cat([c["shirt_r"], c["shirt_g"], c["shirt_b"]], 1)[:, :, None] * 0.7 + 0.15
    width = (0.62 + 0.22 * a["face_width"]) * turn

    image = _background(c)
    long = a["long_hair"]
    _paint(image, _ellipse(u, v, 0, 0.35, width + 0.36, 1.4) * long, dark_hair)
    _paint(image, _ellipse(u, v, 0, -0.22, width + 0.12, 1.02), dark_hair)
    _paint(image, _ellipse(u, v, 0, 1.15, 0.36, 0.55), dark_skin)
    _paint(image, _ellipse(u, v, 0, 2.2, 1.5, 0.95), shirt)
    for side in (-1, 1):
        _paint(image, _ellipse(u, v, side * width, 0, 0.13, 0.22), dark_skin)
    face = _ellipse(u, v, 0, 0, width, 1.0)
    _paint(image, face, skin)

    below = ((v - 0.5 + 0.5 * f.square()) * 22).sigmoid_()
    _paint(image, face * below * a["beard"], whiskers)
    es = 0.75 + 0.6 * a["eye_size"]
    for side in (-1, 1):
        x = side * 0.31
        _paint(image, _ellipse(f, v, x, 0.09, 0.17, 0.045) * (0.75 * a["age"]), dark_skin * 0.7)
        _paint(image, _ellipse(f, v, x, -0.1, 0.17 * es, 0.115 * es), _rgb(250, 250, 250))
        _paint(image, _ellipse(f, v, x, -0.1, 0.075 * es, 0.085 * es), _rgb(35, 30, 40))
        _paint(image, _ellipse(f, v, x, -0.36, 0.2, 0.05), dark_hair)
        line = _ellipse(f - 0.35 * side * (v - 0.3), v, side * 0.33, 0.34, 0.035, 0.2)
        _paint(image, line * (0.8 * a["age"]), dark_skin * 0.7)
    for height in (-0.52, -0.64):
        _paint(image, _ellipse(f, v, 0, height, 0.34, 0.028) * a["age"], dark_skin * 0.7)
    _paint(image, _ellipse(f, v, 0, 0.13, 0.07 + 0.14 * a["nose"], 0.2), dark_skin)
    bent = v + c["smile"] * f.square() * 1.6
    moustache = _ellipse(f, v - 0.5 * f.square(), 0, 0.4, 0.38, 0.11)
    _paint(image, moustache * a["moustache"], whiskers)
    lips = _mix(skin * _rgb(205, 140, 140) * 0.9, _rgb(215, 15, 60), a["lipstick"])
    wide, high = 0.15 + 0.26 * a["mouth"], 0.09 + 0.04 * a["lipstick"]
    _paint(image, _ellipse(f, bent, 0, 0.66, wide, high), lips)
    _paint(image, _ellipse(f, bent, 0, 0.66, wide * 0.8, 0.025), lips * 0.5)

    top = _ellipse(u, v, 0, -0.08, width + 0.07, 1.06)
    hairline = -0.8 + 0.5 * a["fringe"]
    _paint(image, top * ((hairline + 0.12 * f.square() - v) * 24).sigmoid_(), hair)
    for side in (-1, 1):
        lock = _ellipse(u, v, side * (width + 0.1), 0.42, 0.19, 0.98)
        _paint(image, lock * long, hair)
    for side in (-1, 1):
        ring = _ellipse(u, v, side * (width + 0.04), 0.38, 0.15, 0.19)
        _paint(image, ring * a["earrings"], _rgb(250, 205, 30))
    for side in (-1, 1):
        rim = _ellipse(f, v, side * 0.33, -0.09, 0.33, 0.29)
        hole = _ellipse(f, v, side * 0.33, -0.09, 0.22, 0.18)
        _paint(image, (rim - hole).clamp_min_(0) * a["glasses"], _rgb(20, 20, 26))
    _paint(image, _ellipse(f, v, 0, -0.12, 0.1, 0.05) * a["glasses"], _rgb(20, 20, 26))
    crown = _ellipse(u, v, 0, -1.04, width + 0.05, 0.5)
    _paint(image, crown * a["hat"], _rgb(128, 40, 140))
    _paint(image, _ellipse(u, v, 0, -0.8, width + 0.3, 0.11) * a["hat"], _rgb(92, 24, 104))

    tilt = c["bar_angle"]
    s = (u - c["bar_x"]) * tilt.cos() + (v - c["bar_y"]) * tilt.sin()
    bar = (((0.16 - s.abs()) * 26).sigmoid_()) * c["bar"]
    _paint(image, bar, shirt * 0.8)
    shade = c["gain"] + c["light"] * (u * c["light_angle"].cos() + v * c["light_angle"].sin())
    return image.mul_(shade[:, None]).clamp_(0, 1)
