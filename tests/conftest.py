"""What all tests share: no internet, few threads, and the optional folder of real clips."""

import os
from pathlib import Path

# Set before torch or huggingface_hub are imported: tests never reach the internet, and two test processes share two cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def poodle_data() -> Path:
    """Folder of real clips and CamVid; skips where it is absent (it is never part of the repository)."""
    folder = Path(os.environ.get("POODLE_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "videos").is_dir():
        pytest.skip(f"real clips not found in {folder}; set POODLE_DATA to their folder to run this test")
    return folder
