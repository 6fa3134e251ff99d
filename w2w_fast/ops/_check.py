"""Shape checks of the ops: one line a call, one error format."""

from __future__ import annotations

from torch import Tensor

from ..errors import InputError


def shapes(
    op: str,
    known: dict[str, int] | None = None,
    like: Tensor | None = None,
    /,
    **args: tuple[Tensor, str | None],
) -> dict[str, int]:
    """``shapes("project", w=(w, "k d"), mean=(mean, "d"))`` -> ``{"k": ..., "d": ...}``.

    Each letter stands for one size, the same wherever it occurs; every tensor is floating point
    (not one named basis, which may hold integers) and on one device, ``like``'s if it is given.
    A spec of None checks the device alone. The first that differs raises InputError with its
    name, wanted and got.
    """
    sizes: dict[str, int] = dict(known or {})
    first = like
    for name, (tensor, spec) in args.items():
        if not isinstance(tensor, Tensor) or not (tensor.is_floating_point() or name == "basis"):
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InputError(f"{op}: {name}: wanted a floating-point tensor, got {got}")
        first = tensor if first is None else first
        if tensor.device != first.device:
            raise InputError(
                f"{op}: {name}: wanted it on {first.device}, got {tensor.device}; move one"
            )
        if spec is None:
            continue
        letters = spec.split()
        fits = tensor.ndim == len(letters) and all(
            sizes.setdefault(letter, size) == size
            for letter, size in zip(letters, tensor.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join(f"{x} = {sizes[x]}" for x in letters if x in sizes)
            raise InputError(
                f"{op}: {name}: wanted [{', '.join(letters)}] with {wanted or 'any sizes'}, "
                f"got {list(tensor.shape)}"
            )
    return sizes
