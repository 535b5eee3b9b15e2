"""A batch becomes part maps: encoder, slots, decoder and part basis."""

from slotscops.model.slots import SlotAttention

__all__ = ["SlotAttention"]
