"""Another revision of prefcore beside this one, to be measured in turn with it."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

NATIVE = ("csrc", "bindings", "CMakeLists.txt")


@contextlib.contextmanager
def revision(ref: str, root: Path) -> Iterator[Path]:
    """A folder from which ``prefcore`` of the git revision ``ref`` of ``root`` can be imported; gone afterwards."""
    found = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}"],
        capture_output=True,
        text=True,
    )
    if found.returncode:
        raise SystemExit(f"--against: git knows no revision {ref!r}")
    commit = found.stdout.strip()
    with tempfile.TemporaryDirectory(prefix="bench-against-") as folder:
        tree, site = Path(folder, "tree"), Path(folder, "site")
        git(root, "worktree", "add", "--quiet", "--detach", str(tree), commit)
        try:
            yield build(tree, site) if native_differs(root, commit) else borrow(tree)
        finally:
            git(root, "worktree", "remove", "--force", str(tree))


def git(root: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(root), *arguments], check=True)


def native_differs(root: Path, commit: str) -> bool:
    """Whether this tree, as it lies there, has other C++ or CUDA sources."""
    done = subprocess.run(["git", "-C", str(root), "diff", "--quiet", commit, "--", *NATIVE])
    return done.returncode != 0


def borrow(tree: Path) -> Path:
    """The tree itself, with the extension of this prefcore, whose sources are the same."""
    spec = importlib.util.find_spec("prefcore._C")
    if spec is None or spec.origin is None:
        raise SystemExit("--against: prefcore's extension is not built here; install prefcore first")
    shutil.copy(spec.origin, tree / "prefcore")
    return tree


def build(tree: Path, site: Path) -> Path:
    print("building the extension of the other revision", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(tree)]
    if importlib.util.find_spec("scikit_build_core") is not None:
        command.insert(4, "--no-build-isolation")
    if subprocess.run(command).returncode:
        raise SystemExit("--against: the other revision cannot be built")
    return site
