"""What the commands share: opening spaces and pipelines, defaults, outputs, and the errors."""

from __future__ import annotations

import errno
import os
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from ..errors import InputError

if TYPE_CHECKING:
    from ..layout import Layout
    from ..space import WeightSpace

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EFBIG)
DEMO = ("demo", "w2w_fast demo world")


class Group(typer.core.TyperGroup):
    """The `w2w` command: bad input is one line on stderr and exit code 2, by whomever it is run."""

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            # The libraries' own warnings are for programmers; ours are about the user's data.
            for library in ("DIFFUSERS", "TRANSFORMERS"):
                os.environ.setdefault(f"{library}_VERBOSITY", "error")
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module="w2w_fast")
            warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
            try:
                code = super().main(*args, standalone_mode=False, **kwargs)
            except InputError as error:
                say(str(error))
                code = 2
            except OSError as error:
                if error.errno not in _DISK:
                    raise
                where = f"{error.filename}: " if error.filename else ""
                say(f"{where}{error.strerror}; what was written before is whole: make room, or "
                    "name another folder, and run the same command again")  # fmt: skip
                code = 2
            except Exception as error:
                if not _is_usage(error):
                    raise
                code = _show_usage(error)
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code


def _is_usage(error: Exception) -> bool:
    # By name: typer 0.29 brought a click of its own, before it was the package click.
    return any(kind.__name__ in ("ClickException", "Abort") for kind in type(error).__mro__)


def _show_usage(error: Any) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":  # `w2w` alone has printed its help
        if error.format_message():  # where the library leaves that to us
            typer.echo(error.format_message())
        return 2
    if type(error).__name__ == "Abort":
        say("interrupted")
        return 130
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "w2w"
    say(f"{error.format_message()} (see `{command} --help`)")
    return 2


def say(message: str) -> None:
    """One line on stderr; what a terminal would obey is left out of it."""
    line = " ".join(message.split())
    typer.echo("w2w: " + "".join(c if c.isprintable() else "?" for c in line), err=True)


# --- inputs ---------------------------------------------------------------------------------------


def open_space(name: str, device: str | None = None) -> WeightSpace:
    """The space in a folder, of a name in the user's cache, or the embedded world's ("demo")."""
    if name == "demo":
        from .. import demo

        space = demo.space()
    else:
        from ..space import WeightSpace

        space = WeightSpace.load(name)
    return space if device is None else space.to(open_device(device))


def open_device(device: str | None) -> Any:
    """A torch.device that is there: the one named, else the first GPU, else the CPU."""
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        reason = str(error).splitlines()[0][:200]
        raise InputError(f"--device {device!r}: cannot be used here: {reason}") from None


def open_pipeline(
    base: str | None, space: WeightSpace | None, device: str | None, dtype: str = "float32"
) -> Any:
    """The diffusers pipeline in a folder, or the embedded world's; by default the space's own."""
    import torch

    if dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"--dtype: wanted float32, bfloat16 or float16, got {dtype!r}")
    place, kind = open_device(device), getattr(torch, dtype)
    name = base or (space.meta.get("base") if space is not None else None)
    if name is None and space is None:
        raise InputError("--base: wanted the folder of a diffusers pipeline, or demo")
    if not isinstance(name, str):
        raise InputError(
            "--base: this space does not say which base model its people were trained on; "
            "name the folder of that diffusers pipeline"
        )
    os.environ["HF_HUB_OFFLINE"] = "1"
    if name in DEMO:
        from .. import demo

        pipe = demo.pipeline(kind)
    else:
        pipe = _from_folder(name, kind, told=base is not None)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(place)


def _from_folder(name: str, dtype: Any, told: bool) -> Any:
    if not (Path(name) / "model_index.json").is_file():
        whose = "" if told else "the space was made with "
        raise InputError(
            f"--base: {whose}{name!r}, which is not a folder with a diffusers pipeline "
            "(model_index.json); nothing is ever downloaded: name the folder of a copy on disk"
        )
    import diffusers
    import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        return diffusers.DiffusionPipeline.from_pretrained(
            name, torch_dtype=dtype, local_files_only=True, use_safetensors=True
        )
    except Exception as error:  # a damaged folder makes the loaders raise many kinds
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"--base: {name}: diffusers cannot load it: {reason[0][:300]}") from error


def anywhere(name: str | None) -> str | None:
    """The name of a space or a base, a folder's absolute: it means the same to other processes."""
    own = name is None or name in DEMO or not Path(name).is_dir()
    return name if own else str(Path(name).resolve())


def image_size(pipe: Any) -> int:
    """The side of the square pictures a pipeline was trained on, in pixels."""
    from ..denoise import denoiser

    return int(denoiser(pipe).config.sample_size) * int(pipe.vae_scale_factor)


def read_prompts(values: list[str]) -> list[str]:
    """Each value is a prompt, or a text file with a prompt a line."""
    from ..denoise import MOST_CHARACTERS, check_prompts

    prompts: list[str] = []
    for value in values:
        path = Path(value) if len(value) < 1000 and "\0" not in value else None
        if path is None or not (path.suffix == ".txt" or path.is_file()):
            prompts.append(value)
            continue
        if not path.is_file() or path.stat().st_size > 100 * MOST_CHARACTERS:
            raise InputError(f"--prompts: {path}: wanted a text file of at most 1 MB")
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise InputError(f"--prompts: {path}: not UTF-8 text: {error}") from None
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError("--prompts: no prompt in it")
    check_prompts(prompts)
    return prompts


class People(NamedTuple):
    """Photographs uint8 [p, 3, h, w], who is on each, everybody's name, masks f32 [p, 1, h, w]."""

    photos: Any
    owner: list[int]
    names: list[str]
    masks: Any


def read_people(paths: list[Path], size: int, masks: list[Path] | None = None) -> People:
    """The people in photographs, cropped to the centre square and scaled to size x size.

    A file is one person; a folder is one person with all the photos in it. masks: white on the
    face; one for all photos, or one each, in their order; without any, x.mask.png beside x.png.
    """
    import torch

    from ..files import read_image
    from ..sources import PHOTO_SUFFIXES, fitted, natural

    files, owner = [], []
    for who, path in enumerate(paths):
        mine = [path]
        if path.is_dir():
            there = (p for p in path.iterdir() if p.suffix.lower() in PHOTO_SUFFIXES)
            named = {p.name: p for p in there if not p.stem.endswith(".mask")}
            mine = [named[name] for name in sorted(named, key=natural)]
            if not mine:
                raise InputError(f"{path}: no photo ({', '.join(PHOTO_SUFFIXES)}) in it")
        files += mine
        owner += [who] * len(mine)
    photos, grey = [], []
    for file, mask in zip(files, _masks(files, masks), strict=True):
        image = read_image(file)
        photos.append(fitted(image, size))
        if mask is not None:
            (w, h), white = image.size, read_image(mask)
            if abs(w * white.height - h * white.width) > max(w, h):  # up to one pixel of rounding
                raise InputError(
                    f"--mask: {mask}: wanted the shape of {file}, {w} x {h}, at any scale; got "
                    f"{white.width} x {white.height}"
                )
            grey.append(fitted(white, size).float().mean(0, keepdim=True) / 255)
            if not bool(grey[-1].any()):
                raise InputError(f"--mask: {mask}: all black, nothing of {file} would be used")
    names = [path.name if path.is_dir() else path.stem for path in paths]
    return People(torch.stack(photos), owner, names, torch.stack(grey) if grey else None)


def _masks(photos: list[Path], given: list[Path] | None) -> list[Path | None]:
    """The mask of each photo: those given, or those beside all of them, or none."""
    if given:
        if len(given) not in (1, len(photos)):
            raise InputError(
                f"--mask: wanted one, or one for each of {len(photos)} photos in their order; got "
                f"{len(given)}"
            )
        return list(given * (len(photos) // len(given)))
    beside = [photo.with_suffix(".mask.png") for photo in photos]
    lone = [photo for photo, mask in zip(photos, beside, strict=True) if not mask.is_file()]
    if len(lone) == len(photos):
        return [None] * len(photos)
    if lone:
        raise InputError(f"{lone[0]}: wanted a mask of it too: others have one beside them")
    return list(beside)


def memory_size(text: str) -> int:
    """Bytes of "8GiB", "500 MB" or "12g"; InputError for what is no size."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?b)?\s*", text.lower())
    if match is None:
        raise InputError(f"--vram: wanted a size such as 8GiB, got {text!r}")
    number, unit, ending = match.groups()
    return int(float(number) * (1000 if ending == "b" else 1024) ** ("kmgt".find(unit or "?") + 1))


def read_start(path: Path, layout: Layout) -> Any:
    """The adapter w [d] to start from.

    The mean of a finished population or of a space, a LoRA, or a file with a tensor w.
    """
    import torch

    from ..files import read_tensors
    from ..formats import read_adapter
    from ..population import open_population

    def same(other: Layout, what: str) -> None:
        if other != layout:
            raise InputError(f"--start: {path}: {what} of another layout than this base's")

    if (path / "space.json").is_file():
        space = open_space(str(path))
        same(space.layout, "a space")
        return space.mean
    if (path / "population.json").is_file():
        first = open_population(path)
        same(first.layout, "a population")
        return torch.stack([w.double().sum(0) for w in first.shards]).sum(0).div(len(first)).float()
    if path.is_file() and set(read_tensors(path)[0]) == {"w"}:
        expect = {"w": ((layout.size,), {torch.float32})}
        return read_tensors(path, expect=expect)[0]["w"]
    adapter = read_adapter(path)
    if set(adapter.modules) != set(layout.names) or adapter.ranks != (layout.rank,):
        raise InputError(
            f"--start: {path}: a LoRA of {len(adapter.modules)} modules of rank "
            f"{', '.join(map(str, adapter.ranks))}; wanted this base's "
            f"{len(layout.modules)}, of rank {layout.rank}"
        )
    return layout.flatten({n: (a, b / layout.scale) for n, (a, b) in adapter.modules.items()})


def components(text: str | None) -> int | str | None:
    """--components: a whole number from 1, "auto", or None where it was not given."""
    if text is None or text == "auto":
        return text
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) > 0):
        raise InputError(f"--components: wanted a whole number from 1, or auto, got {text!r}")
    return int(text)


def defaults(space: WeightSpace, verb: str, kinds: Mapping[str, type]) -> dict[str, Any]:
    """What a space's meta says about a verb: meta[verb] where the kinds fit, InputError if not."""
    own = space.meta.get(verb, {})
    if not isinstance(own, dict):
        raise InputError(f"space: meta: {verb}: wanted an object of settings")
    found = {}
    for name, kind in kinds.items():
        value = own.get(name, space.meta.get(name))
        if value is None:
            continue
        fits = isinstance(value, (int, float)) if kind is float else isinstance(value, kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise InputError(f"space: meta: {verb}: {name}: wanted {kind.__name__}, got {value!r}")
        found[name] = value
    return found


def given(**flags: Any) -> dict[str, Any]:
    """Those of the flags that the user gave."""
    return {name: value for name, value in flags.items() if value is not None}


def show_readers(space: WeightSpace) -> None:
    """How well each attribute of a space is read from people left out, a line each."""
    from ..readers import readings

    lines = list(readings(space.meta.get("readers", {})))
    width = max((len(name) for name, _ in lines), default=0)
    for name, text in lines:
        typer.echo(f"  {name:<{width}}  {text}")


# --- outputs --------------------------------------------------------------------------------------


def new_file(path: Path, overwrite: bool, suffix: str = ".safetensors") -> Path:
    """`path`, if it may be written: of that kind, not there yet (unless `overwrite`)."""
    if path.suffix != suffix:
        raise InputError(f"{path}: wanted a name that ends in {suffix}")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a file")
    if path.exists() and not overwrite:
        raise InputError(f"{path}: exists already; name another, or give --overwrite")
    return writable(path)


def new_lora(path: Path, overwrite: bool, format: str) -> Path:
    """`path`, if a LoRA of that format may be written there: a folder for peft, else a file."""
    if format == "peft":
        return new_folder(path, overwrite, "adapter_config.json")
    return new_file(path, overwrite)


def write_lora(
    whose: WeightSpace | Layout, row: Any, out: Path, overwrite: bool, pipe: Any, **options: Any
) -> None:
    """Export c [m] of a space or w [d] of a layout, whole or not at all.

    With a pipe only if diffusers loads it to the same effect. options: of `formats.export`.
    """
    import tempfile

    from .. import formats
    from ..files import atomic_dir
    from ..layout import Layout

    if pipe is not None:
        with tempfile.TemporaryDirectory() as scratch:
            path = formats.export(whose, row, Path(scratch, out.name), **options)
            layout, w = whose, row
            if not isinstance(whose, Layout):
                layout, w = whose.layout, whose.reconstruct(row[None])
            strength = options.get("strength", 1.0)
            found = formats.verify(path, pipe, w, layout, strength=strength)
        said = f"{found.max_error:.1e} at most, on outputs up to {found.scale:.2g}"
        if found.relative > 1e-3:
            raise InputError(f"--verify: diffusers' output differs by {said}; not written")
        typer.echo(f"loaded by diffusers, {found.modules} modules: output differs by {said}")
    if options["format"] == "peft":
        with atomic_dir(out, overwrite=overwrite) as temporary:
            formats.export(whose, row, temporary, **options)
    else:
        formats.export(whose, row, out, **options)


def new_folder(path: Path, overwrite: bool, mark: str) -> Path:
    """`path`, if it may become a folder: nothing there, or (`overwrite`) one with a file `mark`.

    So that a mistyped name with --overwrite does not cost a folder that something else made.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file; name a folder")
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise InputError(f"{path}: not empty; name another folder, or give --overwrite")
        if not (path / mark).exists():
            raise InputError(
                f"{path}: has no {mark}, so it was not made by this command: it is not overwritten"
            )
    return writable(path)


def writable(path: Path) -> Path:
    """`path`, if something may be written there: the nearest folder above it can be written to."""
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{path}: {folder} is not a folder that can be written to")
    return path
