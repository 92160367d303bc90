"""Packed attention on a GPU: backends against softmax over the layout, models against one sequence at a time."""

import copy
import math

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
import transformers

from prefcore import _native
from prefcore.data import PackedCollator, PairDataset, pack
from prefcore.hf import PreferenceTrainer, _backends, find_head, response_logps, score
from prefcore.hf._backends import BACKENDS, Call, Needs
from prefcore.hf.attention import run_packed
from prefcore.testing import assert_no_worse_than

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not _native.has_cuda(), reason="prefcore._C was built without CUDA"),
]

DEVICE = torch.device("cuda")
PLAIN = Call(scale=None, dropout=0.0, window=None, softcap=None, sinks=None)


def ragged(seed, longest=400):
    generator = np.random.default_rng(seed)
    draw = lambda high: int(generator.integers(1, high + 1))
    return [(draw(longest), [draw(longest // 2) for _ in range(draw(6))]) for _ in range(4)] + [(1, [1, 3])]


def layout_of(sizes, sharing="share"):
    return pack([[1] * p for p, _ in sizes], [[[1] * r for r in group] for _, group in sizes], sharing=sharing).layout


def skip_where_lacking(name, call, head_size, value_size, dtype):
    softcap, sinks, dropout = call.softcap is not None, call.sinks is not None, call.dropout > 0
    needs = Needs(head_size, value_size, frozenset({call.window}), softcap, sinks, dropout)
    lack = BACKENDS[name].lacks(needs, DEVICE, dtype, True)
    if lack is not None:
        pytest.skip(f"{name}: {lack}")


def over_the_layout(layout, query, key, value, call):
    """Softmax over all pairs, with the forbidden ones at -inf."""
    position = layout.of_tokens()[1]
    allowed = layout.attends()
    if call.window is not None:
        allowed = allowed & (position[:, None] - position[None] < call.window)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = torch.einsum("qhe,khe->hqk", query, key) * query.shape[-1] ** -0.5
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = scores.masked_fill(~torch.from_numpy(allowed).to(query.device), -math.inf)
    if call.sinks is not None:
        scores = torch.cat([scores, call.sinks[:, None, None].expand(-1, scores.shape[1], 1)], -1)
    return torch.einsum("hqk,khe->qhe", scores.softmax(-1)[..., : key.shape[0]], value)


def with_gradients(function, leaves, call, dtype):
    leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    sinks = leaves[3] if len(leaves) > 3 else None
    out = function(*leaves[:3], call._replace(sinks=sinks))
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(DEVICE)
    # In each dtype the same numbers, so that nothing but the arithmetic differs.
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.bfloat16().to(dtype))]


def check(name, layout, call, heads=(8, 2), head_size=64, value_size=64, dtype=torch.bfloat16, sinks=False):
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator).bfloat16().to(DEVICE)
    n = layout.tokens
    leaves = [make(n, heads[0], head_size), make(n, heads[1], head_size), make(n, heads[1], value_size)]
    if sinks:
        leaves.append(make(heads[0]))
        call = call._replace(sinks=leaves[3])
    skip_where_lacking(name, call, head_size, value_size, dtype)
    plan = BACKENDS[name].plan(layout, DEVICE, frozenset({call.window}))
    mine = with_gradients(lambda q, k, v, c: BACKENDS[name].call(plan, q, k, v, c), leaves, call, dtype)
    reference = lambda q, k, v, c: over_the_layout(layout, q, k, v, c)
    eager = with_gradients(reference, leaves, call, dtype)
    truth = with_gradients(reference, leaves, call, torch.float64)
    for what, *parts in zip(("out", "query", "key", "value", "sinks"), mine, eager, truth, strict=False):
        assert_no_worse_than(*parts, f"{name}: {what}")


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("sharing", ["share", "pack"])
@pytest.mark.parametrize("window", [None, 7, 100])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
@pytest.mark.parametrize("name", BACKENDS)
def test_each_backend_equals_softmax_over_the_layout(name, heads, window, sharing, seed):
    check(name, layout_of(ragged(seed), sharing), PLAIN._replace(window=window), heads=heads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["flex", "sdpa"])
def test_wider_types_equal_softmax_over_the_layout(name, dtype):
    check(name, layout_of(ragged(2)), PLAIN._replace(window=70), dtype=dtype)


@pytest.mark.parametrize("window", [None, 60])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("name", BACKENDS)
def test_softcap_and_sinks_equal_softmax_over_the_layout(name, sinks, softcap, window):
    check(name, layout_of(ragged(3)), PLAIN._replace(window=window, softcap=softcap), sinks=sinks)


@pytest.mark.parametrize(("head_size", "value_size"), [(192, 128), (128, 64), (256, 256)])
@pytest.mark.parametrize("name", BACKENDS)
def test_values_of_another_size_equal_softmax_over_the_layout(name, head_size, value_size):
    check(name, layout_of(ragged(4, longest=150)), PLAIN, head_size=head_size, value_size=value_size, heads=(4, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_gradient_of_shared_keys_has_the_same_bits_in_every_run(dtype):
    layout = layout_of([(300, [40] * 16), (50, [3, 90])])
    plan = _backends.varlen_plan(layout, DEVICE, frozenset({None}))
    key = torch.randn(layout.tokens, 2, 64, device=DEVICE, dtype=dtype, requires_grad=True)
    upstream = torch.randn(len(plan.keys), 2, 64, device=DEVICE, dtype=dtype)
    backward = lambda: torch.autograd.grad(_backends._gather_keys(plan, key, key)[0], key, upstream)[0]
    first = backward()
    for _ in range(5):
        assert torch.equal(backward(), first)


SIZES = {
    "vocab_size": 97,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 192,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = ["sliding_attention", "full_attention"]
MODELS = {
    "llama": ("LlamaConfig", {}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 32, "sliding_window": 40, "layer_types": MIXED}),
    "gemma2": ("Gemma2Config", {"head_dim": 32, "sliding_window": 40, "layer_types": MIXED}),
    "gpt2": ("GPT2Config", {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 1024}),
}


def make(name):
    kind, special = MODELS[name]
    config = getattr(transformers, kind)(**{**(SIZES if name != "gpt2" else {"vocab_size": 97}), **special})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.bfloat16().to(DEVICE)


def examples(seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(3, 97, (n,), generator=generator).tolist()
    sizes = [(150, [30, 5, 60, 1]), (1, [20]), (70, [40, 7])]
    return [draw(p) for p, _ in sizes], [[draw(r) for r in group] for _, group in sizes]


def one_at_a_time(model, prompts, responses):
    logps = []
    for prompt, group in zip(prompts, responses, strict=True):
        for response in group:
            logits = model(input_ids=torch.tensor([prompt + response], device=DEVICE), use_cache=False).logits
            # In float64 for models of either dtype: only the backbones differ.
            rows = logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            logps.append(rows.gather(1, torch.tensor(response, device=DEVICE)[:, None]).sum())
    return torch.stack(logps)


def with_parameter_gradients(model, logps):
    model.zero_grad()
    (logps * torch.arange(1, len(logps) + 1, device=DEVICE)).sum().backward()
    return logps.detach(), {name: p.grad.double() for name, p in model.named_parameters()}


@pytest.mark.parametrize("attention", ["auto", *BACKENDS])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_no_worse_packed_than_one_sequence_at_a_time(name, attention):
    model = make(name)
    prompts, responses = examples()
    batch = pack(prompts, responses).to(DEVICE)
    try:
        mine = with_parameter_gradients(model, response_logps(model, batch, attention=attention))
    except NotImplementedError as lack:
        if attention == "auto" or "cannot be used here" not in str(lack):
            raise
        pytest.skip(str(lack))
    eager = with_parameter_gradients(model, one_at_a_time(model, prompts, responses))
    model.double()
    truth = with_parameter_gradients(model, one_at_a_time(model, prompts, responses))
    assert_model_no_worse_than(mine, eager, truth)


def test_scores_in_several_passes_are_no_worse_than_one_sequence_at_a_time():
    model = make("llama")
    prompts, responses = examples()
    with torch.no_grad():
        scores = torch.cat(score(model, prompts, responses, max_tokens=260).logps)
        eager = one_at_a_time(model, prompts, responses)
        truth = one_at_a_time(model.double(), prompts, responses)
    band = torch.finfo(torch.bfloat16).eps * float(truth.abs().max())
    assert_no_worse_than(scores.cpu().float(), eager.cpu().float(), truth.cpu(), "logps", band=band)


@pytest.mark.parametrize("sharing", ["share", "off"])
def test_a_trainer_takes_its_steps_on_the_gpu(sharing, tmp_path):
    prompts, responses = examples()
    pairs = [(p, group[0], group[-1] + [2]) for p, group in zip(prompts, responses, strict=True)]
    settings = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, bf16=True, logging_steps=1, report_to=[],
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = PreferenceTrainer(make("llama").float(), settings, PairDataset(pairs), beta=0.1, sharing=sharing)
    trainer.train()
    assert next(trainer.model.parameters()).device.type == DEVICE.type
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    # At the first step the policy is its own reference, but for what bfloat16 rounds otherwise.
    assert losses[0] == pytest.approx(math.log(2), rel=0.1)


def assert_model_no_worse_than(mine, eager, truth):
    """Of log-probs and parameter gradients in bfloat16."""
    eps = torch.finfo(torch.bfloat16).eps
    # A log-prob is the sum of the tokens' own, each off by some roundings of a logit.
    band = eps * float(truth[0].abs().max())
    assert_no_worse_than(mine[0].float(), eager[0].float(), truth[0], "logps", band=band)
    for key, true in truth[1].items():
        error, budget = (float((gradients[key] - true).norm()) for _, gradients in (mine, eager))
        assert error <= 2 * budget + 4 * eps * float(true.norm()), (key, error, budget)


def test_a_forward_and_backward_with_a_prepared_plan_do_not_wait_for_the_gpu():
    model = make("llama")
    backbone = find_head(model).backbone
    batch = pack(*examples()).to(DEVICE)
    step = lambda: run_packed(backbone, batch).last_hidden_state.sum().backward()
    step()  # the probe, and the plan
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize("attention", ["varlen", "flex"])
def test_layers_compile_whole_and_are_no_worse(attention):
    skip_where_lacking(attention, PLAIN, 32, 32, torch.bfloat16)
    model = make("llama")
    cases = [examples(0), examples(1), ([[5, 6, 7]], [[[8] * 90, [9]]])]
    run = lambda case: with_parameter_gradients(
        model, response_logps(model, pack(*case).to(DEVICE), attention=attention)
    )
    wanted = [run(case) for case in cases]
    exact = copy.deepcopy(model).double()
    truths = [with_parameter_gradients(exact, one_at_a_time(exact, *case)) for case in cases]
    for layer in model.model.layers:
        layer.compile(fullgraph=True)
    for case, eager, truth in zip(cases, wanted, truths, strict=True):
        assert_model_no_worse_than(run(case), eager, truth)


def test_a_pinned_batch_is_moved_without_waiting():
    items = [{"prompt_ids": [1, 2], "response_ids": [[3], [4, 5]], "reward": [0.5, 1.0]}]
    (batch,) = next(iter(torch.utils.data.DataLoader(items, collate_fn=PackedCollator(), pin_memory=True)))
    assert batch.input_ids.is_pinned()
    assert batch.extras["reward"].is_pinned()
    moved = batch.to("cuda", non_blocking=True)
    assert moved.input_ids.tolist() == [1, 2, 3, 4, 5]
