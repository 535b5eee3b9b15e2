"""Speed and memory, measured where the user is: `python -m slotscops.benchmark loss | loader | step`."""
