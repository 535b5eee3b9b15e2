"""Trains from a checkout: `accelerate launch launch/train.py --config configs/toy.yaml [train.total_steps=500 ...]`.

The same as `accelerate launch -m slotscops.train`, which also works where only the package is installed.
"""

from slotscops.core import console
from slotscops.train import __main__ as training


def main() -> int:
    return training.main(prog="accelerate launch launch/train.py")


if __name__ == "__main__":
    console.run_command(main)
