"""``prefcore doctor``: what is installed, which devices are there, what can run on them."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

import prefcore
from prefcore import _impl, _native

PACKAGES = (
    "torch",
    "numpy",
    "triton",
    "transformers",
    "accelerate",
    "peft",
    "trl",
    "flash-attn",
    "matplotlib",
)
USER_EXTRAS = ("hf", "peft", "trl", "flash-attn")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to ``prefcore``'s; its ``run`` is :func:`run`."""
    parser = subparsers.add_parser(
        "doctor",
        help="versions, devices, and which implementation of which op is available here",
        description="Say what is installed, which devices are there, which implementation of which op and which "
        "attention of packed batches can run here, and how to get a missing one.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report, as text or as JSON, and return 0."""
    report = examine()
    print(json.dumps(report, indent=2) if args.json else _text(report))
    return 0


def examine() -> dict[str, Any]:
    """The report as plain data: ``versions``, ``devices``, ``extension``, ``ops``, ``attention``, ``extras``."""
    versions = {"prefcore": prefcore.__version__, "python": platform.python_version()}
    return {
        "versions": versions | {name: _version(name) for name in PACKAGES},
        "devices": _devices(),
        "extension": _extension(),
        "ops": {op: _op(op) for op in _impl.IMPLEMENTATIONS},
        "attention": _attention(),
        "extras": {extra: _extra(extra) for extra in USER_EXTRAS},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, Any]:
    cpu: dict[str, Any] = {
        "model": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
    }
    cuda = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        cuda.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
            }
        )
    return {"cpu": cpu, "cuda": cuda, "cuda_absent": None if cuda else _why_no_gpu()}


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return named.group(1) if named else platform.machine()


def _why_no_gpu() -> str:
    built_for = torch.version.cuda or torch.version.hip
    if built_for is None:
        return f"torch {torch.__version__} is a build for the CPU alone"
    return f"torch {torch.__version__} is built for {built_for}, but sees no GPU and driver"


def _extension() -> dict[str, Any]:
    extension = _native.load()
    isa = [] if extension is None else extension.cpu_isa_names()
    return {"built": extension is not None, "cuda": _native.has_cuda(), "cpu_isa": isa}


def _op(op: str) -> dict[str, Any]:
    offered = _impl.IMPLEMENTATIONS[op]
    lacks: dict[str, str | None] = {"reference": None}
    for device_type, impl in offered.items():
        lacks[impl] = _impl.missing(impl) or _no_device(device_type, impl)
    auto: dict[str, str | None] = {}
    for device_type in offered:
        try:
            auto[device_type] = _impl.resolve("auto", op, torch.device(device_type))
        except NotImplementedError:
            auto[device_type] = None
    return {"implementations": lacks, "auto": auto}


def _no_device(device_type: str, impl: _impl.Impl) -> str | None:
    if device_type == "cpu" or torch.cuda.is_available():
        return None
    if impl == "triton" and _impl.interpreting():
        return None
    how = "; TRITON_INTERPRET=1 runs it, slowly, on host tensors" if impl == "triton" else ""
    return f"no GPU is seen here{how}"


def _attention() -> dict[str, Any]:
    """Which attention of packed batches can train a bfloat16 model here that asks for nothing special."""
    from prefcore.hf import _backends  # imports torch's compiler, and Triton with it

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plain = _backends.Needs(64, 64, frozenset({None}), softcap=False, sinks=False, dropout=False)
    use = (plain, device, torch.bfloat16, True)
    lacks = {name: backend.lacks(*use) for name, backend in _backends.BACKENDS.items()}
    return {"device": device.type, "backends": lacks, "auto": _backends.choose("auto", *use)}


def _extra(extra: str) -> dict[str, Any]:
    """What an extra of this distribution asks for that is absent or too old, and the line that gets it."""
    try:
        required = importlib.metadata.requires("prefcore") or []
    except importlib.metadata.PackageNotFoundError:
        return {
            "present": None,
            "get": "pip install .  # prefcore runs from a source tree that is not installed",
        }
    wanted = []
    for requirement in required:
        parts = re.fullmatch(r"([\w.-]+)>=([\d.]+)\s*;.*extra == ['\"]([\w-]+)['\"].*", requirement)
        if parts and parts.group(3) == extra:
            name, oldest, _ = parts.groups()
            have = _version(name)
            if have is None or _release(have) < _release(oldest):
                wanted.append(f"'{name}>={oldest}'")
    return {"present": not wanted, "get": f"pip install {' '.join(wanted)}" if wanted else None}


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _text(report: dict[str, Any]) -> str:
    lines = ["versions"]
    lines += [f"  {name:14}{version or '-'}" for name, version in report["versions"].items()]
    extension = report["extension"]
    built = "not built" if not extension["built"] else f"built {'with' if extension['cuda'] else 'without'} CUDA"
    lines.append(f"  {'prefcore._C':14}{built}")

    cpu, devices = report["devices"]["cpu"], report["devices"]
    lines += ["", "devices"]
    threads = f"{cpu['threads']} threads on {cpu['cores']} cores, torch uses {cpu['torch_isa']}"
    lines.append(f"  {'cpu':14}{cpu['model']}, {threads}")
    if extension["cpu_isa"]:
        names = ", ".join(extension["cpu_isa"])
        lines.append(f"  {'row kernels':14}{names}; the last unless PREFCORE_CPU_ISA names one")
    for index, gpu in enumerate(devices["cuda"]):
        memory = gpu["memory_bytes"] / 2**30
        lines.append(f"  cuda:{index}        {gpu['name']}, capability {gpu['capability']}, {memory:.0f} GiB")
    if devices["cuda_absent"]:
        lines.append(f"  cuda          none: {devices['cuda_absent']}")

    lines += ["", "ops"]
    for op, entry in report["ops"].items():
        auto = ", ".join(f"{choice or 'nothing'} on {device}" for device, choice in entry["auto"].items())
        lines.append(f"  {op}: auto takes {auto}")
        for impl, lack in entry["implementations"].items():
            lines.append(f"    {impl:12}{'available' if lack is None else 'not here: ' + lack}")

    attention = report["attention"]
    lines += ["", "attention of packed batches", f"  auto takes {attention['auto']} on {attention['device']}"]
    for name, lack in attention["backends"].items():
        lines.append(f"    {name:12}{'available' if lack is None else 'not here: ' + lack}")

    lines += ["", "extras"]
    for extra, entry in report["extras"].items():
        lines.append(f"  {extra:14}{'present' if entry['present'] else entry['get']}")
    return "\n".join(lines)
