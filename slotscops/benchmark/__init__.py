"""Speed and memory, measured where the user is: `python -m slotscops.benchmark loss | loader | step`."""

import os

# PyTorch's profiler, which counts the memory, is talkative; it reads this when PyTorch is first imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
