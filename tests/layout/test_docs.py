"""What the documents show runs, and what the sources name is documented."""

import ast
import doctest
import importlib
import json
import os
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
SOURCES = sorted(
    Path(folder, file).relative_to(ROOT)
    for top in ("prefcore", "csrc", "bindings")
    for folder, _, files in os.walk(ROOT / top, followlinks=True)
    for file in files
)
PYTHON = [path for path in SOURCES if path.suffix == ".py"]


def test_the_readme_snippets_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = README.read_text()
    # The snippets for trainers are run where those are, each alone: tests/trl/test_readme.py, tests/adapters.
    trainers = re.search(r"^## Use it in your trainer$.*?(?=^## )", text, re.M | re.S)
    assert trainers
    snippets = list(re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S))
    names: dict[str, object] = {}
    for snippet in snippets:
        if trainers.start() < snippet.start() < trainers.end():
            continue
        before = text[: snippet.start(1)].count("\n")
        exec(compile("\n" * before + snippet.group(1), str(README), "exec"), names)


def test_the_readme_tables_are_those_of_their_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    text = README.read_text()
    named = re.findall(r"bench/results/[\w.-]+\.json", text)
    assert named
    for name in named:
        report = json.loads((ROOT / name).read_text())
        assert report["command"] in text
        module = report["command"].split()[2]
        if module in ("bench", "bench.suite"):  # too many for a README
            tables = importlib.import_module("bench.report").tables(report)
            assert any(table in text for table in tables), f"no table is one of {name}"
        elif module != "bench.pictures":
            markdown = importlib.import_module(module).markdown
            assert markdown(report) in text, f"the table is not that of {name}"


def test_the_readme_pictures_are_there_and_small():
    pictures = re.findall(r"!\[[^]]+\]\(([\w/.-]+)\)", README.read_text())
    assert pictures
    for name in pictures:
        content = (ROOT / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) < 150_000, name


def test_the_pictures_can_be_drawn_again(tmp_path, monkeypatch):
    for package in ("matplotlib", "transformers"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(ROOT)
    from bench import pictures

    batch = pictures.batch_of("share")
    texts = [len(text.split()) for prompt, responses in pictures.GROUPS for text in (prompt, *responses)]
    assert batch.layout.lengths.tolist() == texts
    pictures.draw_layout(tmp_path / "layout.png")
    threads = torch.get_num_threads()
    try:
        report = pictures.measure(tuning_steps=1, train_pairs=64)
    finally:
        torch.set_num_threads(threads)
    assert report.keys() == json.loads(pictures.RESULTS.read_text()).keys()
    pictures.draw_sharing(report, tmp_path / "sharing.png")
    for name in ("layout", "sharing"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("path", PYTHON, ids=str)
def test_docstring_examples_run(path):
    text = path.read_text()
    docstrings = [
        ast.get_docstring(node) or ""
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    ]
    unrun = [d for d in docstrings if "```" in d or "code-block::" in d]
    assert not unrun, "write examples as >>>, so that they are run"
    if not any(">>>" in d for d in docstrings):
        return
    name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert results.attempted
    assert not results.failed


def test_every_environment_variable_is_in_the_table_and_every_row_is_read(tracked):
    rows = set(re.findall(r"^\| `(PREFCORE_\w+)", README.read_text(), re.M))
    code = [ROOT / path for path in tracked if Path(path).suffix in {".py", ".h", ".cpp", ".cu", ".cuh"}]
    read = {name for path in code for name in re.findall(r"[\"'](PREFCORE_[A-Z_]+)[\"']", path.read_text())}
    assert rows == read


def text_of(path: str) -> str:
    try:
        return (ROOT / path).read_text()
    except UnicodeDecodeError:
        return ""  # a picture


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?<![\w.}*])/(?:work|root|home/\w+|tmp/w)(?=/|\b)",
        r"pypi\.org|pythonhosted\.|npmjs\.|debian\.org|crates\.io|anaconda\.|download\.pytorch",
    ],
    ids=["a path of someone's machine", "a host that serves packages"],
)
def test_no_file_names(tracked, pattern):
    files = [path for path in tracked if not (ROOT / path).is_symlink()]
    named = [f"{path}: {match.group()}" for path in files for match in re.finditer(pattern, text_of(path))]
    assert not named
