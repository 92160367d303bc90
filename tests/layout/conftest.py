import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def tracked() -> list[str]:
    """The project's files, relative to its root: what git tracks, and what it would."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip(f"no git checkout, so nothing says which files are the project's: {listing.stderr}")
    paths = set(listing.stdout.rstrip("\0").split("\0"))
    return sorted(path for path in paths if (ROOT / path).is_symlink() or (ROOT / path).is_file())
