"""`python -m slotscops.export`: writes a trained model as ONNX or as PyTorch's exported program."""

from slotscops.core import console
from slotscops.segment.export import main

if __name__ == "__main__":
    console.run_command(main)
