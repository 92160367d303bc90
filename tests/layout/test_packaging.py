"""What an installation puts where, from a wheel and from an editable install."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

LOOK = """
import importlib.util
import prefcore, prefcore._C
hf = importlib.util.find_spec("kernels")
print(hf and hf.origin, prefcore.__file__, prefcore._C.__file__,
      *importlib.util.find_spec("prefcore.kernels").submodule_search_locations)
"""


@pytest.fixture(scope="module")
def build_options(tmp_path_factory):
    # What is compiled is not the question here: .ci/run has done it, in the folder that a build takes of itself; else
    # it is done without CUDA, in a folder of its own.
    common = ["--no-build-isolation", "--no-deps"]
    if "PREFCORE_WHEEL" in os.environ:
        return common
    return [
        *common,
        f"--config-settings=build-dir={tmp_path_factory.mktemp('build')}",
        "--config-settings=cmake.define.PREFCORE_CUDA=OFF",
    ]


def pip(*args):
    run = subprocess.run([sys.executable, "-m", "pip", *args], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, build_options):
    if "PREFCORE_WHEEL" in os.environ:
        return Path(os.environ["PREFCORE_WHEEL"])
    folder = tmp_path_factory.mktemp("dist")
    pip("wheel", "--quiet", *build_options, "--wheel-dir", str(folder), ".")
    return next(folder.glob("*.whl"))


def installed(folder: Path, *what: str) -> tuple[set[str], list[Path]]:
    """Install into a new environment beside another package named `kernels`.

    Returns what came to the top of site-packages, and where prefcore, its extension and its kernels are found.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    pip("install", "--quiet", "--ignore-installed", "--no-compile", f"--prefix={folder}", *what)
    top = {path.name for path in site.iterdir() if path.suffix != ".dist-info"}
    # torch and the rest come from where this interpreter has them. A .pth file in a folder that a .pth file
    # names is not read, so an editable prefcore there stays unseen.
    (site / "outer.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").touch()
    run = subprocess.run([folder / "bin" / "python", "-c", LOOK], capture_output=True, text=True, cwd=folder)
    assert run.returncode == 0, run.stderr
    kernels, *found = run.stdout.split()
    assert kernels == str(site / "kernels" / "__init__.py")
    return top, [Path(path) for path in found]


def test_a_wheel_holds_prefcore_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    info = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    assert {name.partition("/")[0] for name in names} == {"prefcore", info}
    kernels = {f"prefcore/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert kernels
    assert kernels <= set(names)
    assert any(name.startswith("prefcore/_C.") for name in names)


def test_an_installed_wheel_has_its_kernels_and_leaves_other_names_alone(tmp_path, wheel):
    top, found = installed(tmp_path, "--no-deps", str(wheel))
    assert top == {"prefcore"}
    assert all(path.is_relative_to(tmp_path) for path in found), found


def test_an_editable_install_has_its_kernels_and_leaves_other_names_alone(tmp_path, build_options):
    top, (package, extension, *kernels) = installed(tmp_path, *build_options, "--editable", ".")
    assert top == {"prefcore", "_editable_skbc_prefcore.py", "_editable_skbc_prefcore.pth"}
    assert package == ROOT / "prefcore" / "__init__.py"
    assert extension.is_relative_to(tmp_path)
    assert (ROOT / "kernels") in [path.resolve() for path in kernels]
