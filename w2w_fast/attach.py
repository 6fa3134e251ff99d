"""Adapters inside a live model: one identity a sample of the batch, or one merged into the weights.

Forward hooks on the layout's Linears add ``low_rank``; the adapters live in the returned object,
so the model's state_dict never changes, detaching is exact, and swapping identities copies into
buffers that a compiled graph already holds.

Rows of a batch: ``[group][identity][image]``, group outermost. Classifier-free guidance makes two
groups, unconditional first; perturbed-attention guidance three. Identity guidance runs the first
group without the adapter, so that guidance extrapolates from the base model to the person.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from .errors import InputError
from .layout import Layout, _some
from .ops import merge
from .ops.adapted_linear import add_low_rank
from .text_cache import TextCache

if TYPE_CHECKING:
    from .space import WeightSpace

_attached: WeakSet[nn.Module] = WeakSet()


class _Hook:
    """Adds one module's adapters to its output. A ``[k, r, in]``; B ``[k, out, r]``, scaled."""

    def __init__(self, live: Live, name: str) -> None:
        self.live, self.name = live, name
        self.A: Tensor | None = None
        self.B: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.live._called.add(self.name)
        if self.A is None:
            raise InputError("attach: no adapter set: assign live.identities or live.adapters")
        x, kept = args[0], self.live._text
        if kept is not None and kept.returned(module, out):
            return out
        adapters = self.adapters(x)
        made = add_low_rank(out, x, *adapters)
        if kept is not None:
            kept.keep(module, x, adapters, made)
        return made

    def adapters(self, x: Tensor) -> tuple[Tensor | None, ...]:
        """A, B, index and scales of a batch: all that is added depends on, but x."""
        return self.A, self.B, *self.live._rows(self.A.shape[0], x.shape[0], x.device)


class Live:
    """What ``attach`` returns. A context manager; ``detach()`` puts the model back exactly.

    Assign ``identities`` ``[k, m]``, ``adapters`` ``[k, d]``, ``strength`` (a number or ``[k]``),
    ``identity_guidance`` or ``images_per_identity`` at any time. Identities or adapters that
    require grad keep their graph, and are read anew at every eager forward of the model; inside
    ``torch.compile`` assign them again after each step of the optimiser.
    """

    def __init__(
        self,
        model: nn.Module,
        pipe: Any,
        layout: Layout,
        space: WeightSpace | None,
        merged: bool,
        cache_text: bool = False,
    ) -> None:
        self.model, self.pipe, self.layout, self.space = model, pipe, layout, space
        self._modules = layout.check(model)
        taken = [name for name, module in self._modules.items() if module in _attached]
        if taken:
            raise InputError(
                f"attach: {len(taken)} of {len(self._modules)} modules already carry adapters "
                f"({_some(taken)}): detach() the first, or swap its identities"
            )
        fused = [n for n in self._modules if getattr(_parent(model, n), "fused_projections", False)]
        if fused:
            raise InputError(
                f"attach: fused projections bypass {_some(fused)}: unfuse_qkv_projections() first"
            )
        # Where the buffers are: a first guess, corrected by what each forward is given.
        self._place = _place(next(iter(self._modules.values())).weight)
        self._source: Tensor | None = None  # what the user assigned, identities or adapters
        self._is_identities = False
        self._version, self._spent, self._with_grad = 0, False, False
        self._buffer: Tensor | None = None  # [k, d], strength and scale folded into B
        self._strength: float | Tensor = 1.0
        self._identity_guidance = False
        self._images = 1
        self._row_key: tuple = ()  # of the batch that _row_tensors are for
        self._row_tensors: tuple[Tensor | None, Tensor | None] = (None, None)
        self._called: set[str] = set()
        self._pristine: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._hooks: dict[str, _Hook] = {}
        self._text: TextCache | None = None
        # Which numbers of w belong to a B: there strength and scale act.
        self._is_B = torch.zeros(layout.size, dtype=torch.bool)
        for _, rows in layout.slices():
            self._is_B[rows] = True
        if merged:
            narrow = [n for n, m in self._modules.items() if not _mergeable(m)]
            if narrow:
                raise InputError(
                    f"merged: weights of {_some(narrow)} are quantised or offloaded; attach with "
                    "merged=False"
                )
            self._pristine = {n: m.weight.detach().clone() for n, m in self._modules.items()}
        else:
            self._hooks = {name: _Hook(self, name) for name in self._modules}
            self._handles = [
                module.register_forward_hook(self._hooks[name])
                for name, module in self._modules.items()
            ]
            self._handles.append(model.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(model.register_forward_hook(self._after))
            if cache_text:
                hooked = {self._modules[name]: hook.adapters for name, hook in self._hooks.items()}
                self._text = TextCache(model, hooked)
        _attached.update(self._modules.values())

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Take the adapters out: hooks removed, merged weights restored bit for bit."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._text is not None:
            self._text.close()
            self._text = None
        with torch.no_grad():
            for name, weight in self._pristine.items():
                self._modules[name].weight.copy_(weight)
        self._pristine.clear()
        _attached.difference_update(self._modules.values())
        self._modules = {}

    @property
    def merged(self) -> bool:
        return bool(self._pristine)

    @property
    def adapters(self) -> Tensor | None:
        """w ``[k, d]``: what was assigned, or the reconstruction of the identities."""
        return self._adapters() if self._is_identities else self._source

    @adapters.setter
    def adapters(self, w: Tensor) -> None:
        self._assign("adapters", w, self.layout.size, identities=False)

    @property
    def identities(self) -> Tensor | None:
        """c ``[k, m]`` as assigned, None if adapters were."""
        return self._source if self._is_identities else None

    @identities.setter
    def identities(self, c: Tensor) -> None:
        if self.space is None:
            raise InputError("identities: this was attached with a layout: attach with a space")
        self._assign("identities", c, self.space.m, identities=True)

    @property
    def strength(self) -> float | Tensor:
        return self._strength

    @strength.setter
    def strength(self, value: float | Sequence[float] | Tensor) -> None:
        old, new = self._strength, torch.as_tensor(value, dtype=torch.float32).detach().cpu()
        if new.ndim > 1 or not bool(new.isfinite().all()):
            raise InputError(f"strength: wanted a finite number or one an identity, got {value}")
        self._strength = new.clone() if new.ndim else float(new)
        try:
            self._load()
        except InputError:
            self._strength = old
            raise

    @property
    def identity_guidance(self) -> bool:
        return self._identity_guidance

    @identity_guidance.setter
    def identity_guidance(self, value: bool) -> None:
        if value and self.merged:
            raise InputError(
                "identity_guidance: merged weights serve every row; attach with merged=False"
            )
        self._identity_guidance = bool(value)

    @property
    def images_per_identity(self) -> int:
        """Neighbouring rows that share an identity: diffusers' ``num_images_per_prompt``."""
        return self._images

    @images_per_identity.setter
    def images_per_identity(self, value: int) -> None:
        if type(value) is not int or value < 1:
            raise InputError(f"images_per_identity: wanted a positive integer, got {value!r}")
        self._images = value

    def check_called(self) -> None:
        """InputError, with counts, if a hooked module took no part in the last eager forward."""
        missing = [name for name in self._hooks if name not in self._called]
        if missing:
            replaced = [n for n in missing if _module(self.model, n) is not self._modules.get(n)]
            raise InputError(
                f"attach: {len(self._hooks) - len(missing)} of {len(self._hooks)} modules took "
                f"part in the last forward; replaced after attaching: {_some(replaced)}; not "
                f"called: {_some([n for n in missing if n not in replaced])}. Attach after "
                "changing the model; fuse_qkv_projections() bypasses hooks"
            )

    def _assign(self, what: str, value: Tensor, width: int, identities: bool) -> None:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise InputError(f"{what}: wanted a floating-point tensor [k, {width}], got {value!r}")
        value = value[None] if value.ndim == 1 else value
        if value.ndim != 2 or value.shape[1] != width or not value.shape[0]:
            raise InputError(f"{what}: wanted [k, {width}], got {list(value.shape)}")
        if self.merged and (value.shape[0] != 1 or value.requires_grad):
            raise InputError(
                f"{what}: merged weights hold exactly one identity and no gradient, got "
                f"{value.shape[0]}, requires_grad={value.requires_grad}; attach with merged=False"
            )
        old = self._source, self._is_identities
        self._source, self._is_identities = value, identities
        try:
            self._load()
        except InputError:
            self._source, self._is_identities = old
            raise

    def _adapters(self) -> Tensor:
        """The source as w ``[k, d]``."""
        if not self._is_identities:
            return self._source
        return self.space.reconstruct(self._source.to(self.space.mean.device, torch.float32))

    def _load(self) -> None:
        """Source and strength -> the hooks' buffers (in place where the shape allows), or weights.

        Nothing is kept unless every check has passed.
        """
        source = self._source
        if source is None:
            return
        strength = torch.as_tensor(self._strength, dtype=torch.float64)
        if strength.ndim and len(strength) != len(source):
            raise InputError(
                f"strength: wanted a number or one of each of {len(source)} identities, "
                f"got {len(strength)}"
            )
        if not self._handles and not self._pristine:
            raise InputError("attach: detached already: attach again")
        w = self._adapters()
        if not w.requires_grad and not bool(w.isfinite().all()):
            raise InputError("attach: the adapters hold NaN or infinite numbers")
        self._version, self._spent = _version(source), False
        self._with_grad = torch.is_grad_enabled()
        if self.merged:
            pristine = list(self._pristine.values())
            parts = self.layout.split(w[0].detach().to(pristine[0].device)).values()
            weights = [module.weight.detach() for module in self._modules.values()]
            scale = float(strength) * self.layout.scale
            merge(pristine, [A for A, _ in parts], [B for _, B in parts], scale, weights)
            return
        dtype, device = self._place
        w, self._is_B = w.to(device), self._is_B.to(device)
        factor = (self.layout.scale * strength).reshape(-1, 1).to(w)
        folded = (w * torch.where(self._is_B, factor, 1)).to(dtype)
        held = self._buffer
        reusable = (
            held is not None
            and not (folded.requires_grad or held.requires_grad)
            and (held.shape, held.dtype, held.device) == (folded.shape, dtype, folded.device)
            and held.is_inference() == torch.is_inference_mode_enabled()
        )
        if reusable:
            held.copy_(folded)
            return
        self._buffer = folded
        for name, (A, B) in self.layout.split(folded).items():
            self._hooks[name].A, self._hooks[name].B = A, B

    def _rows(
        self, adapters: int, batch: int, device: torch.device
    ) -> tuple[Tensor | None, Tensor | None]:
        """(index, scales) of a batch's rows: whose adapter each uses, and 0 where guided without.

        None: a row's own, or the one there is; all 1. Depends on shapes only, so that a compiled
        graph never sees a new value.
        """
        k, guided = adapters * self._images, self._identity_guidance
        if adapters == 1 and not guided:
            return None, None
        if adapters == 1:  # k says nothing about the groups: the pipe does, or they are two
            groups = self._pipe_groups() or 2
            k = batch // groups
        else:
            groups = batch // k
        if groups not in (1, 2, 3) or batch != groups * k:
            raise InputError(
                f"attach: a batch of {batch} rows for {adapters} identities x {self._images} "
                "images: wanted 1, 2 (classifier-free guidance) or 3 times as many; set "
                "live.identities or live.images_per_identity"
            )
        if guided and groups == 1 and self._pipe_groups() != 1:
            raise InputError(
                "identity_guidance: wanted the doubled batch [unconditional, conditional] of "
                f"classifier-free guidance, got {batch} rows for {adapters} identities; "
                "set live.identity_guidance = False"
            )
        guided = guided and groups > 1
        key = (adapters, self._images, groups, k, guided, device)
        if torch.compiler.is_compiling():
            return _index_and_scales(*key)
        if self._row_key != key:
            self._row_key, self._row_tensors = key, _index_and_scales(*key)
        return self._row_tensors

    def _pipe_groups(self) -> int | None:
        """How many groups the pipe's running call stacks; None if there is no way to know."""
        guided = getattr(self.pipe, "do_classifier_free_guidance", None)
        perturbed = getattr(self.pipe, "do_perturbed_attention_guidance", False)
        return None if guided is None else 1 + bool(guided) + bool(perturbed)

    def _before(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before an eager forward: refresh what a graph, device or dtype change has made stale."""
        if torch.compiler.is_compiling() or self._source is None:
            return
        self._called.clear()
        tensors = (t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        sample = next((t for t in tensors if t.is_floating_point() and t.ndim), None)
        if sample is None:
            return
        groups, k = self._pipe_groups(), len(self._source) * self._images
        # Some transformers' pipelines call the model once a group instead of stacking the groups.
        stacked = sample.shape[0] != k or getattr(self.pipe, "transformer", None) is None
        if groups and len(self._source) > 1 and stacked and sample.shape[0] != groups * k:
            raise InputError(
                f"attach: the pipe stacks {groups} group(s) for {len(self._source)} identities x "
                f"{self._images} images = {groups * k} rows, got {sample.shape[0]}: give it one "
                "prompt an identity (a loop of your own attaches to pipe.unet, not to the pipe)"
            )
        kind = sample.device.type
        auto = torch.is_autocast_enabled(kind)
        place = (torch.get_autocast_dtype(kind) if auto else sample.dtype, sample.device)
        # A graph serves one forward: after its backward it is gone, and w may have moved.
        spent = self._source.requires_grad and (
            self._spent or self._with_grad != torch.is_grad_enabled()
        )
        if spent or place != self._place or _version(self._source) != self._version:
            self._place = place
            self._load()
        self._spent = True

    def _after(self, model: nn.Module, args: tuple, out: Any) -> None:
        if not torch.compiler.is_compiling():
            self.check_called()


def attach(
    model_or_pipe: Any,
    space_or_layout: WeightSpace | Layout,
    *,
    identities: Tensor | None = None,
    adapters: Tensor | None = None,
    strength: float | Sequence[float] | Tensor = 1.0,
    identity_guidance: bool = False,
    merged: bool = False,
    cache_text: bool = False,
) -> Live:
    """Put identities c ``[k, m]`` or flattened adapters w ``[k, d]`` on a model; returns ``Live``.

    ``model_or_pipe`` is a module, or a pipeline, whose ``unet`` or ``transformer`` is taken and
    whose guidance is checked against the batch. ``merged=True`` writes one identity into the
    weights, from pristine copies. ``cache_text=True`` keeps what cross-attention makes of the text,
    its keys and values, while nothing of it changes (``text_cache``): for a loop of denoising steps
    that is not compiled. Raises InputError, with counts, for modules that are missing,
    of other widths, fused, or attached already, and for identities that do not fit.
    """
    pipe = None if isinstance(model_or_pipe, nn.Module) else model_or_pipe
    model = model_or_pipe if pipe is None else _denoiser(pipe)
    wrapped, model = model, getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    compiled = wrapped is not model or _is_compiled(model)
    if not merged and compiled:
        # Dynamo does not guard on a module that had no hooks: a graph compiled before this call
        # would go on without the adapters, silently.
        torch.compiler.reset()
    layout = space_or_layout
    space = None if isinstance(layout, Layout) else space_or_layout
    if space is not None:
        layout = getattr(space, "layout", None)
    if not isinstance(layout, Layout):
        raise InputError(
            f"attach: wanted a WeightSpace or a Layout, got {type(space_or_layout).__name__}"
        )
    if identities is not None and adapters is not None:
        raise InputError("attach: wanted identities or adapters, got both")
    if cache_text and merged:
        raise InputError("cache_text: wanted with merged=False")
    live = Live(model, pipe, layout, space, merged, cache_text and not compiled)
    try:
        if identities is not None:
            live.identities = identities
        if adapters is not None:
            live.adapters = adapters
        live.strength = strength
        live.identity_guidance = identity_guidance
    except BaseException:
        live.detach()
        raise
    return live


def _denoiser(pipe: Any) -> nn.Module:
    for name in ("unet", "transformer"):
        model = getattr(pipe, name, None)
        if isinstance(model, nn.Module):
            return model
    raise InputError(
        f"attach: wanted a module or a pipeline with a unet or transformer, got "
        f"{type(pipe).__name__}"
    )


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _parent(model: nn.Module, name: str) -> nn.Module | None:
    return _module(model, name.rpartition(".")[0])


def _place(weight: Any) -> tuple[torch.dtype, torch.device]:
    """Dtype and device that adapters beside this weight should have.

    Quantised Linears hold integers, or in torch.ao a method; offloaded ones are on ``meta``.
    """
    held = isinstance(weight, Tensor) and not weight.is_meta
    wide = isinstance(weight, Tensor) and weight.is_floating_point() and weight.dtype.itemsize >= 2
    return weight.dtype if wide else torch.float32, weight.device if held else torch.device("cpu")


def _mergeable(module: nn.Module) -> bool:
    weight = module.weight
    if type(weight) not in (Tensor, nn.Parameter) or weight.is_meta:
        return False
    shape = (module.out_features, module.in_features)
    return weight.is_floating_point() and weight.dtype.itemsize >= 2 and weight.shape == shape


def _is_compiled(model: nn.Module) -> bool:
    return any(module._compiled_call_impl is not None for module in model.modules())


def _index_and_scales(
    adapters: int, images: int, groups: int, k: int, guided: bool, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Index ``[batch]`` and scales ``[batch]`` of rows [group][identity][image]; see ``_rows``."""
    index = scales = None
    if adapters > 1 and (images > 1 or groups > 1):
        index = torch.arange(adapters, device=device).repeat_interleave(images).repeat(groups)
    if guided:
        scales = (torch.arange(groups * k, device=device) >= k).to(torch.float32)
    return index, scales


def _version(tensor: Tensor) -> int:
    """Counts in-place changes; inference tensors keep no count."""
    return 0 if tensor.is_inference() else tensor._version
