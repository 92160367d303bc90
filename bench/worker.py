"""The process in which cases run: requests as lines of JSON on stdin, answers on stdout; see bench.measure."""

from __future__ import annotations

import argparse
import gc
import importlib.machinery
import json
import os
import sys
from pathlib import Path
from typing import Any


def take_prefcore(folder: str) -> None:
    """Import prefcore from ``folder``, whatever an editable installation or the current folder would give."""
    sys.path.insert(0, folder)
    for finder in list(sys.meta_path):
        if finder is importlib.machinery.PathFinder:
            continue
        found = finder.find_spec("prefcore", None)
        if found is not None:
            sys.meta_path.remove(finder)
    import prefcore

    if not Path(prefcore.__file__).resolve().is_relative_to(Path(folder).resolve()):
        raise ImportError(f"prefcore came from {prefcore.__file__}, not from {folder}")


class Bench:
    """One case at a time, on one device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.copies: float | None = None
        self.buffers: Any = None
        self.truths: dict[tuple, Any] = {}
        self.forget()

    def forget(self) -> dict:
        import torch

        self.case = self.shape = self.inputs = self.step = self.out = None
        if "torch._dynamo" in sys.modules:  # a slow import
            torch._dynamo.reset()
        gc.collect()
        if self.device == "cuda":
            self.buffers = None  # processes of other providers share this memory
            torch.cuda.empty_cache()
        return {}

    def answer(self, request: dict) -> dict:
        import torch

        what = request.pop("what")
        try:
            return getattr(self, what)(**request)
        except (LookupError, NotImplementedError) as reason:
            # A bug raises KeyError and IndexError too.
            if isinstance(reason, KeyError | IndexError):
                return {"failed": f"{type(reason).__name__}: {reason}"}
            return {"skipped": first_line(reason)}
        except (torch.OutOfMemoryError, MemoryError):
            return {"skipped": "out of memory"}
        except Exception as error:
            if "can't allocate memory" in str(error):
                return {"skipped": "out of memory"}
            return {"failed": f"{type(error).__name__}: {first_line(error)}"}

    def load(self, case: str, shape: dict) -> None:
        import torch

        from bench.cases import CASES
        from bench.inputs import Shape

        if self.case is not None:
            self.forget()
        self.case, self.shape = CASES[case], Shape.of_json(shape)
        free = torch.cuda.mem_get_info()[0] if self.device == "cuda" else available()
        size = (self.shape.T + self.shape.prompts) * self.shape.D + self.shape.V * self.shape.D
        needed = size * self.shape.dtype.itemsize + self.case.held(self.shape)
        # On a GPU the attempt costs nothing but itself.
        if self.device == "cpu" and needed > free:
            raise LookupError(f"would take about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")

    def time(self, case: str, shape: dict) -> dict:
        """Everything up to the rounds: compilation, the error, on a GPU the memory."""
        import torch

        self.load(case, shape)
        self.inputs = self.case.inputs(self.shape)
        self.step = self.case.build(self.inputs)
        row = self.errors(self.step())
        self.inputs.clear()
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step()
            row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        if self.copies is None:
            self.copies = self.bandwidth()
        self.last = None
        return row

    def errors(self, result: Any) -> dict:
        """Against float64: of all rows where that is cheap beside the rest, else of the first 64."""
        affordable = self.case.flops(self.shape) < (1e14 if self.device == "cuda" else 1e11)
        count = None if affordable else 64
        key = (self.case.op, self.shape, count)
        if key not in self.truths:
            self.truths = {key: self.inputs.truth(count)}
        truth = self.truths[key]
        row = {}
        if result.rows is not None:
            rows = result.rows[:count]
            row = {"max_error": (rows.double() - truth).abs().max().item(), "error_rows": rows.shape[0]}
        if result.loss is not None and affordable:
            exact = self.inputs.loss(truth)
            row |= {"loss_error": (result.loss.double() - exact).abs().item(), "loss": exact.item()}
        if affordable and self.inputs.gradient and any(value is not None for value in result):
            row["gradient_error"] = self.inputs.gradient_error(truth)
        return row

    def bandwidth(self) -> float:
        """Bytes a second, read and written, of a copy that no cache holds; the best of three."""
        import torch

        from bench.measure import seconds

        size = 2**30 if self.device == "cuda" else 2**28
        if self.buffers is None:
            # Pages that nobody wrote would all be one.
            self.buffers = torch.ones(2, size, dtype=torch.uint8, device=self.device)
        taken, given = self.buffers
        return 2 * size / min(seconds(lambda: taken.copy_(given), given) for _ in range(3))

    def gemm(self) -> float:
        """Seconds of one product [T, D] x [D, V]; of no more than 8192 rows, scaled."""
        import torch

        from bench.measure import seconds

        shape = self.shape
        hidden = self.inputs.hidden.detach().view(-1, shape.D)[: min(shape.T, 8192)]
        weight = self.inputs.weight.detach()
        out = self.out
        if out is None:
            out = torch.empty(hidden.shape[0], shape.V, dtype=hidden.dtype, device=hidden.device)
            # Memory that is new to a CPU's process costs more than some products; a GPU's may be short.
            self.out = out if self.device == "cpu" else None
        return seconds(lambda: torch.mm(hidden, weight.t(), out=out), hidden) * shape.T / hidden.shape[0]

    def round(self) -> dict:
        from bench.measure import seconds

        flops, traffic = self.case.flops(self.shape), self.case.bytes(self.shape)
        bound = self.gemm if flops else self.bandwidth
        if self.last is None:
            bound()
            self.last = bound()
        like = self.inputs.leaves()[0] if self.inputs.leaves() else self.inputs.targets
        own = seconds(self.step, like)
        self.inputs.clear()
        before, self.last = self.last, bound()
        if not flops:
            rate = 2 / (1 / before + 1 / self.last)
            return {
                "seconds": own,
                "floor_seconds": traffic / rate,
                "teraflops": 0.0,
                "gigabytes_per_second": rate / 1e9,
            }
        unit = (before + self.last) / 2
        peak = 2 * self.shape.T * self.shape.D * self.shape.V / unit
        return {
            "seconds": own,
            "gemm_seconds": unit,
            "floor_seconds": max(flops / peak, traffic / self.copies),
            "teraflops": peak / 1e12,
            "gigabytes_per_second": self.copies / 1e9,
        }

    def memory(self, case: str, shape: dict) -> dict:
        """On a CPU: growth of the peak resident size over what the process held; the gradients are part of it."""
        import dataclasses

        from bench.measure import resident

        self.load(case, shape)
        # Libraries and compilers load what they need on a few rows first.
        few = dataclasses.replace(
            self.shape, T=32, V=min(1024, self.shape.V), length=8, prompt=min(8, self.shape.prompt)
        )
        inputs = self.case.inputs(few)
        self.case.build(inputs)()
        del inputs
        self.inputs = self.case.inputs(self.shape)
        step = self.case.build(self.inputs)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        step()
        return {"peak_mib": (resident("VmHWM") - before) / 2**10}


def available() -> int:
    """Bytes of memory that are free or can be made so."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prefcore")
    options = parser.parse_args()
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if options.prefcore:
        take_prefcore(options.prefcore)
    import torch

    torch.set_num_threads(options.threads)
    bench = Bench(options.device)
    for line in sys.stdin:
        print(json.dumps(bench.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
