"""What only a GPU shows of the plugs: TRL's own Triton kernels beside ours, LoRA on the head, fused models."""

import importlib.util

import pytest
import torch

import prefcore

pytestmark = pytest.mark.gpu

needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
T, D, V = 300, 64, 5003


def inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, D, generator=generator).to("cuda", dtype).requires_grad_()
    weight = (torch.randn(V, D, generator=generator) / 4).to("cuda", dtype).requires_grad_()
    targets = torch.randint(V, (T,), generator=generator).cuda()
    upstream = torch.randn(T, generator=generator).cuda()
    return hidden, weight, targets, upstream


def close(mine, theirs, dtype):
    """Within four roundings of the largest: a sum of products of ``dtype``, in another order."""
    gap = (mine.double() - theirs.double()).abs().max()
    assert gap <= 4 * torch.finfo(dtype).eps * max(1.0, theirs.abs().max().item())


@needs_trl
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_trls_fused_head_is_the_same_with_prefcore(dtype, softcap):
    import trl.trainer.utils

    import prefcore.trl

    names = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

    def step():
        hidden, weight, targets, upstream = inputs(dtype)
        function = trl.trainer.utils._ChunkedLogProbFunction
        values = function.apply(hidden, weight, None, targets, 0.7, 2048, softcap, 1.3, names)
        gradients = torch.autograd.grad([values[0], values[1]], [hidden, weight], [upstream, 0.1 * upstream])
        return [*values, *gradients]

    theirs = step()
    with prefcore.trl.enable():
        mine = step()
    assert [x.dtype for x in mine] == [x.dtype for x in theirs]
    agree = (mine[4] == theirs[4]).double().mean()
    assert agree == 1, "the most likely tokens differ"
    for ours, expected in zip(mine[:4] + mine[5:], theirs[:4] + theirs[5:], strict=True):
        # Both round logits of size 16 to 16 bits.
        close(ours / 16, expected / 16, dtype)


@needs_trl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trls_functions_of_logits_are_the_same_with_prefcore(dtype):
    import trl.trainer.utils as utils

    import prefcore.trl

    generator = torch.Generator().manual_seed(1)
    logits = (4 * torch.randn(3, 50, V, generator=generator)).to("cuda", dtype)
    index = torch.randint(V, (3, 50), generator=generator).cuda()
    mask = torch.rand(3, 50, generator=generator).cuda() > 0.3

    def step():
        leaf = logits.clone().requires_grad_()
        logps, entropy = utils.selective_log_softmax_and_entropy(leaf, index, temperature=0.9, row_mask=mask)
        (gradient,) = torch.autograd.grad((logps + 0.1 * entropy).sum(), leaf)
        return [logps, entropy, gradient, utils.selective_log_softmax(logits, index), utils.entropy_from_logits(logits)]

    theirs = step()
    with prefcore.trl.enable():
        mine = step()
    for ours, expected in zip(mine, theirs, strict=True):
        assert ours.dtype == expected.dtype
        close(ours, expected, torch.float32 if ours.dtype == torch.float32 else dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("schedule", ["retain", "recompute", "frozen", "forward"])
def test_lora_on_the_head_is_the_whole_weight(schedule, dtype):
    hidden, weight, targets, upstream = inputs(dtype)
    weight = weight.detach()
    inner = (torch.randn(T, 8, device="cuda") / 4).to(dtype).requires_grad_()
    outer = (torch.randn(V, 8, device="cuda") / 4).to(dtype).requires_grad_(schedule in ("retain", "recompute"))
    leaves = [x for x in (hidden, inner, outer) if x.requires_grad] if schedule != "forward" else []
    with torch.set_grad_enabled(bool(leaves)):
        mine = prefcore.linear_logprobs(hidden, weight, targets, low_rank=(inner, outer), schedule=schedule).logps
    whole = hidden.double() @ weight.double().T + inner.double() @ outer.double().T
    theirs = whole.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    # Logits of size 16, rounded to the type of the tiles.
    close(mine / 16, theirs / 16, dtype)
    if leaves:
        expected = torch.autograd.grad(theirs, leaves, upstream.double())
        for ours, wanted in zip(torch.autograd.grad(mine, leaves, upstream), expected, strict=True):
            close(ours / 16, wanted / 16, dtype)


def test_a_fused_model_gives_the_models_own_loss_and_no_logits():
    transformers = pytest.importorskip("transformers")
    from prefcore.hf import fuse_head, unfuse_head

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=V, **sizes)).cuda()
    ids = torch.randint(V, (2, 40), device="cuda")
    labels = ids.masked_fill(torch.rand(2, 40, device="cuda") < 0.5, -100)

    def step():
        model.zero_grad()
        out = model(input_ids=ids, labels=labels)
        out.loss.backward()
        return out, [p.grad.clone() for p in model.parameters()]

    plain, expected = step()
    fuse_head(model, outputs=("entropy",))
    fused, gradients = step()
    assert "logits" not in fused
    close(fused.loss, plain.loss, torch.float32)
    for ours, theirs in zip(gradients, expected, strict=True):
        # Sums over 80 rows and the vocabulary, through two layers, in TF32 or not alike.
        close(ours / 32, theirs / 32, torch.float32)
    assert model(input_ids=ids).logits.shape == (2, 40, V)
    unfuse_head(model)
    assert "logits" in model(input_ids=ids, labels=labels)
