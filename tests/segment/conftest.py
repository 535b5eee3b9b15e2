from pathlib import Path

import pytest
from small_runs import save_resnet_run


@pytest.fixture(scope="session")
def varied_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an untrained network that finds all of its five parts. Not to be changed."""
    return save_resnet_run(tmp_path_factory.mktemp("varied") / "run", "decoder.maps=head_only")
