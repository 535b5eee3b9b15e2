"""Runs a step of training as on a GPU, on a machine without one: the meta device stands for the GPU.

Tensors on the meta device have shapes and types but no values, so a step takes milliseconds. A dispatch mode sees every
operator, of the forward pass, the backward pass and the optimizer alike. It counts what would be kernel launches and
raises where a GPU would raise or the host would wait for it:

    a tensor is read back (`item`, `tolist`, `cpu`), or its values decide a shape (`nonzero`, a bool index)
    a tensor of the host meets one of the device in an operator
    a copy from the host starts from memory that is not pinned, or waits for its end
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("meta")
_aten = torch.ops.aten
_COPIES = {_aten._to_copy, _aten.copy_, _aten._foreach_copy_}
# The value decides what the host does next, so the host waits.
_WAITS = {
    _aten._local_scalar_dense, _aten.item, _aten.is_nonzero, _aten.equal, _aten.nonzero, _aten.nonzero_numpy,
    _aten.masked_select, _aten._unique, _aten._unique2, _aten.unique_dim, _aten.unique_consecutive, _aten.bincount,
    _aten.repeat_interleave, _aten.allclose,
}  # fmt: skip
# Their CUDA kernels add with atomics and have no other implementation (see torch.use_deterministic_algorithms).
_RANDOM_ORDER = {
    _aten.grid_sampler_2d_backward, _aten.grid_sampler_3d_backward, _aten._adaptive_avg_pool2d_backward,
    _aten.adaptive_max_pool2d_backward, _aten.upsample_linear1d_backward, _aten.upsample_bilinear2d_backward,
    _aten.upsample_bicubic2d_backward, _aten._upsample_bilinear2d_aa_backward, _aten._upsample_bicubic2d_aa_backward,
    _aten.replication_pad2d_backward, _aten.reflection_pad2d_backward, _aten.histc, _aten.cumsum,
    _aten.nll_loss2d_backward, _aten.max_pool3d_with_indices_backward, _aten.avg_pool3d_backward, _aten.put_,
}  # fmt: skip
_NO_KERNEL = {
    _aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided, _aten._unsafe_view,
}  # fmt: skip


_LIBRARY = {
    _aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.convolution, _aten.convolution_backward,
}  # fmt: skip


class WaitError(AssertionError):
    """The host would wait for the GPU."""


class DeviceError(AssertionError):
    """A tensor of the host meets a tensor of the GPU."""


class OrderError(AssertionError):
    """The kernel adds in an order that differs from run to run."""


class Watch(TorchDispatchMode):
    """Counts and checks every operator while it is active."""

    def __init__(self, in_fixed_order: bool = False, unchecked: bool = False) -> None:
        """
        Args:
            in_fixed_order: also refuse operators whose CUDA kernels add in a random order.
            unchecked: refuse nothing. The first step of a run may fill caches.
        """
        super().__init__()
        self.launches: Counter[str] = Counter()  # of PyTorch's own kernels
        self.library_calls: Counter[str] = Counter()  # matrix products of cuBLAS and convolutions of cuDNN
        self._in_fixed_order, self._unchecked = in_fixed_order, unchecked
        self._pinned: set[int] = set()  # addresses of memory that stays pinned while the watch is active
        self._kept: list[Tensor] = []  # the tensors that own it

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = function.overloadpacket
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not self._unchecked:
            self._check(function, packet, tensors, args, kwargs)
        result = function(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        is_on_gpu = any(tensor.device == GPU for tensor in tensors + made)
        if is_on_gpu and function.namespace == "aten" and not function.is_view and packet not in _NO_KERNEL:
            kind = self.library_calls if packet in _LIBRARY else self.launches
            # Each gradient of a convolution is a call of its own.
            kind[str(packet)] += sum(args[-1]) if packet is _aten.convolution_backward else 1
        return result

    def _check(self, function: Any, packet: Any, tensors: list[Tensor], args: Any, kwargs: Any) -> None:
        if packet in _COPIES:
            self._check_copy(packet, args, kwargs)
            return
        if not any(tensor.device == GPU for tensor in tensors):
            return
        from_host = [tensor for tensor in tensors if tensor.device != GPU and tensor.ndim]
        if from_host:
            raise DeviceError(f"{function}: a tensor of shape {tuple(from_host[0].shape)} is still on the host")
        indices = args[1] if packet in (_aten.index, _aten.index_put, _aten.index_put_) else []
        if packet in _WAITS or any(index is not None and index.dtype == torch.bool for index in indices):
            raise WaitError(f"{function} waits for the GPU")
        if self._in_fixed_order and packet in _RANDOM_ORDER:
            raise OrderError(f"{function} adds in an order that differs from run to run")

    def _check_copy(self, packet: Any, args: Any, kwargs: Any) -> None:
        if packet is _aten._to_copy:
            source, target = args[0].device, torch.device(kwargs.get("device") or args[0].device)
        else:
            source, target = args[1].device, args[0].device
        waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        if source == GPU and target != GPU:
            raise WaitError(f"{packet} from the GPU to the host waits")
        if source != GPU and target == GPU and (waits or args[0].data_ptr() not in self._pinned):
            raise WaitError(f"{packet} of shape {tuple(args[0].shape)} to the GPU is not pinned or waits for its end")

    def pin(self, tensor: Tensor) -> Tensor:
        """Stands for `Tensor.pin_memory`: marks a copy of the tensor as pinned."""
        pinned = tensor.clone()
        self._kept.append(pinned)
        self._pinned.add(pinned.data_ptr())
        return pinned


@contextmanager
def watched(in_fixed_order: bool = False, unchecked: bool = False) -> Iterator[Watch]:
    """A watch over all that runs inside, in which `pin_memory` works without CUDA."""
    watch = Watch(in_fixed_order, unchecked)
    with patch.object(Tensor, "pin_memory", lambda tensor: watch.pin(tensor)), watch:
        yield watch


def _gru_cell(inputs: Tensor, state: Tensor, *parameters: Tensor) -> Tensor:
    """What `torch.gru_cell` does on a GPU: two matrix products and one fused kernel."""
    weight_inputs, weight_state, bias_inputs, bias_state = parameters
    gates = inputs @ weight_inputs.T, state @ weight_state.T
    new: Tensor = _aten._thnn_fused_gru_cell(*gates, state, bias_inputs, bias_state)[0]
    return new


def _fused_gru_cell(inputs: Tensor, hidden: Tensor, state: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(state), state.new_empty(len(state), 5 * state.shape[1])


def _fused_gru_cell_backward(gradient: Tensor, workspace: Tensor, has_bias: bool) -> tuple[Tensor, ...]:
    gates = gradient.new_empty(len(gradient), 3 * gradient.shape[1])
    return gates, torch.empty_like(gates), torch.empty_like(gradient), gates.sum(0), gates.sum(0)


_library = torch.library.Library("aten", "IMPL")
_library.impl("_thnn_fused_gru_cell", _fused_gru_cell, "Meta")
_library.impl("_thnn_fused_gru_cell_backward", _fused_gru_cell_backward, "Meta")


@contextmanager
def on_idle_gpu(accelerator: Accelerator) -> Iterator[Accelerator]:
    """Makes the accelerator, and the optimizers made inside, take the meta device for a GPU."""
    devices = [GPU.type, "cuda", "cpu"]
    autocast = torch.autocast
    with (
        # Autocast has no meta device. Nothing is computed there, so the precision does not matter.
        patch("torch.autocast", lambda kind, *a, **k: nullcontext() if kind == GPU.type else autocast(kind, *a, **k)),
        patch("torch._VF.gru_cell", _gru_cell),
        patch.object(_foreach_utils, "_get_foreach_kernels_supported_devices", lambda: devices),
        patch("torch.optim.optimizer._get_fused_kernels_supported_devices", lambda: devices),
        patch("torch.optim.optimizer._get_foreach_kernels_supported_devices", lambda: devices),
    ):
        accelerator.state.device = PartialState().device = GPU
        # The optimizer's parameters stay the network's as it moves to the device, as they do on a GPU.
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            yield accelerator
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
            AcceleratorState._reset_state(reset_partial_state=True)
