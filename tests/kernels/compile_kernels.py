"""Compile the Triton kernels as a launch would, for GPUs that need not be here; report on the machine code.

A process of its own: where TRITON_INTERPRET was set when triton was imported, nothing compiles any more.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from prefcore._types import FORMS, KLS
from prefcore.kernels import _launch, divergence, logprobs, policy_terms
from prefcore.ops._spec import CROSS_ROWS, Coef, LogitSpec, PairSpec, Row, Side

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
WIDE, NARROW = 128256, 200
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
EVERYTHING = {"entropy": True, "mean": True, "squares": True, "top1": True}


class Launch:
    """What a call of a kernel asks of the compiler, caught before it reaches a driver."""

    def __init__(self, kernel: JITFunction, arguments: dict[str, object]) -> None:
        self.kernel = kernel
        self.arguments = arguments

    def source(self, target: GPUTarget) -> tuple[ASTSource, dict[str, object]]:
        backend = make_backend(target)
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialization, options = bind(**self.arguments)
        options, signature, constants, attributes = self.kernel._pack_args(
            backend, self.arguments, bound, specialization, options
        )
        return ASTSource(self.kernel, signature, constants, attributes), options.__dict__

    def key(self) -> str:
        """What decides whether a launch reuses compiled code."""
        backend = make_backend(TARGETS["sm_90"])
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        _, specialization, options = bind(**self.arguments)
        return repr((self.kernel.__name__, specialization, options))


def record(call) -> Launch:
    caught = []

    def run(self, *args, grid, warmup, **kwargs):
        caught.append(Launch(self, kwargs))

    original, JITFunction.run = JITFunction.run, run
    try:
        call()
    finally:
        JITFunction.run = original
    (launch,) = caught
    return launch


def launch(
    function: str,
    dtype: torch.dtype = BF16,
    columns: int = WIDE,
    *,
    rows: int = 3,
    stride: int | None = None,
    out_dtype: torch.dtype | None = None,
    in_place: bool = True,
    temperature: bool = False,
    bias: torch.dtype | None = None,
    coef: bool = False,
    entropy: bool = False,
    acc: bool = False,
    col0: int = 0,
    state_start: int = 0,
    **spec: object,
) -> Launch:
    wide = F64 if dtype == F64 else F32
    stride = columns if stride is None else stride
    tile = torch.empty(rows, stride, dtype=dtype)[:, :columns]
    out = tile if in_place and out_dtype in (None, dtype) else torch.empty(rows, stride, dtype=out_dtype or dtype)
    targets = torch.zeros(rows, dtype=torch.int64)
    temperatures = torch.ones(rows, dtype=wide) if temperature else None
    biases = torch.zeros(columns, dtype=bias) if bias is not None else None
    state = torch.zeros(len(Row), rows + state_start, dtype=wide)[:, state_start:]
    settings = LogitSpec(columns + col0, **spec)
    out = out[:, :columns]
    common = (targets, temperatures, biases, settings, state)
    calls = {
        "stats": lambda: logprobs.stats(tile, col0, *common),
        "stats_grad": lambda: logprobs.stats_grad(tile, out, *common),
        "weigh": lambda: logprobs.weigh(tile, out, col0, *common, torch.ones(rows, 64, dtype=wide) if acc else None),
        "grad": lambda: logprobs.grad(
            tile,
            out,
            col0,
            *common,
            torch.ones(rows, dtype=wide) if entropy else None,
            torch.ones(3, rows, dtype=wide) if coef else None,
        ),
    }
    return record(calls[function])


def launch_pair(
    function: str,
    kind: str,
    dtype: torch.dtype = BF16,
    columns: int = WIDE,
    *,
    rows: int = 3,
    weight: float = 0.5,
    stride: int | None = None,
    q_stride: int | None = None,
    outs: str = "pq",
    out_dtype: torch.dtype | None = None,
    temperature: bool = False,
    bias: torch.dtype | None = None,
    col0: int = 0,
    state_start: int = 0,
    **spec: object,
) -> Launch:
    """Gradients are written in place unless ``out_dtype`` is another type."""
    wide = F64 if dtype == F64 else F32

    def make(stride: int | None) -> Side:
        return Side(
            torch.empty(rows, stride or columns, dtype=dtype)[:, :columns],
            torch.ones(rows, dtype=wide) if temperature else None,
            torch.zeros(columns, dtype=bias) if bias is not None else None,
            LogitSpec(columns + col0, **spec),
            torch.zeros(len(Row), rows + state_start, dtype=wide)[:, state_start:],
        )

    p, q = make(stride), make(q_stride or stride)
    targets = torch.zeros(rows, dtype=torch.int64)
    pair = PairSpec(kind, weight)
    if function != "pair_grad":
        cross = torch.zeros(CROSS_ROWS, rows + state_start, dtype=wide)[:, state_start:]
        call = divergence.stats if function == "pair_stats" else divergence.sums
        return record(lambda: call(p, q, col0, targets, pair, cross))

    def out(side: Side) -> torch.Tensor:
        return side.tile if out_dtype in (None, dtype) else torch.empty(rows, columns, dtype=out_dtype)

    coef = torch.ones(len(Coef), rows + state_start, dtype=wide)[:, state_start:]
    written = [(out(side), coef) if name in outs else (None, None) for name, side in (("p", p), ("q", q))]
    (p_out, p_coef), (q_out, q_coef) = written
    return record(lambda: divergence.grad(p, q, p_out, q_out, col0, targets, pair, p_coef, q_coef))


# Plain bf16 as models train; everything at once; the other types; rows off 16-byte boundaries; narrow rows.
COMMON = {
    "bf16": {},
    "everything": {"temperature": True, "bias": BF16, "softcap": 30.0, **EVERYTHING},
    "f16": {"dtype": F16, "entropy": True},
    "f32": {"dtype": F32, "temperature": True},
    "f64": {"dtype": F64, "softcap": 30.0, **EVERYTHING},
    "unaligned": {"columns": 50257},
    "narrow": {"columns": NARROW},
}
OUTPUT = {
    "f32_rounded_to_bf16": {"dtype": F32, "out_dtype": BF16, "round_to": BF16, "softcap": 30.0},
    "f32_to_f16": {"dtype": F32, "out_dtype": F16},
}


def cases() -> dict[str, Launch]:
    table = {}
    for name, options in (COMMON | OUTPUT).items():
        plain = {key: value for key, value in options.items() if key not in EVERYTHING}
        upstream = {"coef": True, "entropy": True} if plain != options else {}
        if name in COMMON:
            table[f"stats-{name}"] = launch("stats", **options)
        table[f"stats_grad-{name}"] = launch("stats_grad", **options)
        table[f"weigh-{name}"] = launch("weigh", **{"columns": 32064, "acc": name != "narrow", **options})
        table[f"grad-{name}"] = launch("grad", **{"columns": 8192, **plain, **upstream})
    table["grad-coef"] = launch("grad", columns=8192, coef=True)
    return table


PAIR_FUNCTIONS = (*(("pair_stats", kind) for kind in ("kl", "alpha")), *(("pair_sums", kind) for kind in ("js", "tv")))
PAIR_KINDS = ("kl", "alpha", "js", "tv")
ALL_SETTINGS = {"temperature": True, "bias": BF16, "softcap": 30.0, "entropy": True}


def pair_cases() -> dict[str, Launch]:
    """Every kind plainly; the costliest of each kernel in all other ways."""
    table = {f"{function}-{kind}-bf16": launch_pair(function, kind) for function, kind in PAIR_FUNCTIONS}
    table |= {f"pair_grad-{kind}-bf16": launch_pair("pair_grad", kind, columns=8192) for kind in PAIR_KINDS}
    for function, kind in (("pair_stats", "kl"), ("pair_sums", "js"), ("pair_grad", "js")):
        table |= {
            f"{function}-{kind}-everything": launch_pair(function, kind, columns=32064, **ALL_SETTINGS),
            f"{function}-{kind}-f32": launch_pair(function, kind, F32, temperature=True),
            f"{function}-{kind}-f64": launch_pair(function, kind, F64, softcap=30.0),
            f"{function}-{kind}-unaligned": launch_pair(function, kind, columns=50257),
            f"{function}-{kind}-unalike": launch_pair(function, kind, columns=NARROW, q_stride=NARROW + 1),
        }
    for side in "pq":
        table[f"pair_grad-kl-{side}"] = launch_pair("pair_grad", "kl", outs=side)
    table["pair_grad-js-f32_rounded_to_bf16"] = launch_pair("pair_grad", "js", F32, out_dtype=BF16, round_to=BF16)
    return table


def launch_policy(
    form: str,
    kl: str,
    dtype: torch.dtype = F32,
    tokens: int = 4096,
    *,
    given: str = "old advantages",
    number: float = 0.1,
) -> Launch:
    """``given`` names the inputs; those that the KL term needs come with it."""
    names = ("old", "advantages", "log_ratio", "weights", "ref", "kl_values", "kl_coefs", "entropy")
    wanted = given.split() + {"none": [], "exact": ["kl_values"]}.get(kl, ["ref"])
    tensors = [torch.empty(tokens, dtype=dtype) if name in wanted else None for name in names]
    scalars = dict.fromkeys(("low", "high", "dual", "kl_coef", "entropy_coef", "clamp"), number)
    logps, losses, slopes = (torch.empty(tokens, dtype=dtype) for _ in range(3))
    parts = torch.empty(policy_terms.blocks(logps), 8, dtype=F64)
    return record(lambda: policy_terms.policy_terms(logps, tensors, form, kl, scalars, losses, slopes, parts))


POLICY_EVERYTHING = "old advantages weights kl_coefs entropy"


def policy_cases() -> dict[str, Launch]:
    """Every form, every KL term, and the most demanding of both in all inputs and in float64."""
    table = {f"policy-{form}": launch_policy(form, "none", given="old advantages weights") for form in FORMS[1:]}
    table |= {f"policy-{kl}": launch_policy("clip", kl) for kl in KLS[1:]}
    table["policy-kl"] = launch_policy("none", "k3", given="")
    table["policy-everything"] = launch_policy("clip", "k3_corrected", given=POLICY_EVERYTHING)
    table["policy-sapo-everything"] = launch_policy("sapo", "k3_corrected", given=POLICY_EVERYTHING)
    table["policy-ratio"] = launch_policy("clip", "none", given="log_ratio advantages")
    table["policy-f64"] = launch_policy("clip", "k3_corrected", F64, given=POLICY_EVERYTHING)
    return table


def pretend(target: GPUTarget) -> None:
    """Have launches on host tensors configured as on ``target``."""
    _launch.nvidia = lambda device: target.backend == "cuda"
    _launch.warp_size = lambda device: target.warp_size


def report(launched: Launch, target: GPUTarget) -> dict[str, object]:
    source, options = launched.source(target)
    compiled = triton.compile(source, target=target, options=options)
    result = {
        "kernel": f"{launched.kernel.fn.__module__}.{launched.kernel.__name__}",
        "shared": compiled.metadata.shared,
    }
    if target.backend == "hip":
        code = compiled.asm["amdgcn"]
        # Scalar registers spill to lanes of vector registers, not to memory: they do not count.
        names = ("vgpr_spill_count", "private_segment_fixed_size", "vgpr_count")
        numbers = {name: int(re.search(rf"\.{name}:\s*(\d+)", code)[1]) for name in names}
        result["registers"] = numbers.pop("vgpr_count")
        result["spilled"] = sum(numbers.values())
        result["wide_loads"] = len(re.findall(r"(?:global|buffer)_load_dwordx4", code))
        result["wide_stores"] = len(re.findall(r"(?:global|buffer)_store_dwordx4", code))
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            tool = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-sass", file.name]
            code = subprocess.run(tool, check=True, capture_output=True, text=True).stdout
        result["registers"] = int(re.search(r"REG:(\d+)", code)[1])
        result["spilled"] = sum(int(re.search(rf"{name}:(\d+)", code)[1]) for name in ("STACK", "LOCAL"))
        result["wide_loads"] = len(re.findall(r"LDG\.E\S*\.128", code))
        result["wide_stores"] = len(re.findall(r"STG\.E\S*\.128", code))
    return result


def main() -> None:
    reports = {}
    for name, target in TARGETS.items():
        pretend(target)
        # All variants for one architecture; the plainest and the most demanding for the others.
        reports |= {
            f"{case} {name}": report(launched, target)
            for case, launched in (cases() | pair_cases() | policy_cases()).items()
            if name == "sm_90" or case.endswith(("-bf16", "-everything"))
        }
    pretend(TARGETS["sm_90"])
    # A training run's calls: every number of rows, any slice, any place in the state.
    keys = {
        function: sorted(
            {
                launch(function, columns=32064, rows=rows, col0=rows * 8, state_start=rows % 5, temperature=True).key()
                for rows in range(1, 41, 2)
            }
        )
        for function in ("stats", "weigh", "grad", "stats_grad")
    }
    for function, kind in (*PAIR_FUNCTIONS, ("pair_grad", "js")):
        keys[f"{function}-{kind}"] = sorted(
            {
                launch_pair(
                    function,
                    kind,
                    columns=columns,
                    rows=rows,
                    weight=1 / (1 + rows),
                    stride=32064 + 8 * rows,
                    q_stride=40000,
                    col0=rows * 8,
                    state_start=rows % 5,
                    temperature=True,
                ).key()
                for rows in range(1, 12, 2)
                for columns in (30000, 31001)
            }
        )
    keys["policy"] = sorted(
        {
            launch_policy("clip", "k3", tokens=tokens, number=1 / tokens).key()
            for tokens in (*range(1, 41), 1024, 3000, 4096)
        }
    )
    functions = sorted(
        f"{module.__name__}.{name}"
        for module in (logprobs, divergence, policy_terms)
        for name, value in vars(module).items()
        if isinstance(value, JITFunction)
    )
    json.dump({"reports": reports, "keys": keys, "functions": functions}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
