"""The ops: small pure functions on tensors, each with its formula and its torch definition."""

from .adapted_linear import adapted_linear, low_rank
from .edit import edit
from .merge import merge
from .project import project
from .reconstruct import reconstruct

__all__ = ["adapted_linear", "edit", "low_rank", "merge", "project", "reconstruct"]
