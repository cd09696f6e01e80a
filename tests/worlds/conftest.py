"""Models that the tests of a process share."""

from __future__ import annotations

import functools

import pytest

from tests.helpers import reference


@pytest.fixture(scope="session")
def model_of(tmp_path_factory):
    """`model_of(tied, layers)`: the folder of a random float32 model, made once."""

    @functools.cache
    def make(tied, layers=2):
        return reference.save_model(
            tmp_path_factory.mktemp("model"), tied=tied, seed=3, layers=layers
        )

    return make
