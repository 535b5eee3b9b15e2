"""Networks of timm (PyTorch Image Models): their names, their own weights and how they want their pixels.

timm is an optional package and is imported only where a setting names one of its networks, as `timm/NAME`.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from slotscops.core import console
from slotscops.core.errors import UserError, first_line, suggest

PREFIX = "timm/"
OWN_WEIGHTS = ("imagenet", "pretrained")  # what settings call a network's own weights
_told_licences: set[str] = set()


def is_timm(network: str) -> bool:
    """Whether a setting names a network of timm, such as `timm/vit_small_patch14_dinov2.lvd142m`."""
    return network.startswith(PREFIX)


def build_timm(network: str, *choices: dict[str, Any]) -> nn.Module:
    """Builds a network without a classifier. Its weights are random until others are loaded.

    Args:
        network: `timm/NAME`.
        choices: sets of further arguments of `timm.create_model`. The first one that the network takes is used, or no
            further arguments if it takes none of them.

    Raises:
        UserError: timm is not installed or has no such network.
    """
    timm = import_timm(network)
    name = network.removeprefix(PREFIX)
    if not timm.is_model(name.partition(".")[0]):
        raise UserError(f"network '{network}': timm {timm.__version__} has no such network{_hint(timm, name)}")
    for chosen in (*choices, {}):
        try:
            module: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **chosen)
        except TypeError:  # raised for an option that this family of networks does not have
            continue
        except Exception as error:  # an unknown tag after the dot raises RuntimeError
            raise UserError(f"network '{network}': timm cannot build it ({first_line(error)})") from None
        return module
    raise UserError(f"network '{network}': timm cannot build it without a classifier; choose another")


def mean_and_std(network: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """RGB mean and standard deviation for which the network was trained, for pixels in [0, 1]."""
    settings = _settings(network)
    return tuple(settings.mean), tuple(settings.std)


def usual_size(network: str) -> int:
    """Side of the photos for which the network was made, pixels."""
    return int(_settings(network).input_size[-1])


class TimmWeights:
    """The network's own weights: what timm downloads for it."""

    def __init__(self, network: str) -> None:
        self._network = network
        settings = _settings(network)
        self.url = str(settings.hf_hub_id or settings.url or "weights, of which timm knows none")
        self.licence: str | None = settings.license or None  # as timm knows it

    def get_state_dict(self, *, progress: bool, check_hash: bool, weights_only: bool) -> Mapping[str, Tensor]:
        """The tensors by name. The arguments are those of torchvision's method; timm decides on them itself."""
        timm = import_timm(self._network)
        name = self._network.removeprefix(PREFIX)
        tensors: Mapping[str, Tensor] = timm.create_model(name, pretrained=True, num_classes=0).state_dict()
        if self.licence and self._network not in _told_licences and console.is_main():
            _told_licences.add(self._network)
            console.warn(f"{self._network}: its weights have the licence {self.licence}, as timm says")
        return tensors


def own_licence(network: str, weights: str) -> str | None:
    """The licence of a network's own weights, as timm knows it.

    Args:
        network: `timm/NAME`, or any other name.
        weights: where the weights came from, as settings name it. Of a file or a package, timm knows no licence.

    Returns:
        Such as `apache-2.0`; None if it is not known, timm is not installed, or the weights are not timm's own.
    """
    if weights not in OWN_WEIGHTS or not is_timm(network):
        return None
    try:
        return TimmWeights(network).licence
    except UserError:
        return None


def import_timm(network: str) -> Any:
    """The package timm.

    Raises:
        UserError: it is not installed.
    """
    try:
        import timm
    except ImportError:
        raise UserError(f"network '{network}': needs timm; install it with pip install 'slotscops[timm]'") from None
    return timm


def _settings(network: str) -> Any:
    """What timm knows of a network: how it was trained, and where its weights are. An object of defaults if nothing."""
    timm = import_timm(network)
    return timm.get_pretrained_cfg(network.removeprefix(PREFIX)) or timm.models.PretrainedCfg()


def _hint(timm: Any, name: str) -> str:
    return suggest(name, timm.list_models() + timm.list_pretrained())
