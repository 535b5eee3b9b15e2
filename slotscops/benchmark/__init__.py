"""Speed and memory, measured on the user's machine by `python -m slotscops.benchmark`."""

import os

# PyTorch's profiler, which counts the memory, prints many lines; it reads these variables when PyTorch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
