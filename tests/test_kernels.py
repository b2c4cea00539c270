"""Group normalisation's own kernels (interpreted_kernels.py), in a process of their own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="this torch comes without Triton")
def test_all_that_is_said_of_them():
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted_kernels.py")]
    found = subprocess.run(command, cwd=HERE.parent, env=os.environ | interpreted, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-1000:]
    assert " passed" in found.stdout and "skipped" not in found.stdout
