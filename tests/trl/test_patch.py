"""What ``prefcore.trl.enable`` puts in the stead of TRL's functions: where, how long, and that it computes the same.

Values and gradients are held to a float64 oracle, no worse than TRL's own code of the same types.
"""

import gc
import importlib.util
import inspect
import math
import sys
import threading
import types
from contextlib import nullcontext
from importlib.metadata import version

import pytest
import torch

import prefcore
import prefcore.trl
from prefcore.testing import assert_no_worse_than

pytest.importorskip("trl", reason="TRL's own functions are needed: the extra trl")
if not version("trl").startswith("1.16."):
    pytest.skip("the functions compared here are those of TRL 1.16", allow_module_level=True)

import trl
import trl.trainer.utils as utils
from trl.kernels import chunked_divergence, chunked_logprob

OWN = {
    name: getattr(module, name)
    for module, name in (
        (chunked_logprob, "ChunkedLogProbFunction"),
        (chunked_divergence, "ChunkedDivergenceFunction"),
        (utils, "selective_log_softmax"),
        (utils, "entropy_from_logits"),
        (utils, "selective_log_softmax_and_entropy"),
        (utils, "_fused_logprob_entropy"),
    )
    if hasattr(module, name)  # the last needs Triton
}
USERS = (
    *(f"trl.trainer.{name}_trainer" for name in ("dpo", "kto", "grpo", "rloo", "sft", "distillation")),
    *(f"trl.experimental.{name}.{name}_trainer" for name in ("a2po", "cpo", "orpo", "sdft", "sdpo", "tpo")),
    "trl.experimental.sdft.loss_utils",
    "trl.experimental.sdpo.loss_utils",
)
EXPERIMENTAL = [
    (name, getattr(importlib.import_module(name), owner) if owner else importlib.import_module(name), function)
    for name, owner, function in (
        ("trl.experimental.gkd.gkd_trainer", "GKDTrainer", "generalized_jsd_loss"),
        ("trl.experimental.gold.gold_trainer", "GOLDTrainer", "generalized_jsd_loss"),
        ("trl.experimental.iw_opd.iw_opd_trainer", "IWOPDTrainer", "generalized_jsd_loss"),
        ("trl.experimental.sdft.loss_utils", "", "compute_full_logit_self_distillation_loss"),
        ("trl.experimental.sdpo.loss_utils", "", "compute_full_logit_self_distillation_loss"),
    )
]
OWN_DIVERGENCES = {name: vars(owner)[function] for name, owner, function in EXPERIMENTAL}
V = 37  # no multiple of a tile, of prefcore's or of TRL's below


@pytest.fixture
def enabled():
    with prefcore.trl.enable():
        yield


@pytest.fixture(autouse=True)
def left_as_found():
    assert not prefcore.trl.enabled()
    yield
    assert not prefcore.trl.enabled(), "the test left TRL's functions replaced"


def held():
    """Of every loaded module of TRL, every name and what it is bound to."""
    return {
        (module, name): value
        for module in [name for name in sys.modules if name.partition(".")[0] == "trl"]
        for name, value in vars(sys.modules[module]).items()
    }


def same(before, after):
    return before.keys() == after.keys() and all(before[key] is after[key] for key in before)


# Where, and for how long


def test_every_module_holds_ours_while_enabled_and_its_own_after():
    for name in USERS:
        importlib.import_module(name)
    before = held()
    holders = {name: [key for key, value in before.items() if value is own] for name, own in OWN.items()}
    modules = {key[0] for keys in holders.values() for key in keys}
    assert modules >= {"trl.kernels", "trl.trainer.utils", "trl.trainer.distillation_trainer", *USERS[6:]}
    prefcore.trl.enable()
    during = held()
    prefcore.trl.disable()
    for name, own in OWN.items():
        values = {id(during[key]): during[key] for key in holders[name]}
        assert len(values) == 1, f"{name} was replaced by several"
        (ours,) = values.values()
        assert ours.__module__ == "prefcore.trl._functions"
        assert not [key for key, value in during.items() if value is own]
    changed = {key for key in before if during[key] is not before[key]}
    asking = {("trl.trainer.utils", "_use_triton"), ("trl.trainer.distillation_trainer", "_use_triton")}
    apart = {key for key in before if key[1] == "compute_full_logit_self_distillation_loss"}
    assert len(apart) == 4
    assert changed == {key for keys in holders.values() for key in keys} | asking | apart
    assert same(before, held())


def test_nothing_but_modules_of_trl_holds_what_is_replaced():
    for name in USERS:
        importlib.import_module(name)
    replaced = {id(own) for own in OWN.values()}
    seen = set()
    for thing in gc.get_objects():
        # isinstance() asks the object, and some warn when they are asked.
        if not issubclass(type(thing), types.FunctionType | type) or str(thing.__module__).partition(".")[0] != "trl":
            continue
        if isinstance(thing, type):
            inside = vars(thing).values()
        else:
            cells = [cell.cell_contents for cell in thing.__closure__ or () if cell != types.CellType()]
            inside = (*cells, *(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values())
        assert not replaced & set(map(id, inside)), f"{thing.__module__}.{thing.__qualname__} holds one"
        seen.add(id(thing))
    assert seen >= {id(utils.add_fused_lm_head), id(trl.DPOTrainer), id(trl.DPOTrainer.compute_loss)}


def test_a_module_imported_while_enabled_gets_ours_and_is_restored(monkeypatch, enabled):
    trainer = importlib.import_module("trl.experimental.cpo.cpo_trainer")
    spec = importlib.util.spec_from_file_location("trl.experimental.cpo.later", trainer.__file__)
    later = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, later)
    spec.loader.exec_module(later)
    assert later.selective_log_softmax is utils.selective_log_softmax is not OWN["selective_log_softmax"]
    prefcore.trl.disable()
    assert later.selective_log_softmax is utils.selective_log_softmax is OWN["selective_log_softmax"]


def test_enabling_twice_changes_the_options_alone_and_one_disable_restores(monkeypatch):
    before, budgets = held(), []
    monkeypatch.setattr(prefcore, "linear_logprobs", lambda *a, **options: budgets.append(options["memory_budget"]))
    prefcore.trl.enable(memory_budget=1 << 20)
    during = held()
    for budget in (None, 4096):
        prefcore.trl.enable(memory_budget=budget)
        assert same(during, held())
        with pytest.raises(AttributeError):  # of the None that stands for the statistics
            apply_logps(utils._ChunkedLogProbFunction)
    assert budgets == [None, 4096]
    prefcore.trl.disable()
    prefcore.trl.disable()
    assert same(before, held())


def test_enabling_again_serves_modules_that_were_loaded_anew(monkeypatch):
    """What `importlib.reload` does in a notebook, without leaving another TRL to the tests behind this one."""
    for name in ("selective_log_softmax", "_use_triton"):
        monkeypatch.setattr(utils, name, getattr(utils, name))  # what it is set to in the end
    prefcore.trl.enable()
    ours = utils.selective_log_softmax
    monkeypatch.setattr(utils, "selective_log_softmax", anew := types.FunctionType(*fields(OWN[ours.__name__])))
    monkeypatch.setattr(utils, "_use_triton", chunked_logprob._use_triton)
    prefcore.trl.enable()
    assert utils.selective_log_softmax is ours
    assert utils._use_triton(torch.device("cpu"))
    prefcore.trl.disable()
    assert utils.selective_log_softmax is anew
    assert utils._use_triton is chunked_logprob._use_triton


def fields(function):
    return function.__code__, function.__globals__, function.__name__, function.__defaults__


def test_a_backward_runs_when_all_is_disabled_since_its_forward(harness):
    labels = torch.tensor([[0, 0, 1, 1, 0, 1], [0, 1, 0, 0, 0, 0]])
    model, forward = fused(harness, labels, kind="softcap")
    grads = []
    for replaced in (True, False):
        with prefcore.trl.enable() if replaced else nullcontext():
            loss = forward().loss
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
        model.zero_grad(set_to_none=True)
    eps = torch.finfo(torch.float32).eps * harness.roundings(4)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=eps, atol=eps * b.abs().max())


def test_leaving_the_context_by_an_exception_restores():
    before = held()
    with pytest.raises(KeyError, match="inside, enabled: True"), prefcore.trl.enable():
        raise KeyError(f"inside, enabled: {prefcore.trl.enabled()}")
    assert same(before, held())


def test_threads_that_enable_and_disable_leave_nothing_behind():
    before = held()

    def work():
        for _ in range(5):
            with prefcore.trl.enable():
                pass

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same(before, held())


def test_divergences_of_experimental_trainers_are_replaced_and_restored(enabled):
    for module, owner, name in EXPERIMENTAL:
        own = OWN_DIVERGENCES[module]
        ours = vars(owner)[name]
        assert ours is not own
        assert inspect.signature(getattr(owner, name)) == inspect.signature(getattr(own, "__func__", own))
        assert isinstance(ours, staticmethod) == isinstance(own, staticmethod)
    prefcore.trl.disable()
    assert all(vars(owner)[name] is OWN_DIVERGENCES[module] for module, owner, name in EXPERIMENTAL)


@pytest.mark.parametrize("name", ["trl.experimental.gkd.gkd_trainer", "trl.experimental.sdft.loss_utils"])
def test_an_experimental_trainer_imported_while_enabled_gets_ours_and_is_restored(monkeypatch, name):
    package, _, module = name.rpartition(".")
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys.modules[package], module, None)  # which the import will set
    finders = list(sys.meta_path)
    with prefcore.trl.enable():
        again = importlib.import_module(name)
        owner = getattr(again, "GKDTrainer", again)
        function = "generalized_jsd_loss" if owner is not again else "compute_full_logit_self_distillation_loss"
        assert getattr(owner, function).__wrapped__.__module__ == name
    assert not hasattr(getattr(owner, function), "__wrapped__")
    assert sys.meta_path == finders


def test_a_distillation_imported_while_enabled_scores_what_is_kept_alone_until_disabled(monkeypatch):
    name = "trl.trainer.distillation_trainer"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys.modules["trl.trainer"], "distillation_trainer", None, raising=False)
    with prefcore.trl.enable():
        later = importlib.import_module(name)
        assert later._use_triton(torch.device("cpu"))
    assert later._use_triton is chunked_logprob._use_triton
    assert not later._use_triton(torch.device("cpu"))


def test_an_experimental_function_that_has_changed_is_left_and_told(monkeypatch):
    from trl.experimental.gkd import GKDTrainer

    monkeypatch.setattr(GKDTrainer, "generalized_jsd_loss", staticmethod(lambda student, teacher: 0))
    changed = GKDTrainer.generalized_jsd_loss
    with pytest.warns(
        RuntimeWarning, match=r"GKDTrainer\.generalized_jsd_loss\(.*\(student, teacher\); it stays trl's own"
    ):
        prefcore.trl.enable()
    assert GKDTrainer.generalized_jsd_loss is changed
    prefcore.trl.disable()
    assert GKDTrainer.generalized_jsd_loss is changed


# Refusals


@pytest.mark.parametrize("found", ["1.15.9", "0.29.0", "unknown"])
def test_another_version_is_refused(monkeypatch, found):
    monkeypatch.setattr(trl, "__version__", found)
    before = held()
    with pytest.raises(RuntimeError, match=rf"looked for trl >= 1\.16 and found {found}"):
        prefcore.trl.enable()
    assert same(before, held())


def test_a_newer_version_of_the_same_signatures_is_accepted(monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.17.0.dev0")
    with prefcore.trl.enable():
        assert utils.selective_log_softmax is not OWN["selective_log_softmax"]


def test_an_absent_trl_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"looked for trl >= 1\.16"):
        prefcore.trl.enable()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (chunked_logprob, "ChunkedLogProbFunction"),
        (chunked_divergence, "ChunkedDivergenceFunction"),
        (utils, "entropy_from_logits"),
        (utils, "_use_triton"),
    ],
)
def test_a_missing_or_changed_function_is_refused_by_name_and_nothing_is_replaced(monkeypatch, module, name):
    class Changed:
        @staticmethod
        def forward(ctx, hidden, weight, loss):
            pass

    for change in ("missing", "function", "class", "unreadable"):
        with monkeypatch.context() as patch:
            if change == "missing":
                patch.delattr(module, name)
            else:
                patch.setattr(module, name, {"function": lambda logits, mask: 0, "class": Changed}.get(change, 3))
            before = held()
            with pytest.raises(RuntimeError, match=rf"{module.__name__}\.{name}\(.*in trl 1\.16"):
                prefcore.trl.enable()
            assert same(before, held())


@pytest.mark.parametrize(("budget", "error"), [("1GB", TypeError), (True, TypeError), (-1, ValueError)])
def test_a_budget_that_is_none_is_refused(budget, error):
    with pytest.raises(error, match="memory_budget"):
        prefcore.trl.enable(memory_budget=budget)


# The fused head: ChunkedLogProbFunction


def draw(seed=0, rows=11, D=8, V=V, spread=1.0, dtype=torch.float32, bias=True):
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=generator)
    hidden, weight = random(rows, D) * spread, random(V, D)
    targets = torch.randint(V, (rows,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), random(V).to(dtype) if bias else None, targets


def leaves(*tensors, grad=True):
    return [None if x is None else x.detach().clone().requires_grad_(grad) for x in tensors]


def apply_logps(function, **options):
    hidden, weight, bias, targets = draw()
    return function.apply(hidden, weight, bias, targets, 1.0, 16, options.get("softcap"), 1.0, ())


def oracle_logps(hidden, weight, bias, targets, temperature, softcap, scale):
    z = hidden @ weight.T + (0 if bias is None else bias)
    z = z * scale
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    logp = z.log_softmax(-1)
    p = logp.exp()
    return (
        logp.gather(-1, targets[:, None])[:, 0],
        -(p * logp).sum(-1),
        (2 * logp).logsumexp(-1),
        z.mean(-1),
        (z.argmax(-1) == targets) if z.numel() else targets == 0,
    )


LOGPS_CASES = {
    "plain": {},
    "no bias": {"bias": False},
    "all options": {"temperature": 0.7, "softcap": 3.0, "scale": 0.4},
    "an integer temperature": {"temperature": 2},
    "logits of 1e4": {"spread": 1e4},
    "capped logits of 1e4": {"spread": 1e4, "softcap": 30.0},
    "no row": {"rows": 0},
    "one token": {"V": 1},
    "bf16": {"dtype": torch.bfloat16, "temperature": 1.5, "softcap": 20.0},
    "fp16": {"dtype": torch.float16},
    "float64": {"dtype": torch.float64},
    "a bf16 head under float32 states": {"head": torch.bfloat16},
    "a float32 head under bf16 states": {"dtype": torch.bfloat16, "head": torch.float32},
    "autocast": {"autocast": True, "temperature": 0.9},
    "no upstream gradient": {"upstream": 0.0},
}


@pytest.mark.parametrize("case", LOGPS_CASES)
@pytest.mark.parametrize("entropy_grad", [False, True], ids=["logged entropy", "entropy gradient"])
def test_the_fused_head_equals_trls(case, entropy_grad, enabled):
    options = {"temperature": 1.0, "softcap": None, "scale": 1.0, "upstream": 1.0, "autocast": False, "head": None}
    options.update({k: v for k, v in LOGPS_CASES[case].items() if k in options})
    inputs = draw(**{k: v for k, v in LOGPS_CASES[case].items() if k not in options})
    hidden, weight, bias, targets = inputs
    if options["head"] is not None:
        weight, bias = weight.to(options["head"]), bias.to(options["head"])
    upstream = torch.randn(2, len(targets), generator=torch.Generator().manual_seed(1)) * options["upstream"]
    transform = options["temperature"], options["softcap"], options["scale"]

    def through(compute, *tensors):
        tensors = leaves(*tensors)
        values = compute(*tensors)
        loss = (values[0] * upstream[0].to(values[0].dtype)).sum()
        if entropy_grad:
            loss = loss + (values[1] * upstream[1].to(values[1].dtype)).sum()
        loss.backward()
        return values, [None if x is None else x.grad for x in tensors]

    def by(function):
        def compute(hidden, weight, bias):
            with torch.autocast("cpu", torch.bfloat16) if options["autocast"] else nullcontext():
                return function.apply(
                    hidden, weight, bias, targets, transform[0], 16, *transform[1:], chunked_logprob.OPTIONAL_OUTPUTS
                )

        return through(compute, hidden, weight, bias)

    assert utils._ChunkedLogProbFunction is not OWN["ChunkedLogProbFunction"]
    ours, our_grads = by(utils._ChunkedLogProbFunction)
    theirs, their_grads = by(OWN["ChunkedLogProbFunction"])
    doubles = (None if x is None else x.double() for x in (hidden, weight, bias))
    truth, true_grads = through(lambda *head: oracle_logps(*head, targets, *transform), *doubles)
    for name, a, b, t in zip(("logps", "entropy", "squares", "mean"), ours, theirs, truth, strict=False):
        assert a.dtype == b.dtype == torch.float32
        assert (a.requires_grad, a.shape) == (b.requires_grad, b.shape), name
        assert_no_worse_than(a, b, t, name, band=1.2e-7 * truth[0].abs().max().item() if len(targets) else 0.0)
    assert torch.equal(ours[4], theirs[4])
    for name, a, b, t in zip(("hidden", "weight", "bias"), our_grads, their_grads, true_grads, strict=True):
        if b is None:
            assert a is None
            continue
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert_no_worse_than(a, b, t, f"gradient of {name}")


def test_under_autocast_a_head_of_another_type_goes_to_autocasts_at_once(enabled):
    hidden, weight, bias, targets = draw()
    with torch.autocast("cpu", torch.bfloat16):  # float16, the type of the states, does not hold this bias
        values = utils._ChunkedLogProbFunction.apply(hidden.half(), weight, bias + 1e5, targets, 1.0, 16)
    assert all(torch.isfinite(x).all() for x in values)


@pytest.mark.parametrize("wanted", [(), ("log_probs",), ("log_probs", "is_top1", "mean_logits"), ("entropy",)])
def test_outputs_not_asked_for_are_none(wanted, enabled):
    hidden, weight, bias, targets = draw()
    arguments = hidden, weight, bias, targets, 1.0, 16, None, 1.0, wanted
    ours, theirs = utils._ChunkedLogProbFunction.apply(*arguments), OWN["ChunkedLogProbFunction"].apply(*arguments)
    assert [x is None for x in ours] == [x is None for x in theirs]
    assert len(utils._ChunkedLogProbFunction.apply(*arguments[:6])) == 5  # all, by default


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 1, 2)])
def test_frozen_tensors_get_no_gradient(frozen, enabled):
    head = leaves(*draw()[:3])
    for i in frozen:
        head[i].requires_grad_(False)
    logps = utils._ChunkedLogProbFunction.apply(*head, draw()[3], 1.0, 16)[0]
    assert logps.requires_grad == (len(frozen) < 3)
    if logps.requires_grad:
        logps.sum().backward()
    assert [x.grad is None for x in head] == [i in frozen for i in range(3)]


def test_ties_with_an_earlier_token_are_not_top1(enabled):
    hidden, weight = torch.ones(3, 4), torch.zeros(6, 4)
    weight[2] = weight[4] = 1
    arguments = hidden, weight, None, torch.tensor([2, 4, 0]), 1.0, 4
    assert utils._ChunkedLogProbFunction.apply(*arguments)[4].tolist() == [True, False, False]
    assert OWN["ChunkedLogProbFunction"].apply(*arguments)[4].tolist() == [True, False, False]


def fused(harness, labels, *, cast=False, kind="bias"):
    model = harness.make_model(kind)
    utils.add_fused_lm_head(
        model, temperature=0.8, cast_lm_head_to_fp32=cast, outputs=("log_probs", *chunked_logprob.OPTIONAL_OUTPUTS)
    )
    ids = torch.randint(harness.VOCABULARY, labels.shape, generator=torch.Generator().manual_seed(3))
    return model, lambda: model(input_ids=ids, labels=ids.masked_fill(labels == 0, -100), fused_lm_head=True)


FIELDS = ("loss", "log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")


@pytest.mark.parametrize("kind", ["bias", "softcap", "divided"])
@pytest.mark.parametrize("labelled", ["some", "none"])
def test_a_model_fused_before_scores_its_labels_alone_by_prefcore(harness, monkeypatch, kind, labelled):
    labels = torch.tensor([[0, 0, 1, 1, 0, 1], [0, 1, 0, 0, 0, 0], [0] * 6]) * (labelled == "some")
    model, forward = fused(harness, labels, kind=kind)
    theirs = forward()
    theirs.loss.backward()
    their_grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    scored, count = [], prefcore.linear_logprobs

    def counted(hidden, weight, targets, **options):
        scored.append(targets.numel())
        return count(hidden, weight, targets, **options)

    monkeypatch.setattr(prefcore, "linear_logprobs", counted)
    monkeypatch.setattr(chunked_logprob, "_forward_tile", None)  # TRL's kernel, which must not run
    with prefcore.trl.enable():
        ours = forward()
        ours.loss.backward()
    assert scored == [int(labels[:, 1:].sum())]
    eps = torch.finfo(torch.float32).eps * harness.roundings(4)
    for name in FIELDS:
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a.dtype, a.shape, a.requires_grad) == (b.dtype, b.shape, b.requires_grad), name
        torch.testing.assert_close(a, b, rtol=eps, atol=eps)
    for name, p in model.named_parameters():
        assert (p.grad is None) == (their_grads[name] is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, their_grads[name], rtol=eps, atol=eps * their_grads[name].abs().max())
    monkeypatch.undo()
    assert same_outputs(forward(), theirs), "TRL's own runs again"


def same_outputs(ours, theirs):
    return all(torch.equal(getattr(ours, name), getattr(theirs, name)) for name in FIELDS)


def test_compaction_is_of_trainers_and_never_of_kernels(enabled):
    assert utils._use_triton(torch.device("cpu"))
    for module in (chunked_logprob, chunked_divergence):
        assert not module._use_triton(torch.device("cpu")), "decides whether Triton's kernels run"
    # Elsewhere TRL decides: on Neuron a number of rows that varies would recompile every batch.
    for device in ("cuda", "xpu", "mps"):
        assert utils._use_triton(torch.device(device)) == chunked_logprob._use_triton(torch.device(device))


def test_where_zero3_shards_the_head_trls_own_functions_run(monkeypatch, enabled):
    from transformers.integrations import deepspeed

    monkeypatch.setattr(deepspeed, "is_deepspeed_zero3_enabled", lambda: True)
    for module, name, count in (
        (utils, "_ChunkedLogProbFunction", 9),
        (chunked_divergence, "ChunkedDivergenceFunction", 12),
    ):
        called = []
        monkeypatch.setattr(OWN[name.lstrip("_")], "apply", lambda *arguments, called=called: called.append(arguments))
        getattr(module, name).apply(*range(count))
        assert called == [tuple(range(count))]


# Distillation: ChunkedDivergenceFunction


def oracle_divergence(beta, student, teacher, temperature):
    sides = []
    for hidden, weight, bias, softcap, scale in (student, teacher):
        z = (hidden @ weight.T + (0 if bias is None else bias)) * scale
        sides.append(((z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature).log_softmax(-1))
    s, t = sides
    kl = lambda a, b: (a.exp() * (a - b)).sum(-1)
    if beta in (0, 1):
        value = kl(t, s) if beta == 0 else kl(s, t)
    else:
        m = torch.logaddexp(s + math.log(1 - beta), t + math.log(beta))
        value = beta * kl(t, m) + (1 - beta) * kl(s, m)
    return value, -(s.exp() * s).sum(-1)


DIVERGENCE_CASES = {
    "plain": {},
    "all options": {
        "temperature": 0.7, "scale": 0.4, "softcap": 3.0, "teacher_scale": 1.3, "teacher_softcap": 5.0, "bias": True
    },
    "one side capped": {"softcap": 2.0, "temperature": 2},
    "logits of 50": {"spread": 20.0},
    "a wider teacher of a larger vocabulary": {"D": 12, "V": V + 5},
    "no row": {"rows": 0},
    "bf16": {"dtype": torch.bfloat16, "teacher_dtype": torch.bfloat16},
    "a bf16 student, a float32 teacher": {"dtype": torch.bfloat16},
    "a float32 student, a bf16 teacher": {"teacher_dtype": torch.bfloat16},
    "autocast": {"autocast": True},
    "no upstream gradient": {"upstream": 0.0},
}  # fmt: skip


@pytest.mark.parametrize("beta", [0, 0.0, 0.3, 0.9, 1, 1.0])
@pytest.mark.parametrize("case", DIVERGENCE_CASES)
def test_the_divergence_equals_trls(case, beta, enabled):
    o = {"temperature": 1.0, "scale": 1.0, "softcap": None, "teacher_scale": 1.0, "teacher_softcap": None,
         "dtype": torch.float32, "teacher_dtype": torch.float32, "autocast": False, "upstream": 1.0, "bias": False,
         "spread": 1.0, "rows": 7, "D": 8, "V": V, **DIVERGENCE_CASES[case]}  # fmt: skip
    student = draw(1, o["rows"], spread=o["spread"] / 8**0.5, dtype=o["dtype"], bias=o["bias"])[:3]
    teacher = draw(2, o["rows"], o["D"], o["V"], o["spread"] / 8**0.5, o["teacher_dtype"], o["bias"])[:3]
    upstream = torch.randn(o["rows"], generator=torch.Generator().manual_seed(3)) * o["upstream"]

    def through(compute, *tensors):
        tensors = leaves(*tensors)
        value, entropy = compute(tensors[:3], tensors[3:])
        (value * upstream.to(value.dtype)).sum().backward()
        return (value, entropy), [None if x is None else x.grad for x in tensors]

    def by(function):
        def compute(student, teacher):
            with torch.autocast("cpu", torch.bfloat16) if o["autocast"] else nullcontext():
                return function.apply(
                    *student, *teacher, beta, o["temperature"], o["scale"], o["softcap"], o["teacher_scale"],
                    o["teacher_softcap"],
                )  # fmt: skip

        return through(compute, *student, *teacher)

    def oracle(student, teacher):
        cut = [None if x is None else x.detach()[: V if i else None] for i, x in enumerate(teacher)]
        sides = (*student, o["softcap"], o["scale"]), (*cut, o["teacher_softcap"], o["teacher_scale"])
        return oracle_divergence(beta, *sides, o["temperature"])

    ours, our_grads = by(chunked_divergence.ChunkedDivergenceFunction)
    theirs, their_grads = by(OWN["ChunkedDivergenceFunction"])
    truth, true_grads = through(oracle, *(None if x is None else x.double() for x in (*student, *teacher)))
    assert not ours[1].requires_grad
    assert not theirs[1].requires_grad
    for name, a, b, t in zip(("divergence", "entropy"), ours, theirs, truth, strict=True):
        assert a.dtype == b.dtype == torch.float32
        # A KL is a difference of logits that are as large as the spread.
        assert_no_worse_than(a, b, t, name, band=1.2e-7 * o["spread"])
    for i, (a, b, t) in enumerate(zip(our_grads, their_grads, true_grads, strict=True)):
        if i >= 3 or b is None:
            assert a is None
            assert b is None
            continue
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert_no_worse_than(a, b, t, f"gradient {i}", band=1.2e-7 * o["spread"])


@pytest.mark.parametrize("kept", [6, 0])
def test_the_distillation_loss_runs_on_prefcore_over_what_is_kept_alone(monkeypatch, kept, enabled):
    loss = importlib.import_module("trl.trainer.distillation_trainer")._chunked_divergence_loss
    called, own = [], prefcore.linear_divergence

    def counted(student, weight, teacher, *rest, **options):
        called.append((options["kind"], len(student), len(teacher)))
        return own(student, weight, teacher, *rest, **options)

    monkeypatch.setattr(prefcore, "linear_divergence", counted)
    monkeypatch.setattr(chunked_divergence, "_stats_tile", None)
    hidden, weight, _, _ = draw(bias=False)
    mask = torch.tensor([[1, 0, 1, 1, 0, 1, 1, 1, 0, 0, 0]]) * (kept > 0)

    def by():
        student, head = leaves(hidden[None], weight)
        values = loss(student, hidden[None].flip(1), head, weight.flip(0), mask, 0.4)
        values[0].backward()
        return *values, student.grad, head.grad

    ours = by()
    monkeypatch.undo()
    prefcore.trl.disable()
    assert called == [("js", kept, kept)]
    torch.testing.assert_close(ours, by(), rtol=1e-5, atol=1e-6)


# Logits: selective_log_softmax, entropy_from_logits and both at once


def oracle_logits(logits, index, temperature):
    z = logits / temperature
    logp = z.log_softmax(-1)
    chosen = index if index.ndim == logits.ndim else index[..., None]
    return logp.gather(-1, chosen).view(index.shape), -(logp.exp() * logp).sum(-1)


def logits_of(dtype=torch.float32, shape=(3, 5), V=V, spread=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, V, generator=generator) * spread).to(dtype)


LOGITS_CASES = {
    "plain": {},
    "one dimension": {"shape": (6,)},
    "four dimensions": {"shape": (2, 3, 2)},
    "a temperature": {"temperature": 0.3},
    "an integer temperature": {"temperature": 2},
    "logits of 1e4": {"spread": 1e4},
    "no row": {"shape": (2, 0)},
    "bf16": {"dtype": torch.bfloat16, "temperature": 0.7},
    "fp16": {"dtype": torch.float16},
    "float64": {"dtype": torch.float64},
    "a view": {"view": True},
    "a mask": {"mask": True, "temperature": 1.3},
    "a mask in bf16": {"mask": True, "dtype": torch.bfloat16},
    "no upstream gradient": {"upstream": 0.0},
    "autocast": {"autocast": True, "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("tokens", [None, 1, 3], ids=["one token", "K of 1", "K of 3"])
@pytest.mark.parametrize("case", LOGITS_CASES)
def test_functions_of_logits_equal_trls(case, tokens):
    o = {"dtype": torch.float32, "shape": (3, 5), "spread": 1.0, "temperature": 1.0, "view": False, "mask": False,
         "upstream": 1.0, "autocast": False, **LOGITS_CASES[case]}  # fmt: skip
    logits = logits_of(o["dtype"], o["shape"], spread=o["spread"])
    shape = o["shape"] if tokens is None else (*o["shape"], tokens)
    if o["view"]:
        shape = (shape[0], shape[1] - 1, *shape[2:])
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(V, shape, generator=generator)
    mask = torch.randint(2, shape, generator=generator) if o["mask"] else None
    upstream = torch.randn(*shape, generator=generator) * o["upstream"]
    kept = torch.ones(shape) if mask is None else mask

    def through(compute, logits, dtype):
        (leaf,) = leaves(logits)
        seen = leaf[:, :-1] if o["view"] else leaf
        with torch.autocast("cpu", torch.bfloat16) if o["autocast"] else nullcontext():
            values = compute(seen)
        loss = (values[0] * upstream.to(dtype)).sum()
        if tokens is None:
            loss = loss + (values[1] * upstream.to(dtype)).sum()
        loss.backward()
        return (*values, leaf.grad)

    def by(selective, entropy, both):
        def compute(seen):
            logps = selective(seen, index, o["temperature"], mask)
            if tokens is not None:
                return logps, entropy(seen)
            again, entropies = both(seen, index, temperature=o["temperature"], row_mask=mask)
            assert torch.equal(again, logps)
            return again, entropies

        return through(compute, logits, logits.dtype)

    def oracle(seen):
        logps, entropy = oracle_logits(seen, index, o["temperature"])
        if tokens is not None:
            return logps * kept, oracle_logits(seen, index, 1.0)[1]
        return logps * kept, entropy * kept

    names = ("selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy")
    # TRL's functions call one another by their global names, so its own run while nothing is replaced.
    theirs = by(*(OWN[name] for name in names))
    with prefcore.trl.enable():
        ours = by(*(getattr(utils, name) for name in names))
    truth = through(oracle, logits.double(), torch.float64)
    for name, a, b, t in zip(("logps", "entropy", "gradient"), ours, theirs, truth, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert_no_worse_than(a, b, t, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hole", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("masked", ["some", "all"])
@pytest.mark.parametrize("tokens", [(), (3,)], ids=["one token", "K of 3"])
def test_masked_rows_are_zero_in_value_and_gradient_whatever_they_hold(dtype, hole, masked, tokens, enabled):
    logits = logits_of(dtype)
    mask = torch.tensor([[1, 0, 1, 1, 0]] * 3) * (masked == "some")
    logits[mask == 0] = hole
    index = torch.randint(V, (3, 5, *tokens), generator=torch.Generator().manual_seed(1))
    row_mask = mask.view(3, 5, *(1 for _ in tokens)).expand(index.shape)
    expected = OWN["selective_log_softmax"](logits.float(), index, 1.0, row_mask)
    for kind in (torch.int64, torch.bool, torch.float32):
        (leaf,) = leaves(logits)
        values = [utils.selective_log_softmax(leaf, index, 1.0, row_mask.to(kind))]
        if not tokens:
            values += utils.selective_log_softmax_and_entropy(leaf, index, row_mask=row_mask.to(kind))
        torch.testing.assert_close(values[0].float(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
        sum(x.sum() for x in values).backward()
        for x in values:
            assert torch.count_nonzero(x[mask == 0]) == 0
        assert torch.isfinite(leaf.grad).all()
        assert torch.count_nonzero(leaf.grad[mask == 0]) == 0
        assert (torch.count_nonzero(leaf.grad) > 0) == (masked == "some")


def test_of_several_tokens_of_a_position_some_may_be_masked(enabled):
    logits, index = logits_of(shape=(2, 4)), torch.randint(V, (2, 4, 3))
    row_mask = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 1, 1]]).expand(2, 4, 3)
    grads = []
    for function in (utils.selective_log_softmax, OWN["selective_log_softmax"]):
        (leaf,) = leaves(logits)
        function(leaf, index, 0.7, row_mask).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_an_entropy_is_detached_on_request(enabled):
    (leaf,) = leaves(logits_of())
    index = torch.zeros(3, 5, dtype=torch.long)
    logps, entropy = utils.selective_log_softmax_and_entropy(leaf, index, entropy_requires_grad=False)
    assert logps.requires_grad
    assert not entropy.requires_grad
    assert utils.selective_log_softmax_and_entropy(leaf, index)[1].requires_grad


def test_tokens_without_probability_add_nothing_to_the_entropy(enabled):
    logits = logits_of()
    logits[..., ::2] = -math.inf
    (leaf,) = leaves(logits)
    entropy = utils.entropy_from_logits(leaf)
    entropy.sum().backward()
    torch.testing.assert_close(entropy, OWN["entropy_from_logits"](logits[..., 1::2]))
    assert torch.count_nonzero(leaf.grad[..., ::2]) == 0


@pytest.mark.parametrize("temperature", [0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused_in_trls_words(temperature, enabled):
    index = torch.zeros(3, 5, dtype=torch.long)
    for function in (utils.selective_log_softmax, utils.selective_log_softmax_and_entropy):
        with pytest.raises(ValueError, match="temperature must be positive"):
            function(logits_of(), index, temperature=temperature)


def test_functions_of_logits_read_them_through_prefcore(monkeypatch, enabled):
    called, own = [], prefcore.logprobs
    monkeypatch.setattr(prefcore, "logprobs", lambda *a, **k: called.append(k.get("outputs", ())) or own(*a, **k))
    logits, index = logits_of(), torch.zeros(3, 5, dtype=torch.long)
    utils.selective_log_softmax(logits, index)
    utils.selective_log_softmax(logits, index[..., None])
    utils.entropy_from_logits(logits, 2)
    utils.selective_log_softmax_and_entropy(logits, index)
    assert called == [(), ("logsumexp",), ("entropy",), ("entropy",)]


@pytest.mark.skipif("_fused_logprob_entropy" not in OWN, reason="TRL has its kernel of logits only beside Triton")
def test_the_kernels_twin_takes_what_trls_takes_and_runs_on_a_cpu(enabled):
    logits, index = logits_of(), torch.randint(V, (3, 5))
    mask = index > 9
    ours = utils._fused_logprob_entropy(logits, index, temperature=0.7, row_mask=mask)
    expected = OWN["selective_log_softmax_and_entropy"](logits, index, temperature=0.7, row_mask=mask)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert sys.modules["trl.kernels"].selective_log_softmax_and_entropy is utils._fused_logprob_entropy


# Divergences of whole logits in the experimental trainers

REDUCED = {
    "the default": {},
    "a sum": {"reduction": "sum"},
    "a mean": {"reduction": "mean", "beta": 0},
    "a count": {"num_items_in_batch": 7, "beta": 1},
    "a count on a device, of what is not reduced": {"num_items_in_batch": torch.tensor(7), "reduction": "none"},
    "a temperature": {"temperature": 0.6, "beta": 0.2},
    "bf16": {"dtype": torch.bfloat16, "beta": 0.9},
    "logits of 1e3": {"spread": 1e3, "beta": 1.0},
}


@pytest.mark.parametrize("labelled", ["no labels", "labels", "no label left"])
@pytest.mark.parametrize("case", REDUCED)
@pytest.mark.parametrize("module", list(OWN_DIVERGENCES)[:3])
def test_a_generalised_jsd_equals_trls(module, case, labelled, monkeypatch):
    options = {"dtype": torch.float32, "spread": 1.0, **REDUCED[case]}
    dtype, spread = options.pop("dtype"), options.pop("spread")
    teacher, (student,) = logits_of(dtype, spread=spread, seed=1), leaves(logits_of(dtype, spread=spread))
    if labelled != "no labels":
        labels = torch.randint(V, (3, 5), generator=torch.Generator().manual_seed(2))
        options["labels"] = labels.masked_fill((labels % 3 == 0) | (labelled == "no label left"), -100)
    rows = torch.ones(3, 5, dtype=bool) if labelled == "no labels" else options["labels"] != -100

    def oracle(student, teacher):
        t = options.get("temperature", 1.0)
        s, q = ((x / t)[rows].log_softmax(-1) for x in (student, teacher))
        kl, beta = (lambda a, b: (a.exp() * (a - b)).sum()), options.get("beta", 0.5)
        if beta in (0, 1):
            total = kl(q, s) if beta == 0 else kl(s, q)
        else:
            m = torch.logaddexp(s + math.log(1 - beta), q + math.log(beta))
            total = beta * kl(q, m) + (1 - beta) * kl(s, m)
        if "num_items_in_batch" in options:
            return total / options["num_items_in_batch"]
        by = {"sum": 1, "mean": rows.sum() * V, None: 3 if labelled == "no labels" else rows.sum().clamp_min(1)}
        return total / by[options.get("reduction")]

    def with_gradient(function, student, teacher):
        (leaf,) = leaves(student)
        value = function(leaf, teacher)
        value.backward()
        return value, leaf.grad

    (_, owner, name), called = next(row for row in EXPERIMENTAL if row[0] == module), []
    by = lambda student, teacher: getattr(owner, name)(student, teacher, **options)
    theirs = with_gradient(by, student, teacher)
    divergence = prefcore.divergence
    monkeypatch.setattr(prefcore, "divergence", lambda *a, **k: called.append(1) or divergence(*a, **k))
    with prefcore.trl.enable():
        ours = with_gradient(by, student, teacher)
    assert called == [1]
    truth = with_gradient(oracle, student.double(), teacher.double())
    for what, a, b, t in zip(("value", "gradient"), ours, theirs, truth, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if torch.isnan(b).any():  # a mean of nothing
            assert torch.equal(torch.isnan(a), torch.isnan(b))
        else:
            assert_no_worse_than(a, b, t, what)


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (0, {"reduction": "none"}),
        (0, {"reduction": "none", "labels": True}),
        (1, {"logits_are_probs": True}),
        (2, {"top_k": 4, "beta": 0}),
        (2, {"top_k": 4, "add_tail": False, "beta": 1}),
    ],
)
def test_what_is_no_divergence_of_whole_softmaxes_stays_trls(module, options, monkeypatch):
    _, owner, name = EXPERIMENTAL[module]
    options = {**options, **({"labels": torch.zeros(3, 5, dtype=torch.long)} if "labels" in options else {})}
    student, teacher = (logits_of(seed=seed).softmax(-1) for seed in (0, 1))
    theirs = getattr(owner, name)(student, teacher, **options)
    monkeypatch.setattr(prefcore, "divergence", None)
    with prefcore.trl.enable():
        assert torch.equal(getattr(owner, name)(student, teacher, **options), theirs)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("module", [3, 4])
def test_a_self_distillation_loss_of_whole_logits_equals_trls(module, dtype, alpha):
    _, owner, name = EXPERIMENTAL[module]
    upstream = torch.randn(3, 5, generator=torch.Generator().manual_seed(3))

    def by(computed):
        student, teacher = (logits_of(dtype, seed=seed).to(computed) for seed in (0, 1))
        (student,) = leaves(student)
        value = getattr(owner, name)(student, teacher, distillation_alpha=alpha)
        (value * upstream.to(computed)).sum().backward()
        return value, student.grad

    theirs, truth = by(dtype), by(torch.float64)
    with prefcore.trl.enable():
        ours = by(dtype)
    for what, a, b, t in zip(("value", "gradient"), ours, theirs, truth, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert_no_worse_than(a, b, t, what)
