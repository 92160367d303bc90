"""One op has one name in every folder, and the top level stays as it is."""

import os
import re
from pathlib import Path

import pytest

from prefcore._impl import IMPLEMENTATIONS

ROOT = Path(__file__).parents[2]

TOP = {
    *("pyproject.toml", "csrc", "prefcore", "kernels", "bindings", "tests", "bench", "examples", "README.md"),
    *("CMakeLists.txt", "Makefile", "constraints.txt", "constraints-oldest.txt"),
    *("LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"),
    *(".ci", ".clang-format", ".gitignore", ".pre-commit-config.yaml"),
}
# Ops without a kernel of their own: the one whose kernel they run.
COMPOSED = {
    "linear_logprobs": "logprobs",
    "linear_loss": "logprobs",
    "linear_divergence": "divergence",
    "aggregate": "sequence_reduce",
}

pytestmark = pytest.mark.quick


def test_the_top_level_holds_what_it_must_and_no_more(tracked):
    assert {path.partition("/")[0] for path in tracked} == TOP


def test_folders_beside_the_package_are_no_packages():
    shadows = [f for top in ("kernels", "tests", "bench", "examples") for f in (ROOT / top).rglob("__init__.py")]
    assert not shadows, "these would shadow other packages, Hugging Face's `kernels` among them"


def test_kernels_are_linked_into_the_package():
    link = ROOT / "prefcore" / "kernels"
    assert link.is_symlink()
    assert os.readlink(link) == "../kernels"
    assert link.is_dir()


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_an_op_has_one_name_in_every_folder(op):
    kernel = COMPOSED.get(op, op)
    needed = [f"prefcore/ops/{op}.py", f"prefcore/reference/{op}.py", f"tests/ops/test_{op}.py"]
    if "triton" in IMPLEMENTATIONS[op].values():
        needed.append(f"kernels/{kernel}.py")
    if "cuda" in IMPLEMENTATIONS[op].values():
        needed += [f"csrc/core/{kernel}.h", f"csrc/cuda/{kernel}.cu"]
    if "cpu" in IMPLEMENTATIONS[op].values():
        needed.append(f"csrc/cpu/{kernel}.cpp")
    absent = [path for path in needed if not (ROOT / path).is_file()]
    assert not absent, f"{op} lacks {absent}"


def test_lower_bounds_are_the_versions_that_the_oldest_tests_install():
    pyproject = (ROOT / "pyproject.toml").read_text()
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)$", (ROOT / "constraints-oldest.txt").read_text(), re.M))
    bounds = re.findall(r'"([\w-]+)>=([\w.]+)', pyproject)
    del pins["torch"]  # its oldest version is proven on a GPU machine
    assert set(pins) <= {name for name, _ in bounds}

    def plain(version):
        return re.sub(r"(\.0)+$", "", version)

    differing = {n: (bound, pins[n]) for n, bound in bounds if n in pins and plain(bound) != plain(pins[n])}
    assert not differing, f"bound in pyproject.toml, pin in constraints-oldest.txt: {differing}"
