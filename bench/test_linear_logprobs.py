"""Times of one step, forward and backward: ``pytest bench``. bench.table has ratios that hold on a noisy machine."""

import pytest
import torch

from bench.cases import CASES, Inputs, Shape

SHAPE = (
    Shape(T=1024, D=512, V=16384)
    if not torch.cuda.is_available()
    else Shape(4096, 4096, 128256, torch.bfloat16, "cuda")
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_linear_logprobs(case, benchmark):
    try:
        logps = case.load()
    except LookupError as reason:
        pytest.skip(str(reason))
    inputs = Inputs.make(SHAPE, case.train_head)
    wait = torch.cuda.synchronize if SHAPE.device == "cuda" else lambda: None

    def step():
        case.step(logps, inputs)
        wait()

    benchmark.pedantic(step, warmup_rounds=1, rounds=5)
    benchmark.extra_info.update(T=SHAPE.T, D=SHAPE.D, V=SHAPE.V, dtype=str(SHAPE.dtype), floor=case.floor)
