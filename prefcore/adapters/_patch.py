"""Functions in the place of a package's own, found by identity wherever it has imported them to."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any


class Patch:
    """What stands in for what, in one package of known versions; in a ``with`` it is disabled at the end."""

    def __init__(self, package: str, versions: tuple[str, ...], ours: Mapping[str, Mapping[str, Any]]) -> None:
        self._package, self._versions, self._ours = package, versions, ours
        self._theirs: dict[int, tuple[Any, Any]] = {}  # id of ours: ours and theirs

    def enable(self, skip: Collection[str] = ()) -> Patch:
        unknown = set(skip) - {name for names in self._ours.values() for name in names}
        if unknown:
            raise ValueError(f"skip names what is not replaced: {sorted(unknown)}")
        self.disable()
        try:
            found = version(self._package)
        except PackageNotFoundError as error:
            raise ImportError(f"{self._package} is not installed") from error
        if found not in self._versions:
            raise RuntimeError(f"{self._package} {found}: what is replaced was read in {', '.join(self._versions)}")
        pairs = []
        for place, names in self._ours.items():
            module = importlib.import_module(place)
            for name, ours in names.items():
                theirs = getattr(module, name, None)
                if theirs is None:
                    raise RuntimeError(f"{self._package} {found} has no {place}.{name}")
                _check_signature(f"{place}.{name}", ours, theirs)
                if name not in skip:
                    pairs.append((ours, theirs))
        self._theirs = {id(ours): (ours, theirs) for ours, theirs in pairs}
        self._replace({id(theirs): ours for ours, theirs in pairs})
        return self

    def disable(self) -> None:
        self._replace({key: theirs for key, (_, theirs) in self._theirs.items()})
        self._theirs = {}

    def enabled(self) -> bool:
        return bool(self._theirs)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.disable()

    def _replace(self, by_id: Mapping[int, Any]) -> None:
        """In every loaded module of the package, and in its dictionaries, which may be registries."""
        for name, module in list(sys.modules.items()):
            if module is None or name.partition(".")[0] != self._package:
                continue
            for table in [vars(module), *(value for value in vars(module).values() if type(value) is dict)]:
                for key, value in list(table.items()):
                    if id(value) in by_id:
                        table[key] = by_id[id(value)]


def _check_signature(name: str, ours: Any, theirs: Any) -> None:
    if isinstance(ours, type):
        for method in ("__init__", "forward"):
            _check_signature(f"{name}.{method}", getattr(ours, method), getattr(theirs, method))
        return
    owner = getattr(theirs, "__self__", None)
    if isinstance(owner, type):  # the apply of an autograd.Function, whose forward also has ctx
        expected = parameters(getattr(owner, "forward"))[1:]  # noqa: B009
    else:
        expected = parameters(theirs)
    if parameters(ours) != expected:
        raise RuntimeError(f"{name} has the signature {expected}, not {parameters(ours)}")


def parameters(function: Any) -> list[str]:
    """As ``name`` or ``name=default``, without annotations."""
    found = inspect.signature(function).parameters.values()
    return [str(one.replace(annotation=inspect.Parameter.empty)) for one in found]
