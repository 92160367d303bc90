"""Every provider of the benchmarks computes what its case says, and what cannot is left out with the reason."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import prefcore
from bench import against, measure, report, suite, worker
from bench.cases import CASES
from bench.inputs import MODELS, Shape, capped, divergences, exact_logps

ROOT = Path(__file__).parents[2]
SHAPE = Shape(64, 16, 96, length=8, prompt=5)
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """What torch.compile makes of an adapter is its own business, and takes long."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def inputs_of(case, shape=SHAPE):
    try:
        inputs = case.inputs(shape)
        return inputs, case.build(inputs)
    except LookupError as reason:
        if isinstance(reason, KeyError | IndexError):
            raise
        pytest.skip(str(reason))


def oracle(inputs):
    """The rows' values, the loss, its gradient in them, and the gradients of the leaves, from float64."""
    if hasattr(inputs, "other_hidden"):
        other_logits = inputs.other_hidden.double() @ inputs.other_weight.double().t()
        rows = divergences(inputs.hidden.double() @ inputs.weight.double().t(), other_logits, inputs.shape.softcap)
    elif hasattr(inputs, "other_logits"):
        rows = divergences(inputs.logits.double(), inputs.other_logits.double(), inputs.shape.softcap)
    elif hasattr(inputs, "logits"):
        logits = capped(inputs.logits.double(), inputs.shape.softcap)
        rows = logits.log_softmax(1).gather(1, inputs.targets[:, None])[:, 0]
    else:
        rows = exact_logps(inputs.rows(), inputs.weight, inputs.targets, inputs.shape.softcap)
    loss = inputs.loss(rows)
    if not inputs.gradient:
        return rows, loss, torch.zeros_like(rows), []
    (upstream,) = torch.autograd.grad(loss, rows, retain_graph=True)
    return rows.detach(), loss.detach(), upstream, torch.autograd.grad(loss, inputs.leaves())


def eager_of(case):
    """Plain PyTorch at the same op, whose error in float32 is the measure."""
    schedules = ("autograd", "response rows", "")
    return next(CASES[key] for s in schedules if (key := f"{case.op}/pytorch/{s}/{case.head}") in CASES)


@pytest.mark.parametrize("op", sorted({case.op for case in CASES.values()}))
def test_the_truth_of_the_first_rows_is_that_of_all(op):
    case = next(case for case in CASES.values() if (case.op, case.provider) == (op, "pytorch"))
    inputs = case.inputs(dataclasses.replace(SHAPE, T=1040))
    every = inputs.truth()
    for count in (5, 512, 700):
        torch.testing.assert_close(inputs.truth(count), every[:count], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("case", [c for c in CASES.values() if "no reference" not in c.schedule], ids=lambda c: c.key)
def test_a_provider_computes_the_values_and_gradients_of_its_op(case, softcap):
    inputs, step = inputs_of(case, dataclasses.replace(SHAPE, softcap=softcap))
    rows, loss, upstream, gradients = oracle(inputs)
    if case.head == "none":
        plain = dataclasses.replace(eager_of(dataclasses.replace(case, head="frozen")))
    else:
        plain = eager_of(case)
    eager, step_of_eager = inputs_of(plain, inputs.shape)
    expected, result = step_of_eager(), step()

    # At most twice eager's error and a rounding: of rows, of what they make of a loss, of gradients.
    error = (expected.rows.double() - rows).abs().max() if expected.rows is not None else 4 * EPS * rows.abs().max()
    bound = 2 * error + EPS * rows.abs().max()
    if result.rows is not None:
        assert (result.rows.double() - rows).abs().max() <= bound
    if result.loss is not None:
        assert (result.loss.double() - loss).abs() <= bound * upstream.abs().sum() + EPS * loss.abs()
    assert result.rows is not None or result.loss is not None
    if case.head == "none":
        assert all(leaf.grad is None for leaf in inputs.leaves())
        return
    assert len(inputs.leaves()) == len(gradients)
    for leaf, like, exact in zip(inputs.leaves(), eager.leaves(), gradients, strict=True):
        error = (like.grad.double() - exact).abs().max()
        assert (leaf.grad.double() - exact).abs().max() <= 2 * error + EPS * exact.abs().max()


@pytest.mark.parametrize(
    "key", [f"{op}/pytorch/{how}/trained" for op, how in (("dpo", "all rows"), ("cross_entropy", "autograd"))]
)
def test_the_error_of_gradients_is_that_of_their_first_rows(key):
    inputs, step = inputs_of(CASES[key], dataclasses.replace(SHAPE, softcap=3.0))
    rows, _, _, (hidden, weight) = oracle(inputs)
    step()
    assert inputs.gradient_error(rows) < 16 * EPS
    inputs.weight.grad[3] += 0.25 * weight[:64].abs().max()
    assert inputs.gradient_error(rows) == pytest.approx(0.25, rel=1e-3)
    inputs.hidden.grad += 0.5 * hidden.abs().max()
    assert inputs.gradient_error(rows) == pytest.approx(0.5, rel=1e-3)
    inputs.weight.grad[64:] = torch.nan  # beyond what is looked at
    assert inputs.gradient_error(rows) == pytest.approx(0.5, rel=1e-3)


def test_without_a_reference_liger_computes_the_loss_of_a_zero_one():
    inputs, _ = inputs_of(CASES["dpo/liger/response rows, no reference/trained"])
    from bench.providers import liger_pairs

    rows, *_ = oracle(inputs)
    loss = liger_pairs(inputs, "response rows, no reference")()
    inputs.ref_logps = torch.zeros_like(inputs.ref_logps)
    assert loss.item() == pytest.approx(inputs.loss(rows).item(), rel=1e-5)


@pytest.mark.parametrize("op", ["dpo", "orpo"])
def test_labels_are_the_targets_of_the_responses_where_they_lie(op):
    inputs = CASES[f"{op}/prefcore/loop/trained"].inputs(SHAPE)
    chosen, rejected = inputs.labels[:, SHAPE.prompt :].chunk(2)
    assert (inputs.labels[:, : SHAPE.prompt] == -100).all()
    assert torch.equal(torch.stack([chosen, rejected], 1).flatten(), inputs.targets)
    first = inputs.hidden[SHAPE.sequences // 2, SHAPE.prompt]  # of the first rejected response
    assert torch.equal(inputs.rows()[SHAPE.length], first)


def test_floors_are_the_products_and_the_bytes_that_nobody_can_do_without():
    shape = Shape(48, 16, 96, torch.bfloat16)
    unit = 2 * 48 * 16 * 96
    hidden, weight = 2 * 48 * 16, 2 * 96 * 16

    def floor(key):
        return CASES[key].flops(shape), CASES[key].bytes(shape)

    assert floor("linear_logprobs/prefcore/forward/none") == (unit, hidden + weight)
    assert floor("linear_logprobs/trl/chunked/frozen") == (2 * unit, 2 * hidden + weight)
    assert floor("linear_logprobs/prefcore/recompute/trained") == (3 * unit, 2 * hidden + 2 * weight)
    assert floor("dpo/liger/all rows/trained") == (3 * unit, 2 * hidden + 2 * weight)
    assert floor("linear_divergence/trl/chunked/trained") == (4 * unit, 3 * hidden + 3 * weight)
    assert floor("logprobs/prefcore//none") == (0, 2 * 48 * 96)
    assert floor("logprobs/prefcore//frozen") == (0, 3 * 2 * 48 * 96)
    assert floor("divergence/prefcore//none") == (0, 2 * 2 * 48 * 96)
    assert floor("divergence/prefcore//frozen") == (0, 5 * 2 * 48 * 96)


@pytest.mark.parametrize("schedule", ["forward", "frozen", "retain", "recompute"])
def test_a_plan_does_no_fewer_products_than_the_floor(schedule):
    head = {"forward": "none", "frozen": "frozen"}.get(schedule, "trained")
    case = CASES[f"linear_logprobs/prefcore/{schedule}/{head}"]
    needs = {"hidden_requires_grad": head != "none", "weight_requires_grad": head == "trained"}
    plan = prefcore.plan(48, 16, 96, device="cpu", schedule=schedule, **needs)
    assert plan.flops == case.flops(Shape(48, 16, 96)) + (2 * 48 * 16 * 96 if schedule == "recompute" else 0)


@pytest.mark.parametrize("key", ["cross_entropy/liger/fused/trained", "linear_logprobs/cce/exact/frozen"])
def test_kernels_for_a_gpu_are_left_out_on_a_cpu(key, monkeypatch):
    from bench.providers import VERSIONS

    monkeypatch.setattr(importlib.metadata, "version", VERSIONS.__getitem__)
    with pytest.raises(LookupError, match="needs a CUDA device"):
        CASES[key].build(CASES[key].inputs(SHAPE))


def test_a_package_of_another_version_is_left_out(monkeypatch):
    case = CASES["dpo/trl/chunked/trained"]
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.160.0")
    with pytest.raises(LookupError, match=r"trl is 1\.160\.0, not 1\.16"):
        case.build(case.inputs(SHAPE))


def test_responses_that_are_no_pairs_are_refused_in_words():
    case = CASES["dpo/prefcore/loop/trained"]
    for shape in (dataclasses.replace(SHAPE, T=24), dataclasses.replace(SHAPE, T=60)):
        with pytest.raises(LookupError, match=r"T=(24|60) is no"):
            case.inputs(shape)


def test_a_case_that_memory_cannot_hold_is_left_out_and_the_reason_told():
    bench = worker.Bench("cpu")
    shape = Shape(1 << 22, 4096, 128256).as_json()
    answer = bench.answer({"what": "time", "case": "linear_logprobs/pytorch/autograd/trained", "shape": shape})
    assert answer["skipped"].startswith("would take about")


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (torch.OutOfMemoryError("no"), {"skipped": "out of memory"}),
        (MemoryError(), {"skipped": "out of memory"}),
        (NotImplementedError("not offered\nmore"), {"skipped": "not offered"}),
        (ValueError("wrong"), {"failed": "ValueError: wrong"}),
        (KeyError("bug"), {"failed": "KeyError: 'bug'"}),
    ],
    ids=repr,
)
def test_errors_become_answers(error, answer, monkeypatch):
    def raise_it(self):
        raise error

    monkeypatch.setattr(worker.Bench, "round", raise_it)
    assert worker.Bench("cpu").answer({"what": "round"}) == answer


def test_the_command_prints_a_table_and_writes_what_it_measured(tmp_path):
    path = tmp_path / "own.json"
    sizes = shlex.split("--op logprobs linear_logprobs --T 16 --D 8 --V 64 --rounds 2 --threads 1 --device cpu")
    some = ["--provider", "prefcore", "cce", "--schedule", "", "recompute", "exact", "--head", "none", "trained"]
    command = [sys.executable, "-m", "bench", *sizes, *some, "--json", path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = json.loads(path.read_text())
    assert {"command", "date", "commit", "device", "python", "versions", "rows"} == written.keys()
    assert written["command"].startswith("python -m bench --op logprobs linear_logprobs --T 16")
    assert [row["case"] for row in written["rows"]] == [
        "prefcore recompute, head trained",
        "cut-cross-entropy exact, head trained",
        "prefcore, no gradient",
    ]
    recompute, exact, given = written["rows"]
    assert exact["skipped"]
    for row in (recompute, given):
        assert row["milliseconds_min"] <= row["milliseconds"] <= row["milliseconds_max"]
        assert row["over_floor"] > 0
        assert row["peak_mib"] >= 0
        assert row["max_error"] < 1e-4
        assert row["rounds"] == 2
    assert recompute["floor_milliseconds"] >= 3 * recompute["gemm_milliseconds"] * 0.99
    assert report.markdown(written) in done.stdout


def test_the_suite_adds_to_its_file_and_a_report_is_made_of_it(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "suite.json"
    tiny = [sys.executable, "-m", "bench.suite", "--tiny", "--rounds", "1", "--threads", "1", "--output", path]

    def run(*options):
        done = subprocess.run([*tiny, *options], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(path.read_text())["rows"]

    some = ("--op", "linear_logprobs", "dpo", "--provider", "prefcore")
    first = run("--part", "1/2", *some)
    both = run("--part", "2/2", *some)
    assert both[: len(first)] == first
    assert len({suite.identity(row) for row in both}) == len(both) > len(first)
    assert {row["op"] for row in both} == {"linear_logprobs", "dpo"}
    assert not [row for row in both if "failed" in row]
    assert run("--time-limit", "0") == both

    done = subprocess.run(
        [sys.executable, "-m", "bench.report", path, "--out", tmp_path / "report"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "report" / "report.md").read_text()
    assert "**dpo: D = 16, V = 96, float32, responses of 8, prompts of 8, T = 32**" in text
    plots = list((tmp_path / "report").glob("*.png"))
    assert any("linear_logprobs-T-" in plot.name for plot in plots)
    for plot in plots:
        assert plot.read_bytes().startswith(b"\x89PNG")
        assert f"]({plot.name})" in text


def test_a_process_that_ends_is_a_row_and_the_next_case_gets_another():
    case = CASES["linear_logprobs/prefcore/recompute/trained"]
    with measure.Session("cpu", 1, shared=True) as session:
        session.worker(case).process.kill()
        assert session.measure(case, SHAPE, 1)["failed"] == "its process ended with -9"
        assert session.measure(case, SHAPE, 1)["milliseconds"] > 0
        session.limit = 0.0
        assert session.measure(case, SHAPE, 1)["failed"] == "no answer in 0 s"


def test_the_parts_of_the_suite_are_all_of_it_in_order():
    options = suite.arguments().parse_args(["--device", "cuda"])
    every = list(suite.jobs(options))
    assert [job for k in (1, 2, 3) for job in suite.part(every, f"{k}/3")] == every
    assert len({(case.key, shape) for case, shape in every}) == len(every)
    first = suite.part(every, "1/3")
    assert {("dpo", 8192), ("linear_logprobs", 4096), ("logprobs", 8192)} <= {(c.op, s.T) for c, s in first}
    sizes = {shape.T for case, shape in every if case.op == "linear_logprobs"}
    assert sizes >= {1024 << i for i in range(7)}
    heads = {(shape.D, shape.V, shape.softcap) for _, shape in every if shape.T == 8192}
    assert heads >= {(head.D, head.V, head.softcap) for head in MODELS.values()}
    with pytest.raises(SystemExit, match="K/N"):
        suite.part(every, "4/3")


OTHER = """
from types import SimpleNamespace

def linear_logprobs(hidden, weight, targets, **_):
    logps = (hidden @ weight.t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return SimpleNamespace(logps=logps + 100)
"""


def test_another_revision_is_measured_beside_this_one_and_leaves_nothing(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)

    git("init", "--quiet")
    (tmp_path / "prefcore").mkdir()
    (tmp_path / "prefcore" / "__init__.py").write_text(OTHER)
    git("add", ".")
    git("commit", "--quiet", "-m", "another")
    extension = tmp_path / "extension.so"
    extension.touch()
    spec = importlib.util.spec_from_file_location("prefcore._C", extension, loader=None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    case = CASES["linear_logprobs/prefcore/recompute/trained"]
    with against.revision("HEAD", tmp_path) as folder:
        with measure.Session("cpu", 1, True) as here, measure.Session("cpu", 1, True, folder) as there:
            row = here.measure(case, SHAPE, 2, there)
            other = there.measure(case, SHAPE, 1)
        assert (folder / "prefcore" / "extension.so").exists()
    assert row["max_error"] < 1
    assert other["max_error"] == pytest.approx(100, abs=1)
    assert row["speedup_min"] <= row["speedup"] <= row["speedup_max"]
    assert row["against_milliseconds"] > 0
    assert not folder.exists()
    assert git("worktree", "list").stdout.count("\n") == 1
    with pytest.raises(SystemExit, match="no revision 'nowhere'"), against.revision("nowhere", tmp_path):
        pass
