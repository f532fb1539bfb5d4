"""CI tests the versions that setup.cfg admits."""

import configparser
import importlib.metadata
import re
from pathlib import Path

from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parent.parent


def requirements() -> list[Requirement]:
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    listed = config["options"]["install_requires"] + config["options.extras_require"]["test"]
    return [Requirement(line) for line in listed.split("\n") if line.strip()]


def test_every_lower_bound_is_a_version_that_is_tested():
    pinned = dict(
        re.findall(r"^([\w-]+)==(\S+)$", (REPOSITORY / "requirements" / "oldest.txt").read_text(), re.MULTILINE)
    )
    assert {requirement.name: f">={pinned.get(requirement.name)}" for requirement in requirements()} == {
        requirement.name: str(requirement.specifier) for requirement in requirements()
    }
    assert len(pinned) == len(requirements())


def test_the_installed_versions_are_admitted():
    for requirement in requirements():
        assert requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True)
