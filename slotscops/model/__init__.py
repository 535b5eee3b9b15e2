"""The model: encoder, slots, decoder and part basis turn a batch into part maps."""

from slotscops.model.slots import SlotAttention

__all__ = ["SlotAttention"]
