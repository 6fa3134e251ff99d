"""Attributes of people, read from their coefficients by a space's linear readers.

    score_j = (c - mu) . classifier_j

A score means what it meant for people whom the reader had not seen: `fit` keeps that as
``calibration`` in ``meta["readers"]``. So a reading comes with its doubt: for an attribute of two
values the probability of the greater one, for any other its value and an interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .errors import InputError
from .readers import calibrations
from .space import WeightSpace

_NINETY = 1.6449  # standard deviations, both sides of a Gaussian's middle 90%


@dataclass(frozen=True)
class Attribute:
    """One attribute of a space: its row of classifiers and what scores mean, in its label's units.

    low, high: of the labels. label (i, s): a score x says i + s x, in log odds of ``high`` for
    labels of two values (sd None), give or take sd for others. score (i, s): people of label y
    have the score i + s y on average.
    """

    name: str
    row: int
    low: float
    high: float
    label: tuple[float, float]
    score: tuple[float, float]
    sd: float | None

    @property
    def binary(self) -> bool:
        return self.sd is None

    def read(self, score: Tensor) -> Tensor:
        """Scores -> probabilities of ``high`` (binary), or labels."""
        value = self.label[0] + self.label[1] * score
        return value.sigmoid() if self.binary else value

    def to_json(self) -> dict[str, list[float]]:
        """As ``meta["readers"]`` keeps it."""
        return {
            "values": [self.low, self.high], "label": list(self.label), "score": list(self.score),
            "sd": [] if self.sd is None else [self.sd],
        }  # fmt: skip

    def score_of(self, value: float) -> float:
        """The score that people of this label have on average; InputError if nobody can tell."""
        if self.score[1] <= 0:
            raise InputError(f"{self.name}: this space's reader knows nothing of it")
        return self.score[0] + self.score[1] * value


def attributes_of(space: WeightSpace) -> dict[str, Attribute]:
    """Every attribute that the space has a calibrated reader of; none for a space without readers.

    Spaces of before calibrations were kept are calibrated here, if they hold people and labels.
    """
    if space.classifiers is None:
        return {}
    report = space.meta.get("readers")
    report = report if isinstance(report, dict) else {}
    known = {name: _calibration(report.get(name)) for name in space.attributes}
    if None in known.values() and space.labels is not None and space.coefficients is not None:
        made = calibrations(space.coefficients, space.labels, space.attributes, report)
        known = {name: found or made.get(name) for name, found in known.items()}
    return {
        name: Attribute(
            name, row, *found["values"], tuple(found["label"]), tuple(found["score"]),
            found["sd"][0] if found["sd"] else None,
        )
        for row, (name, found) in enumerate(known.items())
        if found is not None
    }  # fmt: skip


def scores(space: WeightSpace, c: Tensor) -> Tensor:
    """The linear readers' scores ``[k, a]`` float64 of c ``[k, m]``."""
    return (c.to(space.mu).double() - space.mu.double()) @ space.classifiers.double().T


def read_attributes(space: WeightSpace, c: Tensor) -> dict[str, dict[str, Tensor]]:
    """What c ``[k, m]`` show: name -> {"probability"} or {"value", "low", "high"}, float64 [k].

    low and high: nine people in ten of such a score lie between.
    """
    known = attributes_of(space)
    if not known:
        return {}
    found, score = {}, scores(space, c)
    for name, attribute in known.items():
        value = attribute.read(score[:, attribute.row])
        if attribute.binary:
            found[name] = {"probability": value}
        else:
            doubt = _NINETY * attribute.sd
            found[name] = {"value": value, "low": value - doubt, "high": value + doubt}
    return found


def _calibration(entry: Any) -> dict[str, list[float]] | None:
    """What a report keeps, or None where it is not of the form that ``fit`` writes."""
    found = entry.get("calibration") if isinstance(entry, dict) else None
    sizes = {"values": (2,), "label": (2,), "score": (2,), "sd": (0, 1)}
    if not isinstance(found, dict) or set(found) != set(sizes):
        return None
    for key, size in sizes.items():
        numbers = found[key]
        if not isinstance(numbers, list) or len(numbers) not in size:
            return None
        if not all(isinstance(x, (int, float)) for x in numbers):
            return None
    return found


def check_known(space: WeightSpace, name: str) -> None:
    """InputError, naming what there is, unless the space has the attribute."""
    if name not in space.attributes:
        known = ", ".join(space.attributes) or "none"
        raise InputError(f"attribute: {name!r} is not in this space; it has {known}")
