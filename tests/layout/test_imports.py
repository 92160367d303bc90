"""Imports point one way, and importing prefcore needs torch alone."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# The layers from the lowest upwards; a module belongs to its longest prefix here.
LAYERS = (
    ("prefcore.ops._spec", "prefcore.testing"),  # and prefcore's own private modules
    ("prefcore.kernels",),
    ("prefcore.reference",),
    ("prefcore.ops",),
    ("prefcore",),  # the package's own __init__ re-exports the ops
    ("prefcore.losses", "prefcore.rewards", "prefcore.advantages", "prefcore.outer", "prefcore.distributed"),
    ("prefcore.data",),
    ("prefcore.hf", "prefcore.trl", "prefcore.nn", "prefcore.adapters", "prefcore.cli", "prefcore.__main__"),
)
LEVEL = {prefix: level for level, prefixes in enumerate(LAYERS) for prefix in prefixes}
# The one layer that may import each of these.
CONFINED = {
    "triton": "prefcore.kernels",
    **dict.fromkeys(("transformers", "accelerate", "peft", "trl", "datasets", "matplotlib"), "prefcore.hf"),
}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, through the symlink to kernels/ too."""
    found = {}
    for folder, _, files in os.walk(ROOT / "prefcore", followlinks=True):
        for file in files:
            path = Path(folder, file)
            if path.suffix == ".py":
                parts = path.relative_to(ROOT).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def level(module: str) -> int:
    parts = module.split(".")
    if len(parts) > 1 and parts[1].startswith("_") and module not in LEVEL:
        return 0
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next(LEVEL[prefix] for prefix in prefixes if prefix in LEVEL)


def imports(name: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and module of every import in ``tree``, those inside functions included."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])
            for alias in node.names:
                member = f"{base}.{alias.name}"
                yield node.lineno, member if member in MODULES or member in LEVEL else base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


@pytest.mark.quick
@pytest.mark.parametrize("name", MODULES)
def test_imports_go_downward_only(name):
    wrong = []
    for line, target in imports(name, ast.parse(MODULES[name].read_text())):
        top = target.partition(".")[0]
        if top == "prefcore" and level(target) > level(name):
            reason = "is in a higher layer"
        elif top in CONFINED and level(name) != level(CONFINED[top]):
            reason = f"belongs to the layer of {CONFINED[top]}"
        elif top == "kernels":
            reason = "is Hugging Face's; ours is prefcore.kernels"
        else:
            continue
        wrong.append(f"{MODULES[name]}:{line} imports {target}, which {reason}")
    assert not wrong, "\n".join(wrong)


def test_every_top_level_module_has_a_layer():
    known = {prefix.split(".")[1] for prefix in LEVEL if "." in prefix}
    public = {top for name in MODULES if "." in name and not (top := name.split(".")[1]).startswith("_")}
    assert public <= known


@pytest.mark.quick
def test_importing_prefcore_imports_nothing_heavy():
    code = "import sys, prefcore; print(*{m.partition('.')[0] for m in sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = set(CONFINED) | {"prefcore.kernels", "pandas", "scipy"}
    assert not heavy & set(run.stdout.split())
