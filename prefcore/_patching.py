"""Objects in the place of another package's own, found by identity wherever it has imported them to.

Packages import functions by name from one module into another, so one is replaced by its identity in every loaded
module. The modules that define them are among those, so that what is imported later gets ours too.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

from torch.autograd import Function


class Target(NamedTuple):
    """An object of another package, and what stands for it."""

    module: str
    name: str  # "Class.function" for a class's own
    ours: Any
    # By which it is called; None: those of ours.
    parameters: tuple[str, ...] | None = None
    # Replaced under this name, and nowhere else.
    alone: bool = False


class Package(NamedTuple):
    """Another package, in the versions of which the targets are known."""

    name: str
    wanted: str
    version: Callable[[], str]
    fits: Callable[[str], bool]


class Patch(AbstractContextManager):
    """Replaces the targets from :meth:`enable` until :meth:`disable`, which leaving a ``with`` calls.

    Args:
        owner: ours, for messages.
        package: theirs.
        targets: called when enabled.
        later: targets of modules that enabling must not import: they are replaced when these are loaded. ``ours`` takes
            the package's own and returns what stands for it. One that is not as expected is left, with a warning.
        own: to be filled with the package's own objects by the names of ours, before these are called.
        defaults: whether parameters' defaults must be the same.
    """

    def __init__(
        self,
        owner: str,
        package: Package,
        targets: Callable[[], Sequence[Target]],
        *,
        later: Sequence[Target] = (),
        own: dict[str, Any] | None = None,
        defaults: bool = True,
    ) -> None:
        self.lock = threading.RLock()
        self._owner, self._package, self._targets, self._defaults = owner, package, targets, defaults
        self._later = {target.module: target for target in later}
        self._finder = _Finder(self)
        self._own = {} if own is None else own
        self._found: list[tuple[Target, Any]] | None = None  # with the package's own
        self._skip: frozenset[str] = frozenset()
        self._undo: list[Callable[[], None]] = []

    def enable(self, skip: Collection[str] = ()) -> Patch:
        """All targets but those named by ``skip``; again, it changes that choice and serves what was reloaded."""
        with self.lock:
            if not self._in_place():
                self.disable()
            if self._found is not None and self._skip == frozenset(skip):
                return self
            found = self._look() if self._found is None else self._found
            unknown = set(skip) - {target.name for target, _ in found}
            if unknown:
                raise ValueError(f"skip names what is not replaced: {sorted(unknown)}")
            self.disable()
            self._own.update({target.ours.__name__: theirs for target, theirs in found})
            self._found, self._skip = found, frozenset(skip)
            pairs = [(target, theirs) for target, theirs in found if target.name not in skip]
            self._replace({id(theirs): target.ours for target, theirs in pairs if not target.alone})
            for target, _ in pairs:
                if target.alone:
                    setattr(sys.modules[target.module], target.name, target.ours)
            if self._later:
                sys.meta_path.insert(0, self._finder)
            for module in self._later.keys() & sys.modules.keys():
                self.replace_later(self._later[module])
        return self

    def disable(self) -> None:
        """Put the package's own objects back, in every module that holds ours; nothing where not enabled."""
        with self.lock:
            if self._found is None:
                return
            if self._later:
                sys.meta_path.remove(self._finder)
            while self._undo:
                self._undo.pop()()
            self._replace({id(target.ours): theirs for target, theirs in self._found})
            self._found = None

    def enabled(self) -> bool:
        return self._found is not None

    def _in_place(self) -> bool:
        """False where modules were loaded anew since, as in a notebook: these hold the package's own."""
        wanted = [target for target, _ in self._found or () if target.name not in self._skip]
        return all(vars(holder).get(name) is one.ours for one in wanted for holder, name in [self._place(one)])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.disable()

    def _look(self) -> list[tuple[Target, Any]]:
        package = self._package
        looked = f"{self._owner}.enable() looked for {package.name} {package.wanted}"
        try:
            found = package.version()
        except ImportError as error:
            raise ImportError(f"{looked}: {error}") from error
        if not package.fits(found):
            raise RuntimeError(f"{looked} and found {found}")
        return [(target, self._find(target)) for target in self._targets()]

    def _find(self, target: Target) -> Any:
        """The package's own object, as its module or class holds it, or a refusal."""
        expected = target.parameters or called(target.ours, self._defaults)
        package = self._package
        refusal = f"{self._owner} looked for {target.module}.{target.name}({', '.join(expected)}) in {package.name} "
        refusal += package.version()
        try:
            importlib.import_module(target.module)
        except ImportError as error:
            if (error.name or "").partition(".")[0] == package.name:
                raise RuntimeError(f"{refusal} and did not find it: {error!r}") from error
            raise ImportError(f"{refusal}, which cannot be imported: {error}", name=error.name) from error
        try:
            holder, name = self._place(target)
            found = vars(holder)[name]
        except (AttributeError, KeyError) as error:
            raise RuntimeError(f"{refusal} and did not find it: {error!r}") from error
        try:
            parameters = called(found, self._defaults)
        except (TypeError, ValueError) as error:
            raise RuntimeError(f"{refusal} and cannot read the signature of what is there: {error}") from error
        if parameters != expected:
            raise RuntimeError(f"{refusal} and found it with the parameters ({', '.join(parameters)})")
        return found

    @staticmethod
    def _place(target: Target) -> tuple[Any, str]:
        """The module or class that has it, and its name there."""
        *outer, name = target.name.split(".")
        holder: Any = importlib.import_module(target.module)
        for each in outer:
            holder = getattr(holder, each)
        return holder, name

    def replace_later(self, target: Target) -> None:
        """In a module that is loaded."""
        try:
            found = self._find(target)
        except RuntimeError as error:
            warnings.warn(f"{error}; it stays {self._package.name}'s own", RuntimeWarning, stacklevel=2)
            return
        holder, name = self._place(target)
        if isinstance(found, staticmethod):
            setattr(holder, name, staticmethod(target.ours(found.__func__)))
            self._undo.append(lambda: setattr(holder, name, found))
        elif target.alone:
            setattr(holder, name, target.ours(found))
            self._undo.append(lambda: setattr(holder, name, found))
        else:
            mine = target.ours(found)
            self._replace({id(found): mine})
            self._undo.append(lambda: self._replace({id(mine): found}))

    def _replace(self, stead: Mapping[int, Any]) -> None:
        """Put objects, by the id of those that they replace, into every loaded module of the package."""
        for table in self._tables():
            for key, value in list(table.items()):
                if id(value) in stead:
                    table[key] = stead[id(value)]

    def _tables(self) -> Iterator[dict]:
        """What modules hold, and their dictionaries, which may be registries."""
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] == self._package.name:
                # Of a lazy module only what it holds already: its attributes would be imported.
                members = getattr(module, "__dict__", {})
                yield members
                yield from [value for key, value in list(members.items()) if type(value) is dict and key[:2] != "__"]

    def loaded(self, module: str) -> None:
        with self.lock:
            if self._found is not None:
                self.replace_later(self._later[module])

    def waits_for(self, module: str) -> bool:
        return module in self._later


class _Finder(importlib.abc.MetaPathFinder):
    """Tells of modules as they are imported."""

    def __init__(self, patch: Patch) -> None:
        self._patch = patch

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not self._patch.waits_for(fullname):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self._patch.loaded(fullname)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def called(thing: Any, defaults: bool) -> tuple[str, ...]:
    """By what parameters, as ``name`` or, with defaults, ``name=default``; of a module of torch, by method."""
    if isinstance(thing, staticmethod):
        thing = thing.__func__
    owner = thing if isinstance(thing, type) else getattr(thing, "__self__", None)
    if isinstance(owner, type) and issubclass(owner, Function):
        # What `apply` takes is what `forward` takes behind the context.
        return _parameters(owner.forward, defaults)[1:]
    if isinstance(thing, type) and hasattr(thing, "forward"):
        methods = (("__init__", thing.__init__), ("forward", thing.forward))  # type: ignore[misc]
        return tuple(f"{name}({', '.join(_parameters(one, defaults)[1:])})" for name, one in methods)
    return _parameters(getattr(thing, "apply", thing), defaults)


def _parameters(function: Any, defaults: bool) -> tuple[str, ...]:
    found = inspect.signature(function).parameters.values()
    if not defaults:
        return tuple(one.name for one in found)
    return tuple(str(one.replace(annotation=inspect.Parameter.empty)) for one in found)


def installed(package: str, *versions: str) -> Package:
    """A package in one of the versions named, and no other."""
    return Package(package, " or ".join(versions), lambda: version(package), versions.__contains__)
