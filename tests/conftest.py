"""Every test runs on a CPU, without a network, and from the repository's root."""

import os
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "MPLBACKEND": "Agg",
    "ACCELERATE_USE_CPU": "true",
}
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # hundreds of processes import the same

from trainlib.runtime.watchdog import Watchdog  # noqa: E402


@pytest.fixture(autouse=True)
def runs_of_this_process_are_not_watched_any_longer(monkeypatch):
    """A script's ``main`` that a test calls has no end at which its watch ends, too: half an hour
    later it would end the process of the tests."""
    started, start = [], Watchdog.start
    monkeypatch.setattr(Watchdog, "start", lambda self: started.append(self) or start(self))
    yield
    for watchdog in started:
        watchdog.stop()


@pytest.fixture
def image_folder(tmp_path) -> str:
    """29 colour images of 3 classes."""
    random = np.random.default_rng(0)
    for number in range(29):
        file = tmp_path / "images" / f"class {number % 3}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (6, 5, 3), dtype=np.uint8)).save(file)
    return str(tmp_path / "images")


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """A folder to work in, with caches of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "tokens"))
    datasets.disable_progress_bars()
    monkeypatch.chdir(tmp_path)
