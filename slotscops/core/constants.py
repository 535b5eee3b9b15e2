"""Tensors that follow from a few numbers, such as the coordinates of a grid. They are made once for each device."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec

import torch
from torch import Tensor

Parameters = ParamSpec("Parameters")
_MAX_KEPT = 64  # for each function: enough for all sizes and devices of one run


def made_once(make: Callable[Parameters, Tensor]) -> Callable[Parameters, Tensor]:
    """Keeps what a function returned for the same arguments, so that a step on a GPU launches no kernels for it.

    All callers share one tensor, so do not write to it. While a model is compiled or exported, nothing is kept: the
    tensors of a trace have no values.
    """

    @lru_cache(maxsize=_MAX_KEPT)
    def keep(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Tensor:
        # Training cannot use tensors made in inference mode, and the first caller may be an evaluation.
        with torch.inference_mode(False), torch.no_grad():
            return make(*args, **kwargs)

    @wraps(make)
    def get(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Tensor:
        if torch.compiler.is_compiling():
            return make(*args, **kwargs)
        kept: Tensor = keep(*args, **kwargs)  # type: ignore[arg-type]  # the arguments are numbers and devices
        return kept

    return get
