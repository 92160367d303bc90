"""The machine code of the Triton kernels, for each architecture and without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prefcore._types import FORMS, KLS
from prefcore.kernels import _rows, divergence, policy_terms
from prefcore.ops._spec import Coef, Row

# Bytes of shared memory (LDS on gfx942) that one program may have.
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_every_kernel_is_compiled_for_every_architecture(compiled: dict[str, dict]) -> None:
    kernels = {name for name in compiled["functions"] if name.endswith("_kernel")}
    assert kernels
    for target in SHARED:
        reports = [report for name, report in compiled["reports"].items() if name.endswith(target)]
        assert {report["kernel"] for report in reports} == kernels


def test_registers_do_not_spill(compiled: dict[str, dict]) -> None:
    assert {name: r["spilled"] for name, r in compiled["reports"].items() if r["spilled"]} == {}


def test_shared_memory_is_within_bounds(compiled: dict[str, dict]) -> None:
    over = {n: r["shared"] for n, r in compiled["reports"].items() if r["shared"] > SHARED[n.split()[1]]}
    assert over == {}


def test_rows_are_read_and_written_in_16_bytes(compiled: dict[str, dict]) -> None:
    for name, report in compiled["reports"].items():
        assert report["wide_loads"] > 0, name
        # Two bytes out for four in make stores of 8.
        if not name.startswith(("stats-", "pair_stats-", "pair_sums-")) and "f32_" not in name:
            assert report["wide_stores"] > 0, name


def test_rows_columns_and_places_do_not_recompile(compiled: dict[str, dict]) -> None:
    assert {"stats", "grad", "pair_stats-kl", "pair_sums-js", "pair_grad-js", "policy"} <= set(compiled["keys"])
    assert {function: len(keys) for function, keys in compiled["keys"].items() if len(keys) != 1} == {}


def test_kernels_number_the_state_as_the_ops_do() -> None:
    assert {row.name: getattr(_rows, row.name).value for row in Row} == {row.name: row.value for row in Row}


def test_kernels_number_the_coefficients_as_the_ops_do() -> None:
    assert {row.name: getattr(divergence, row.name).value for row in Coef} == {row.name: row.value for row in Coef}


def test_kernels_number_the_forms_and_kl_terms_as_the_ops_do() -> None:
    named = {name: code.value for name, code in vars(policy_terms).items() if name.isupper() and hasattr(code, "value")}
    forms = {name.upper(): code for code, name in enumerate(FORMS)}
    kls = {{"none": "NO_KL"}.get(name, name.upper()): code for code, name in enumerate(KLS)}
    assert named == forms | kls
