"""Rigs that close themselves."""

import pytest
from tree_rig import Rig


@pytest.fixture
def make_rig():
    """Build rigs with :class:`tree_rig.Rig`'s arguments; all are closed at the end."""
    rigs: list[Rig] = []

    def make(*args, **kwargs) -> Rig:
        rigs.append(Rig(*args, **kwargs))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()
