"""Keeps the names of saved tensors unchanged after tensors of a module have moved into one of its children."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def save_as_own(module: nn.Module, child: str) -> None:
    """Makes `module.state_dict()` name the tensors of `module.child` as if they were the module's own.

    Checkpoints written before the tensors moved into the child still load, and new checkpoints use the same names.

    Args:
        child: name of an attribute that is a module. No other child may have tensors of the same names.
    """

    def rename_when_saving(module: nn.Module, tensors: dict[str, Any], prefix: str, _: Any) -> None:
        entries = list(tensors.items())
        tensors.clear()  # cleared and filled again, to keep the order of the tensors
        start = f"{prefix}{child}."
        tensors.update({prefix + name[len(start) :] if name.startswith(start) else name: t for name, t in entries})

    def rename_when_loading(module: nn.Module, tensors: dict[str, Any], prefix: str, *_: Any) -> None:
        for name in module.get_submodule(child).state_dict():
            if prefix + name in tensors:
                tensors[f"{prefix}{child}.{name}"] = tensors.pop(prefix + name)

    module.register_state_dict_post_hook(rename_when_saving)
    module.register_load_state_dict_pre_hook(rename_when_loading)


def saved_parameter_names(module: nn.Module) -> Mapping[Tensor, str]:
    """Maps each parameter to the name under which it is saved."""
    tensors = module.state_dict(keep_vars=True)
    return {tensor: name for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)}
