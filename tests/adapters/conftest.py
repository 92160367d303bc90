"""A padded batch with everything a trainer's mask may do, and packages that pretend to be a peer."""

import importlib
import importlib.metadata
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch

# Of B = 6 responses: whole, cut, with a tool's tokens within, of one token, without any, and beginning late.
MASK = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 1, 0],
        [1, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 1],
    ]
)


class Batch:
    """Log-probs, advantages, weights and values ``[B, L]``, with ``hidden`` where masked."""

    def __init__(self, mask=MASK, dtype=torch.float64, hidden=float("nan"), seed=0):
        generator = torch.Generator().manual_seed(seed)

        def draw(low, high):
            drawn = low + (high - low) * torch.rand(mask.shape, generator=generator, dtype=torch.float64)
            return drawn.to(dtype).masked_fill(mask == 0, hidden)

        self.mask = mask
        self.logps = draw(-3, -1.2)  # so that all log-probs are negative
        self.old_logps = self.logps + draw(-0.6, 0.6)
        self.ref_logps = self.logps + draw(-1, 1)
        self.advantages = draw(-2, 2)
        if mask.numel():
            self.logps[0, 0] = self.old_logps[0, 0] - 3
            self.advantages[0, 1], self.advantages[0, 2] = 0, -1  # without a sign; for the dual clip
            self.old_logps[0, 2] = self.logps[0, 2] - 2
        self.weights, self.values, self.old_values = draw(0, 2), draw(-2, 2), draw(-2, 2)
        self.rewards = draw(-1, 1)

    def rows(self, *tensors):
        """The kept tokens of each response, of each tensor."""
        return [tuple(t[i][self.mask[i] != 0] for t in tensors) for i in range(len(self.mask))]


@pytest.fixture
def readme_snippet():
    """README's snippet for a trainer that imports an adapter of that name; each has under ten lines."""
    text = (Path(__file__).parents[2] / "README.md").read_text()

    def find(adapter):
        snippets = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
        (snippet,) = [x for x in snippets if f"from prefcore.adapters import {adapter}" in x]
        assert len(snippet.strip().splitlines()) < 10
        return snippet

    return find


@pytest.fixture
def assert_signatures():
    """That an adapter offers the functions, or classes with methods, of a table, by its signatures."""

    def check(adapter, signatures):
        assert {place: set(names) for place, names in adapter.ADAPTERS.items()} == {
            place: set(names) for place, names in signatures.items()
        }
        for place, names in signatures.items():
            for name, signature in names.items():
                found = adapter.ADAPTERS[place][name]
                assert getattr(adapter, name) is found
                methods = signature if isinstance(signature, dict) else {None: signature}
                for method, expected in methods.items():
                    function = found if method is None else getattr(found, method)
                    bare = [
                        str(one.replace(annotation=inspect.Parameter.empty))
                        for one in inspect.signature(function).parameters.values()
                    ]
                    assert ", ".join(bare) == expected, (name, method)

    return check


@pytest.fixture
def make_batch():
    return Batch


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """Write a package of functions and classes that only have signatures, and import it."""

    def build(package, version, modules):
        root = tmp_path / package
        for place, source in modules.items():
            path = tmp_path.joinpath(*place.split("."))
            path.parent.mkdir(parents=True, exist_ok=True)
            for folder in (path.parent, *path.parent.parents):
                if folder == tmp_path:
                    break
                (folder / "__init__.py").touch()
            path.with_suffix(".py").write_text(source)
        assert root.is_dir()
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(str(tmp_path))
        found = importlib.metadata.version
        monkeypatch.setattr("prefcore._patching.version", lambda name: version if name == package else found(name))
        importlib.invalidate_caches()

    yield build
    for name in [name for name in sys.modules if name.partition(".")[0] in ("verl", "openrlhf")]:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
