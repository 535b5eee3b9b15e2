"""Keeps the names of saved tensors as they are when a module's tensors move into a child of it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def save_as_own(module: nn.Module, child: str) -> None:
    """From now on `module.state_dict()` names the tensors of `module.child` as if they were the module's own.

    Checkpoints from before the tensors moved into the child still load, and new ones have the same names.

    Args:
        child: name of an attribute that is a module. Its tensors' names must differ from those of the other children.
    """

    def rename_when_saving(module: nn.Module, tensors: dict[str, Any], prefix: str, _: Any) -> None:
        entries = list(tensors.items())
        tensors.clear()  # and filled again, so that the order of the tensors stays
        start = f"{prefix}{child}."
        tensors.update({prefix + name[len(start) :] if name.startswith(start) else name: t for name, t in entries})

    def rename_when_loading(module: nn.Module, tensors: dict[str, Any], prefix: str, *_: Any) -> None:
        for name in module.get_submodule(child).state_dict():
            if prefix + name in tensors:
                tensors[f"{prefix}{child}.{name}"] = tensors.pop(prefix + name)

    module.register_state_dict_post_hook(rename_when_saving)
    module.register_load_state_dict_pre_hook(rename_when_loading)


def saved_parameter_names(module: nn.Module) -> Mapping[Tensor, str]:
    """For each parameter, the name under which it is saved."""
    tensors = module.state_dict(keep_vars=True)
    return {tensor: name for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)}
