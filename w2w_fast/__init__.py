"""Weight spaces of customised diffusion models: sample, edit, invert and generate.

Everything a user needs is here and imported at first use, so that `import w2w_fast` costs
nothing: `WeightSpace`, `Layout`, the verbs, `attach`, the formats, and the embedded world `demo`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import demo
    from .attach import attach
    from .coefficients import read_coefficients, write_coefficients
    from .errors import InputError
    from .formats import export, import_published, read_adapter
    from .layout import Layout
    from .space import WeightSpace
    from .verbs.blend import blend
    from .verbs.calibrate import calibrate
    from .verbs.collect import collect
    from .verbs.directions import directions
    from .verbs.edit import edit
    from .verbs.fit import fit
    from .verbs.generate import generate
    from .verbs.generate_to import generate_to
    from .verbs.invert import invert
    from .verbs.populate import populate
    from .verbs.read import read
    from .verbs.sample import sample
    from .verbs.slider import slider
    from .whereabouts import novelty

_HOME = {
    "InputError": "errors",
    "Layout": "layout",
    "WeightSpace": "space",
    "attach": "attach",
    "blend": "verbs.blend",
    "calibrate": "verbs.calibrate",
    "collect": "verbs.collect",
    "directions": "verbs.directions",
    "edit": "verbs.edit",
    "export": "formats",
    "fit": "verbs.fit",
    "generate": "verbs.generate",
    "generate_to": "verbs.generate_to",
    "import_published": "formats",
    "invert": "verbs.invert",
    "novelty": "whereabouts",
    "populate": "verbs.populate",
    "read": "verbs.read",
    "read_adapter": "formats",
    "read_coefficients": "coefficients",
    "sample": "verbs.sample",
    "slider": "verbs.slider",
    "write_coefficients": "coefficients",
}
"""Public name -> the module that defines it."""

__all__ = [
    "InputError",
    "Layout",
    "WeightSpace",
    "attach",
    "blend",
    "calibrate",
    "collect",
    "demo",
    "directions",
    "edit",
    "export",
    "fit",
    "generate",
    "generate_to",
    "import_published",
    "invert",
    "novelty",
    "populate",
    "read",
    "read_adapter",
    "read_coefficients",
    "sample",
    "slider",
    "write_coefficients",
]


def __getattr__(name: str) -> object:
    if name == "demo":
        return import_module(".demo", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module("." + _HOME[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """The import system sets a submodule on its package: `attach` must stay the function."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
