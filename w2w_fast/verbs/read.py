"""`read`: who an adapter is, told by a space: attributes, distance, neighbours; one or a folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..attributes import check_known, read_attributes
from ..coefficients import FORMAT, read_coefficients
from ..errors import InputError
from ..files import read_tensors
from ..formats import for_space, read_adapter
from ..pictures import scatter
from ..population import RECORD, open_population
from ..sources import natural
from ..space import WeightSpace
from ..whereabouts import outside, whereabouts

if TYPE_CHECKING:
    from pyarrow import Table


def read(space: WeightSpace, people: Tensor | str | Path | Sequence[str | Path]) -> list[dict]:
    """What the space says of each person: a dict with

    name, source; distance, rms and, where the space holds its people, farther, nearest, closer,
    copy (see ``whereabouts``); outside: the share of the adapter that is in none of the components
    (see there; None for coefficients, which are all inside); attributes: name -> {"probability"},
    or {"value", "low", "high"} where nine in ten of such people lie between (see ``attributes``).

    people: coefficients [k, m], or paths: LoRA files of any format, PEFT folders, populations,
    files of coefficients, and folders of these files. A file of a folder that does not fit has a
    "reason" and nothing else; one that was named raises InputError, as does a folder in which
    nothing fits.
    """
    if isinstance(people, Tensor):
        if people.ndim != 2 or people.shape[1] != space.m:
            raise InputError(f"people: wanted [k, {space.m}], got {list(people.shape)}")
        names = [f"row {i}" for i in range(len(people))]
        found: list[Found | dict] = [Found("", names, people, [None] * len(names))]
    else:
        paths = [people] if isinstance(people, (str, Path)) else people
        found = [one for path in paths for one in _at(space, Path(path))]
    told = iter(_facts(space, [one for one in found if isinstance(one, Found)]))
    facts = ([one] if isinstance(one, dict) else [next(told) for _ in one.names] for one in found)
    return [fact for some in facts for fact in some]


def coordinates(space: WeightSpace, people: Tensor) -> Tensor:
    """Where people [k, m] are on the map: their first two coefficients, in sd of the population."""
    c = (people.to(space.mu) - space.mu)[:, :2] / space.sigma[:2].clamp_min(1e-12)
    return torch.nn.functional.pad(c, (0, 2 - c.shape[1]))


def draw_map(space: WeightSpace, facts: Sequence[dict], path: Path, shade: str = "") -> None:
    """A picture of where people are among those of the space, on its first two components.

    shade: an attribute whose labels shade the population.
    """
    crowd, shades = [], None
    if shade:
        check_known(space, shade)
        if space.labels is None:
            raise InputError(f"map: this space holds no labels to shade its people by {shade}")
        shades = space.labels[:, space.attributes.index(shade)].tolist()
    if space.coefficients is not None:
        crowd = coordinates(space, space.coefficients).tolist()
    points = [fact["map"] for fact in facts if "map" in fact]
    labels = [fact["name"] for fact in facts if "map" in fact]
    axes = ["component 1", "component 2"]
    if space.explained is not None:
        shares = space.explained[:2].tolist()
        axes[: len(shares)] = [f"component {i + 1}, {share:.1%} of the variance"
                               for i, share in enumerate(shares)]  # fmt: skip
    scatter(path, crowd, points, labels, axes, shades, shade)


def as_table(facts: Sequence[dict]) -> Table:
    """Facts as a table, a row each: the nearest person and likeness, and columns an attribute.

    beard: the probability; age, age_low, age_high: the value and nine in ten of such people.
    """
    import pyarrow as pa

    plain = ("name", "source", "reason", "outside", "distance", "rms", "farther", "closer", "copy")
    rows = []
    for fact in facts:
        row = {key: fact.get(key) for key in plain}
        nearest = fact.get("nearest") or [(None, None)]
        row["nearest"], row["likeness"] = nearest[0]
        for name, found in fact.get("attributes", {}).items():
            for key, value in found.items():
                row[name if key in ("probability", "value") else f"{name}_{key}"] = value
        rows.append(row)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return pa.table({key: [row.get(key) for row in rows] for key in columns})


class Found(NamedTuple):
    """People of one source: c [k, m], and how much of each adapter is outside."""

    source: str
    names: list[str]
    c: Tensor
    outside: list[float | None]


def _facts(space: WeightSpace, found: Sequence[Found]) -> list[dict]:
    """Of everybody at once: what is known of the population is worked out once."""
    c = torch.cat([one.c.to(space.mu) for one in found] or [space.mu[None, :][:0]])
    told, shown, where = whereabouts(space, c), read_attributes(space, c), coordinates(space, c)
    whose = [
        {"name": name, "source": one.source, "outside": outside}
        for one in found
        for name, outside in zip(one.names, one.outside, strict=True)
    ]
    return [
        {
            **person,
            "map": where[i].tolist(),
            **about,
            "attributes": {
                attribute: {key: float(column[i]) for key, column in columns.items()}
                for attribute, columns in shown.items()
            },
        }
        for i, (person, about) in enumerate(zip(whose, told, strict=True))
    ]


def _at(space: WeightSpace, path: Path) -> Iterator[Found | dict]:
    if path.is_dir() and (path / RECORD).is_file():
        people = open_population(path)
        if people.layout != space.layout:
            raise InputError(f"{path}: a population of another layout than the space's")
        names = iter(people.names)
        for w in people.shards:
            c = space.project(w.to(space.mean))
            mine = [next(names) for _ in range(len(w))]
            yield Found(str(path), mine, c, outside(space, w, c).tolist())
    elif path.is_dir() and not (path / "adapter_config.json").is_file():
        yield from _folder(space, path)
    else:
        yield load(space, path)


def _folder(space: WeightSpace, path: Path) -> list[Found | dict]:
    found: list[Found | dict] = []
    for item in sorted(path.iterdir(), key=lambda p: natural(p.name)):
        peft = item.is_dir() and (item / "adapter_config.json").is_file()
        if not peft and (item.is_dir() or item.suffix != ".safetensors"):
            continue
        try:
            found.append(load(space, item))
        except InputError as error:
            found.append({"name": item.name, "source": str(item), "reason": str(error)})
    reasons = [one["reason"] for one in found if isinstance(one, dict)]
    if len(reasons) == len(found):
        first = f"; the first: {reasons[0]}" if reasons else ""
        raise InputError(f"{path}: no adapter or coefficients of this space in it{first}")
    return found


def load(space: WeightSpace, path: Path) -> Found:
    """The people of a file of coefficients, or the one of a LoRA."""
    if path.is_file() and read_tensors(path)[1].get("format") == FORMAT:
        c = read_coefficients(path, space.m)
        names = [path.stem] if len(c) == 1 else [f"{path.stem}:{i}" for i in range(len(c))]
        return Found(str(path), names, c, [None] * len(c))
    adapter = read_adapter(path)
    try:
        w = for_space(adapter, space).to(space.mean)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    c = space.project(w)
    return Found(str(path), [path.stem], c, outside(space, w, c).tolist())


def lines(space: WeightSpace, fact: dict[str, Any]) -> Iterator[str]:
    """What ``w2w read`` says of a person."""
    if "reason" in fact:
        yield f"{fact['name']}: not read: {fact['reason']}"
        return
    yield fact["name"]
    if fact["outside"] is not None:
        usual = ""
        if space.explained is not None:
            usual = f" ({1 - float(space.explained.sum()):.0%} of the space's own people's)"
        yield f"  {fact['outside']:.0%} of the adapter is outside the space's components{usual}"
    far = f"  {fact['distance']:.1f} from the mean, {fact['rms']:.2f} sd a component"
    if "nearest" in fact:
        yield f"{far}; {fact['farther']:.0%} of the population lie farther out"
        near = ", ".join(f"{name} ({cosine:.2f})" for name, cosine in fact["nearest"])
        yield f"  nearest, by cosine: {near}{' - a copy?' if fact['copy'] else ''}"
    else:
        yield far
    shown = []
    for name, found in fact["attributes"].items():
        if "probability" in found:
            shown.append(f"{name} {found['probability']:.0%}")
        else:
            shown.append(f"{name} {found['value']:.2g} ({found['low']:.2g} to {found['high']:.2g})")
    if shown:
        yield f"  {', '.join(shown)}"
