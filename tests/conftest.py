"""What all tests share: one thread, a throw-away store, small data."""

import os
import tempfile
from dataclasses import replace

os.environ.setdefault("DEMEM_STORE", tempfile.mkdtemp(prefix="demem-tests-"))

import pytest
import torch
from hypothesis import settings

from demem_lab import data
from demem_lab.store import Store

torch.set_num_threads(1)
settings.register_profile("unhurried", deadline=None)  # an example that is slow on a busy machine is no failure
settings.load_profile("unhurried")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """An experiment of seconds, with a store that the tests of one file share."""
    from demem_lab.experiment import profile

    small = profile("smoke").experiment(subset=120, epochs=2, progress=False)
    return replace(small, store=Store(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="session")
def digits():
    return data.load(subset=200)


@pytest.fixture(scope="session")
def tiny():
    """24 images of 3 classes, 1x4x4: small enough for slow oracles."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(24, 1, 4, 4, generator=generator)
    y = torch.arange(24) % 3
    return data.Dataset("tiny", x, y, ("a", "b", "c"), "made", 0.1)
