"""`python -m slotscops.app`: a local page onto which one drops a photo to see its parts."""

from slotscops.core import console
from slotscops.segment.app import main

if __name__ == "__main__":
    console.run_command(main)
