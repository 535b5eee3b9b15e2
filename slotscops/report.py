"""`python -m slotscops.report RUN`: writes the page of a run again."""

from slotscops.core import console
from slotscops.train.run.page import main

if __name__ == "__main__":
    console.run_command(main)
