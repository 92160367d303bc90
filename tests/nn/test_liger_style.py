"""``prefcore.nn`` against Liger's own modules, called alike, and against ``prefcore.losses`` of dense log-probs."""

import importlib.util
import inspect
from importlib.metadata import version

import pytest
import torch
from torch.nn.functional import cross_entropy, logsigmoid

import prefcore
import prefcore.nn
from prefcore import losses

if importlib.util.find_spec("liger_kernel") is None:
    absent = "Liger is not installed: the extra parity"
elif version("liger-kernel") != "0.8.5":
    absent = f"what it offers and how it is called are those of Liger 0.8.5, not {version('liger-kernel')}"
else:
    absent = ""
needs_liger = pytest.mark.skipif(bool(absent), reason=absent)

V, D, WIDTH = 11, 4, 9
BETA = 0.3
PROMPT = 2
HOSTILE = ((3, 5), (4, 0), (1, 1), (0, 2), (6, 1))  # chosen and rejected tokens of each pair
FILLED = ((3, 5), (4, 2), (1, 1), (1, 2), (6, 1))
SLACK = 2**12 * torch.finfo(torch.float32).eps


def theirs(name, **settings):
    """Liger's module of that name, without compilation."""
    import liger_kernel.chunked_loss

    return getattr(liger_kernel.chunked_loss, f"LigerFused{name}")(compiled=False, **settings)


class Batch:
    """Padded hidden states, a head and targets, the chosen before the rejected."""

    def __init__(self, responses=HOSTILE, bias=False, dtype=torch.float64):
        generator = torch.Generator().manual_seed(0)
        n = 2 * len(responses)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden = draw(n, WIDTH, D).requires_grad_()
        self.weight = draw(V, D).requires_grad_()
        self.bias = draw(V).requires_grad_() if bias else None
        self.ref_hidden = self.hidden.detach() + 0.1 * draw(n, WIDTH, D)  # near the policy, as a reference is
        self.ref_weight = self.weight.detach() + 0.1 * draw(V, D)
        self.ref_bias = self.bias.detach() + 0.1 * draw(V) if bias else None
        ids = torch.randint(V, (n, WIDTH), generator=generator)
        self.target, self.nll_target = torch.full_like(ids, -100), torch.full_like(ids, -100)
        lengths = [length for side in zip(*responses, strict=True) for length in side]
        for i, length in enumerate(lengths):
            self.target[i, PROMPT : PROMPT + length] = ids[i, PROMPT : PROMPT + length]
            self.nll_target[i, : PROMPT + length] = ids[i, : PROMPT + length]
        self.desirable = torch.arange(n) % 3 != 1

    @property
    def leaves(self):
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    @property
    def reference(self):
        return {"ref_input": self.ref_hidden, "ref_weight": self.ref_weight, "ref_bias": self.ref_bias}

    def dense(self, target=None, reference=False, mean=False):
        """Log-probs of all sequences, of dense logits; zeros for the reference that is not there."""
        target = self.target if target is None else target
        hidden, weight, bias = (
            (self.ref_hidden, self.ref_weight, self.ref_bias) if reference else (self.hidden, self.weight, self.bias)
        )
        logits = torch.nn.functional.linear(hidden, weight, bias)
        taken = target != -100
        tokens = logits.log_softmax(-1).gather(-1, target.where(taken, 0)[..., None]).squeeze(-1) * taken
        return tokens.sum(1) / taken.sum(1).clamp(min=1) if mean else tokens.sum(1)


def agree(given, expected, leaves, slack=SLACK):
    """Losses, metrics and gradients, in pairs of ``(loss, metrics)``.

    A log-ratio is a sum of at most 12 float32 log-probs. Each is of logits and a log-sum-exp below 2^4 in size and
    loses at most 4·2^4·eps in these, so the log-ratio less than 2^10·eps. With one unit of it the loss, its gradient or
    a metric changes by at most 4 times its size, or as much where it is below 1. Means of logits lose less.
    """
    assert len(given[1]) == len(expected[1])
    gradients = zip(*(torch.autograd.grad(3.0 * loss, leaves) for loss, _ in (given, expected)), strict=True)
    for ours, wanted in [(given[0], expected[0]), *zip(given[1], expected[1], strict=True), *gradients]:
        assert ours.shape == wanted.shape
        assert wanted.isfinite().all()
        assert (ours - wanted).abs().max().item() <= slack * max(1.0, wanted.abs().max().item())
    for metric in given[1]:
        assert not metric.requires_grad


DPO = {
    "sigmoid": {},
    "hinge": {},
    "exo_pair": {"label_smoothing": 0.1},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"discopop_tau": 0.1},
}
DPO_CASES = [
    *((HOSTILE, {"loss_type": name, **more}) for name, more in DPO.items()),
    *((FILLED, {"loss_type": name, "average_log_prob": True, **more}) for name, more in DPO.items()),
    (HOSTILE, {"compute_nll_loss": True, "alpha": 0.7}),
    (FILLED, {"compute_nll_loss": True, "average_log_prob": True, "chunk_size": 2}),
    (HOSTILE, {"use_ref_model": False}),
    (HOSTILE, {"label_smoothing": 0.2}),  # of two types alone
]
OTHERS = [
    *(
        (name, FILLED if mean else HOSTILE, {"alpha": 0.7, "label_smoothing": 0.1, "compute_nll_loss": nll, **average})
        for name in ("LinearCPOLoss", "LinearSimPOLoss")
        for nll in (False, True)
        for mean in ((False, True) if name == "LinearCPOLoss" else (True,))
        for average in ([{"average_log_prob": mean}] if name == "LinearCPOLoss" else [{"gamma": 0.0}, {"gamma": 0.4}])
    ),
    ("LinearORPOLoss", FILLED, {}),
    ("LinearORPOLoss", FILLED, {"compute_nll_loss": False}),
]


@needs_liger
@pytest.mark.parametrize("name", prefcore.nn.__all__)
def test_the_signatures_are_those_of_liger(name):
    import liger_kernel.chunked_loss

    ours, liger = getattr(prefcore.nn, name), getattr(liger_kernel.chunked_loss, f"LigerFused{name}")
    for method in ("__init__", "forward"):
        parameters = [
            [(x.name, x.default, x.kind) for x in inspect.signature(getattr(module, method)).parameters.values()]
            for module in (ours, liger)
        ]
        assert parameters[0] == parameters[1]


@needs_liger
def test_the_types_of_dpo_are_those_of_liger():
    assert set(DPO) == type(theirs("LinearDPOLoss"))._SUPPORTED_LOSS_TYPES
    for name in (*DPO, "ipo"):
        results = []
        for make in (theirs, lambda module, **settings: getattr(prefcore.nn, module)(**settings)):
            try:
                results.append(bool(make("LinearDPOLoss", loss_type=name)))
            except ValueError:
                results.append(False)
        assert results[0] == results[1]


@needs_liger
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(("responses", "settings"), DPO_CASES)
def test_dpo_is_that_of_liger(responses, settings, bias):
    batch = Batch(responses, bias)
    given = (batch.weight, batch.hidden, batch.target, batch.bias)
    ours = prefcore.nn.LinearDPOLoss(beta=BETA, **settings)(*given, **batch.reference)
    agree(ours, theirs("LinearDPOLoss", beta=BETA, **settings)(*given, **batch.reference), batch.leaves)


@needs_liger
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(("name", "responses", "settings"), OTHERS)
def test_losses_without_a_reference_are_those_of_liger(name, responses, settings, bias):
    batch = Batch(responses, bias)
    given = (batch.weight, batch.hidden, batch.target, batch.bias)
    ours = getattr(prefcore.nn, name)(beta=BETA, **settings)(*given)
    agree(ours, theirs(name, beta=BETA, **settings)(*given), batch.leaves)


@needs_liger
@pytest.mark.parametrize("other", [False, True], ids=["", "other tokens"])
@pytest.mark.parametrize("nll", [True, False])
def test_orpo_with_targets_of_the_nll_is_that_of_liger(nll, other):
    batch = Batch(FILLED, bias=True)
    nll_target = batch.nll_target
    if other:  # both count at the same row, and differ
        nll_target = ((nll_target + 1) % V).where(nll_target != -100, -100)
    given = (batch.weight, batch.hidden, batch.target, batch.bias)
    settings = {"beta": BETA, "compute_nll_loss": nll}
    ours = prefcore.nn.LinearORPOLoss(**settings)(*given, nll_target=nll_target)
    agree(ours, theirs("LinearORPOLoss", **settings)(*given, nll_target=nll_target), batch.leaves)


@needs_liger
@pytest.mark.parametrize("kl", [None, 0.8, torch.tensor([-0.5]), torch.linspace(-1, 1, 2 * len(HOSTILE))])
@pytest.mark.parametrize(("responses", "mean"), [(HOSTILE, False), (FILLED, True)])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("reference", [False, True])
def test_kto_is_that_of_liger(reference, bias, responses, mean, kl):
    batch = Batch(responses, bias)
    # In one chunk: in smaller ones Liger pairs each sequence with the kl of all.
    settings = {"beta": BETA, "use_ref_model": reference, "average_log_prob": mean, "chunk_size": len(batch.target)}
    given = (batch.hidden, batch.weight, batch.target, batch.bias, batch.desirable)
    more = {"kl": kl, **(batch.reference if reference else {})}
    results = []
    for module in (prefcore.nn.LinearKTOLoss(**settings), theirs("LinearKTOLoss", **settings)):
        loss, (*logps, chosen_logits, rejected_logits, chosen_rewards, rejected_rewards) = module(*given, **more)
        logits = [x / batch.hidden[..., 0].numel() / V for x in (chosen_logits, rejected_logits)]
        results.append((loss, [*logps, *logits, chosen_rewards, rejected_rewards]))
    agree(*results, batch.leaves)


def distilled(teacher_width=3, bias=False):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student, weight = draw(14, D).requires_grad_(), draw(V, D).requires_grad_()
    labels = torch.randint(V, (14,), generator=generator)
    labels[[0, 5, 6, 13]] = -100
    biases = [draw(V).requires_grad_(), draw(V)] if bias else []
    arguments = (student, weight, draw(14, teacher_width), draw(V, teacher_width), labels, *biases)
    return arguments, [student, weight, *biases[:1]]


def padded(arguments, more=3):
    """The same with a teacher of so many tokens more."""
    arguments = list(arguments)
    for i in (3, 6)[: len(arguments) - 5]:
        arguments[i] = torch.cat([arguments[i], arguments[i][:more].flip(0)])
    return arguments


def as_pair(result):
    return (result, ()) if isinstance(result, torch.Tensor) else (result[0], [x.detach() for x in result[1:]])


@needs_liger
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"return_soft_hard_loss": True},
        {"temperature": 2.0, "return_soft_hard_loss": True},
        {"weight_hard_loss": 0.0, "weight_soft_loss": 2.0, "temperature": 0.7},
        {"weight_hard_loss": 0.0, "return_soft_hard_loss": True, "chunk_size": 5},
    ],
)
@pytest.mark.parametrize("change", [tuple, padded], ids=["", "padded"])
def test_jsd_is_that_of_liger(change, settings, bias, beta):
    arguments, leaves = distilled(bias=bias)
    arguments = change(arguments)
    ours, liger = (
        as_pair(module(*arguments))
        for module in (
            prefcore.nn.LinearJSDLoss(beta=beta, **settings),
            theirs("LinearJSDLoss", beta=beta, **settings),
        )
    )
    agree(ours, liger, leaves)


@needs_liger
def test_jsd_takes_batches_as_liger_does():
    arguments, leaves = distilled(bias=True)
    student, weight, teacher, teacher_weight, labels, *biases = arguments
    given = (student.view(2, 7, D), weight, teacher.view(2, 7, 3), teacher_weight, labels.view(2, 7), *biases)
    settings = {"temperature": 2.0, "return_soft_hard_loss": True}
    ours, liger = (
        as_pair(module(*given))
        for module in (prefcore.nn.LinearJSDLoss(**settings), theirs("LinearJSDLoss", **settings))
    )
    agree(ours, liger, leaves)


@pytest.mark.parametrize("types", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_jsd_of_two_types_is_that_of_the_wider(types):
    arguments, leaves = distilled(bias=True)
    given = [x.to(types[i in (2, 3, 6)]) if x.is_floating_point() else x for i, x in enumerate(arguments)]
    wide = [x.double() if x.is_floating_point() else x for x in given]
    module = prefcore.nn.LinearJSDLoss(temperature=2.0, return_soft_hard_loss=True)
    ours, expected = as_pair(module(*given)), as_pair(module(*wide))
    # The gradient and the cross-entropy are of the student's type, up to a handful of roundings of it.
    slack = 2**6 * torch.finfo(types[0]).eps
    agree(ours, expected, leaves, slack)


# Without Liger all is of float64: the same bound, of its eps.
FINE = 2**12 * torch.finfo(torch.float64).eps


def pair_metrics(batch, mean, nll_target=None, reference=True, nll=False):
    """What the losses of pairs return first, and the four log-probs that theirs is of."""
    policy = batch.dense(mean=mean).chunk(2)
    ref = batch.dense(reference=True, mean=mean).chunk(2) if reference else [torch.zeros_like(x) for x in policy]
    logits = torch.nn.functional.linear(batch.hidden, batch.weight, batch.bias).chunk(2)
    labels = (batch.target if nll_target is None else nll_target).chunk(2)[0]
    value = cross_entropy(logits[0].flatten(0, 1), labels.flatten()) if nll else torch.zeros((), dtype=torch.float64)
    rewards = [BETA * (x - y) for x, y in zip(policy, ref, strict=True)]
    metrics = [*policy, *(x.mean() for x in logits), value, *rewards]
    return [*policy, *ref], value, [x.detach() for x in metrics]


@pytest.mark.quick
@pytest.mark.parametrize("mean", [False, True], ids=["", "mean"])
@pytest.mark.parametrize("loss_type", DPO)
def test_dpo_is_the_loss_of_dense_log_probs(loss_type, mean):
    batch = Batch(HOSTILE, bias=True)
    logps, nll, metrics = pair_metrics(batch, mean, nll=True)
    options = {"tau" if key == "discopop_tau" else key: value for key, value in DPO[loss_type].items()}
    if loss_type == "sppo_hard":
        names = ("chosen_logps", "rejected_logps", "prev_chosen_logps", "prev_rejected_logps")
        values = losses.sppo_hard(**dict(zip(names, logps, strict=True)), beta=BETA, factor=1.0)
    else:
        values = losses.get(loss_type).function(*logps, beta=BETA, **options)
    module = prefcore.nn.LinearDPOLoss(
        beta=BETA, loss_type=loss_type, average_log_prob=mean, compute_nll_loss=True, alpha=0.7, **DPO[loss_type]
    )
    ours = module(batch.weight, batch.hidden, batch.target, batch.bias, **batch.reference)
    agree(ours, (values.mean() + 0.7 * nll, metrics), batch.leaves, FINE)


@pytest.mark.quick
@pytest.mark.parametrize("nll_target", [False, True])
def test_orpo_is_the_loss_of_dense_log_probs(nll_target):
    batch = Batch(HOSTILE)
    labels = batch.nll_target if nll_target else None
    logps, nll, metrics = pair_metrics(batch, True, labels, reference=False, nll=True)
    # An empty response has mean log-prob 0, held at -1e-6 in the odds.
    odds = [x - torch.log(-torch.expm1(x)) for x in (x.clamp(max=-1e-6) for x in logps[:2])]
    ratio = odds[0] - odds[1]
    metrics += [logsigmoid(ratio).mean().detach(), ratio.mean().detach()]
    ours = prefcore.nn.LinearORPOLoss(beta=BETA)(batch.weight, batch.hidden, batch.target, None, labels)
    agree(ours, (nll - BETA * logsigmoid(ratio).mean(), metrics), batch.leaves, FINE)


@pytest.mark.quick
@pytest.mark.parametrize("nll", [False, True])
def test_cpo_and_simpo_are_the_losses_of_dense_log_probs(nll):
    batch = Batch(HOSTILE, bias=True)
    given = (batch.weight, batch.hidden, batch.target, batch.bias)
    common = {"beta": BETA, "label_smoothing": 0.1}
    logps, value, metrics = pair_metrics(batch, False, reference=False, nll=nll)
    expected = losses.cpo(*logps[:2], alpha=0.0, **common).mean() + 0.7 * value
    agree(
        prefcore.nn.LinearCPOLoss(alpha=0.7, compute_nll_loss=nll, **common)(*given),
        (expected, metrics),
        batch.leaves,
        FINE,
    )
    sums = batch.dense().chunk(2)
    lengths = (batch.target != -100).sum(1).chunk(2)
    _, value, metrics = pair_metrics(batch, True, reference=False, nll=nll)
    simpo = losses.simpo(*sums, chosen_lengths=lengths[0], rejected_lengths=lengths[1], gamma=0.4, **common)
    agree(
        prefcore.nn.LinearSimPOLoss(alpha=0.7, gamma=0.4, compute_nll_loss=nll, **common)(*given),
        (simpo.mean() + 0.7 * value, metrics),
        batch.leaves,
        FINE,
    )


@pytest.mark.quick
@pytest.mark.parametrize("mean", [False, True], ids=["", "mean"])
@pytest.mark.parametrize("kl", [None, 0.8])
def test_kto_is_the_loss_of_dense_log_probs(kl, mean):
    batch = Batch(HOSTILE, bias=True)
    logps, ref = batch.dense(mean=mean), batch.dense(reference=True, mean=mean)
    given = {"kl_logps": None, "ref_kl_logps": None, "z0": 0.0 if kl is None else kl}
    expected = losses.kto(logps, ref, batch.desirable, beta=BETA, **given).mean()
    logits = torch.nn.functional.linear(batch.hidden, batch.weight, batch.bias).sum((1, 2))
    sides = (batch.desirable, ~batch.desirable)
    metrics = [x[side].sum().detach() for x in (logps, logits, BETA * (logps - ref)) for side in sides]
    module = prefcore.nn.LinearKTOLoss(beta=BETA, use_ref_model=True, average_log_prob=mean)
    ours = module(
        batch.hidden, batch.weight, batch.target, batch.bias, batch.desirable, **batch.reference,
        kl=None if kl is None else torch.tensor([kl], dtype=torch.float64),
    )  # fmt: skip
    agree(ours, (expected, metrics), batch.leaves, FINE)


@pytest.mark.quick
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_jsd_is_the_divergence_of_dense_logits(beta, temperature):
    arguments, leaves = distilled(bias=True)
    student, weight, teacher, teacher_weight, labels, bias, teacher_bias = arguments
    taken = labels != -100
    logits, other = student @ weight.T + bias, teacher @ teacher_weight.T + teacher_bias
    hard = cross_entropy(logits, labels)
    p, q = ((x / temperature)[taken].log_softmax(-1) for x in (logits, other))
    m = (beta * q.exp() + (1 - beta) * p.exp()).log()
    if beta == 0:
        soft = q.exp() * (q - p)
    elif beta == 1:
        soft = p.exp() * (p - q)
    else:
        soft = beta * q.exp() * (q - m) + (1 - beta) * p.exp() * (p - m)
    soft = soft.sum(-1).mean()
    module = prefcore.nn.LinearJSDLoss(0.4, 0.6, beta, temperature=temperature, return_soft_hard_loss=True)
    agree(as_pair(module(*arguments)), (0.4 * hard + 0.6 * soft, [soft.detach(), hard.detach()]), leaves, FINE)


class Rollouts(Batch):
    """Sampled responses with advantages of both signs, one empty, and log-probs of the policy that sampled."""

    def __init__(self, bias=False):
        super().__init__(((3, 5), (4, 0), (1, 7)), bias)
        generator = torch.Generator().manual_seed(2)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.mask = (self.target != -100).long()
        self.ids = self.target.where(self.target != -100, 0)
        n = len(self.ids)
        self.advantages = torch.tensor([1.0, -0.7, 0.4, -1.3, 0.9, 1.1], dtype=torch.float64)
        logits = torch.nn.functional.linear(self.hidden, self.weight, self.bias)
        self.logps = logits.log_softmax(-1).gather(-1, self.ids[..., None]).squeeze(-1)
        # Ratios on both sides of all bounds, for tokens and for sequences and either sign of the advantage.
        shifts = torch.tensor([0.8, -0.8, 0.0, 0.8, 0.0, -0.8], dtype=torch.float64)
        self.old = self.logps.detach() - shifts[:, None] + 0.4 * draw(n, WIDTH)
        self.ref_logps = self.logps.detach() + 0.3 * draw(n, WIDTH)
        self.is_ratio = (0.5 + 0.2 * draw(n, WIDTH).abs()).where(self.mask.bool(), 1.0)

    @property
    def given(self):
        return (self.hidden, self.weight, self.ids, self.mask, self.advantages, self.bias)


TOKEN_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo")
SEQUENCE_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LEVELS = [*((x, "token") for x in TOKEN_TYPES), *((x, "sequence") for x in SEQUENCE_TYPES)]


def grpo_settings(loss_type, level):
    return {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "max_completion_length": WIDTH if loss_type == "dr_grpo" else None,
        "beta": 0.0 if loss_type == "luspo" else 0.1,
        "epsilon_high": 1.3 if loss_type == "cispo" else 0.28,
    }


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_rollouts_reach_all_bounds(bias):
    batch = Rollouts(bias)
    lengths = batch.mask.sum(1)
    tokens = (batch.logps - batch.old).exp()
    sequences = (((batch.logps - batch.old) * batch.mask).sum(1) / lengths.clamp(min=1)).exp()
    for ratios, counted in ((tokens, batch.mask.bool()), (sequences[:, None], (lengths > 0)[:, None])):
        for sign in (-1, 1):
            seen = ratios[counted & (batch.advantages.sign() == sign)[:, None]]
            assert (seen < 0.8).any()
            assert (seen > 1.5).any()


@needs_liger
@pytest.mark.parametrize("chunk_size", [1, 4])
@pytest.mark.parametrize("old", [False, True], ids=["", "old"])
@pytest.mark.parametrize("ratio", ["", "sequence", "column", "token"])
@pytest.mark.parametrize(("loss_type", "level"), LEVELS)
def test_grpo_is_that_of_liger(loss_type, level, ratio, old, chunk_size):
    batch = Rollouts(bias=old)
    settings = grpo_settings(loss_type, level)
    ratios = {"sequence": batch.is_ratio[:, 3], "column": batch.is_ratio[:, 3:4], "token": batch.is_ratio}
    more = {"ref_per_token_logps": None if loss_type == "luspo" else batch.ref_logps}
    more |= {"vllm_is_ratio": ratios.get(ratio), "old_per_token_logps": batch.old if old else None}
    settings["use_ref_model"] = loss_type != "luspo"
    agree(
        prefcore.nn.LinearGRPOLoss(**settings)(*batch.given, **more),
        theirs("LinearGRPOLoss", chunk_size=chunk_size, **settings)(*batch.given, **more),
        batch.leaves,
    )


VESPO = {"vespo_k_pos": 1.0, "vespo_lambda_pos": 2.0, "vespo_k_neg": 2.5, "vespo_lambda_neg": 1.5}


@needs_liger
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta": 0.0},
        {"use_ref_model": False},
        {"temperature": 0.8},
        {"use_bias_correction_kl": True},
        {"loss_type": "cispo", "use_bias_correction_kl": True},
        {"loss_type": "sapo", "use_bias_correction_kl": True},
        {"loss_type": "vespo", "use_bias_correction_kl": True},
        {"loss_type": "grpo", "delta": 1.5},
        {"loss_type": "bnpo", "delta": 1.2, "epsilon_low": 0.1},
        {"delta": 1.05},  # below 1 + epsilon_high
        {"delta": 1.0, "epsilon_high": 0.5, "use_bias_correction_kl": True},
        {"importance_sampling_level": "sequence", "delta": 1.05},
        {"importance_sampling_level": "sequence", "delta": 1.6, "loss_type": "grpo"},
        {"importance_sampling_level": "sequence", "use_bias_correction_kl": True},
        {"importance_sampling_level": "sequence", "use_bias_correction_kl": True, "loss_type": "grpo"},
        {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 0.5},
        {"loss_type": "vespo", **VESPO},
    ],
)
@pytest.mark.parametrize("hidden", [False, True], ids=["logps", "hidden"])
def test_the_options_of_grpo_are_those_of_liger(settings, hidden):
    batch = Rollouts(bias=True)
    more = batch.reference if hidden else {"ref_per_token_logps": batch.ref_logps}
    more |= {"old_per_token_logps": batch.old}
    agree(
        prefcore.nn.LinearGRPOLoss(**settings)(*batch.given, **more),
        theirs("LinearGRPOLoss", **settings)(*batch.given, **more),
        batch.leaves,
    )


@needs_liger
@pytest.mark.parametrize("items", [0.5, 40, torch.tensor(40)], ids=["few", "number", "tensor"])
@pytest.mark.parametrize("loss_type", TOKEN_TYPES)
def test_the_count_of_a_whole_step_is_taken_as_by_liger(loss_type, items):
    batch = Rollouts()
    settings = grpo_settings(loss_type, "token")
    more = {"ref_per_token_logps": batch.ref_logps, "num_items_in_batch": items}
    agree(
        prefcore.nn.LinearGRPOLoss(**settings)(*batch.given, **more),
        theirs("LinearGRPOLoss", **settings)(*batch.given, **more),
        batch.leaves,
    )


@pytest.mark.quick
@pytest.mark.parametrize(("loss_type", "level"), LEVELS)
def test_grpo_is_the_loss_of_dense_log_probs(loss_type, level):
    batch = Rollouts(bias=True)
    settings = grpo_settings(loss_type, level)
    beta, high = settings["beta"], settings["epsilon_high"]
    mask, lengths, logps = batch.mask, batch.mask.sum(1), batch.logps
    advantages, ratio = batch.advantages[:, None], logps - batch.old
    total = (ratio * mask).sum(1, keepdim=True)
    if level == "sequence":
        ratio = total / lengths.clamp(min=1)[:, None]
    ratio = ratio.exp().expand(mask.shape)
    clipped = torch.zeros_like(ratio, dtype=torch.bool)
    if loss_type == "cispo":
        values = -ratio.detach().clamp(max=high) * advantages * logps
        clipped = (ratio > high) & (advantages > 0)
    elif loss_type == "sapo":
        tau = torch.where(advantages > 0, torch.ones_like(advantages), 1.05)
        values = -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages
    elif loss_type == "vespo":
        k, rate = (torch.where(advantages >= 0, *x) for x in ((2.0, 3.0), (3.0, 2.0)))
        values = -((rate + k * total - rate * total.exp()).exp().detach()) * advantages * logps
    else:
        values = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1 + high) * advantages)
        clipped = ((ratio < 0.8) & (advantages < 0)) | ((ratio > 1 + high) & (advantages > 0))
    gap = batch.ref_logps - logps
    kl = gap.exp() - gap - 1
    values = ((values + beta * kl) * mask).sum(1)
    if loss_type in ("grpo", "sapo"):
        expected = (values / lengths.clamp(min=1)).mean()
    elif loss_type in ("dr_grpo", "luspo"):
        expected = values.mean() / (WIDTH if loss_type == "dr_grpo" else 1)
    else:
        expected = values.sum() / lengths.sum()
    metrics = [(x * mask).detach().sum() / lengths.sum() for x in ([kl, clipped] if beta else [clipped])]
    more = {"ref_per_token_logps": batch.ref_logps, "old_per_token_logps": batch.old}
    ours = prefcore.nn.LinearGRPOLoss(**settings)(*batch.given, **more)
    agree(ours, (expected, metrics), batch.leaves, FINE)


@needs_liger
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_grpo_takes_all_types_that_liger_takes(level):
    batch = Rollouts(bias=True)
    hidden = batch.hidden.detach().bfloat16().requires_grad_()
    ids, mask, advantages = batch.given[2:5]
    head = [x.detach().bfloat16().float().requires_grad_() for x in (batch.weight, batch.bias)]
    more = {"old_per_token_logps": batch.old, "vllm_is_ratio": batch.is_ratio.bfloat16()}
    more |= {"ref_input": batch.ref_hidden.bfloat16(), "ref_weight": batch.ref_weight, "ref_bias": batch.ref_bias}
    module = prefcore.nn.LinearGRPOLoss(importance_sampling_level=level)
    loss, metrics = module(hidden, head[0], ids, mask, advantages.half(), head[1], **more)
    assert {x.dtype for x in (loss, *metrics)} == {torch.float32}
    rounded = {name: x.bfloat16() if name.startswith("ref") else x for name, x in more.items()}
    same, _ = module(hidden, head[0].bfloat16(), ids, mask, advantages.half(), head[1].bfloat16(), **rounded)
    assert torch.equal(loss, same)
    theirs("LinearGRPOLoss", importance_sampling_level=level)(
        hidden, head[0], ids, mask, advantages.half(), head[1], **more
    )
    loss.backward()
    assert [x.grad.dtype for x in (hidden, *head)] == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_ratios_beyond_all_exponentials_are_finite(level):
    batch = Rollouts()
    batch.old = batch.old.detach().float() - 200
    given = [x.detach().float().requires_grad_() if x is not None and x.is_floating_point() else x for x in batch.given]
    more = {"ref_per_token_logps": batch.ref_logps + 200, "old_per_token_logps": batch.old}
    loss, metrics = prefcore.nn.LinearGRPOLoss(importance_sampling_level=level)(*given, **more)
    gradients = torch.autograd.grad(loss, given[:2])
    assert all(x.isfinite().all() for x in (loss, *metrics, *gradients))


@needs_liger
def test_what_grpo_refuses_of_what_liger_offers():
    batch = Rollouts()
    sequence = {"importance_sampling_level": "sequence"}
    for settings in ({"loss_type": "luspo"}, {"delta": 0.9}, {"delta": 0.9, **sequence}):
        theirs("LinearGRPOLoss", **settings)
        with pytest.raises(NotImplementedError, match=next(iter(settings))):
            prefcore.nn.LinearGRPOLoss(**settings)
    with pytest.raises(NotImplementedError, match="luspo"):
        prefcore.nn.LinearGRPOLoss(loss_type="luspo", **sequence)(*batch.given, ref_per_token_logps=batch.ref_logps)


def test_what_does_not_fit_grpo_is_refused():
    nn, batch = prefcore.nn, Rollouts()
    for settings in (
        {"loss_type": "ppo"},
        {"importance_sampling_level": "turn"},
        {"importance_sampling_level": "sequence", "loss_type": "sapo"},
        {"sapo_temperature_pos": 0.0},
        {"delta": 0.0},
    ):
        with pytest.raises(ValueError, match=next(iter(settings))):
            nn.LinearGRPOLoss(**settings)
    with pytest.raises(ValueError, match="ref_per_token_logps"):
        nn.LinearGRPOLoss()(*batch.given)
    with pytest.raises(ValueError, match="max_completion_length"):
        nn.LinearGRPOLoss(loss_type="dr_grpo")(*batch.given, ref_per_token_logps=batch.ref_logps)
    plain = nn.LinearGRPOLoss(use_ref_model=False)
    with pytest.raises(ValueError, match="advantages"):
        plain(*batch.given[:4], batch.old)
    with pytest.raises(ValueError, match="old_per_token_logps"):
        plain(*batch.given, old_per_token_logps=batch.old[:, 1:])
    with pytest.raises(ValueError, match="vllm_is_ratio"):
        plain(*batch.given, vllm_is_ratio=batch.is_ratio[1:])


def test_rollouts_without_any_token_are_zero():
    batch = Rollouts()
    batch.mask = torch.zeros_like(batch.mask)
    for loss_type, level in LEVELS:
        module = prefcore.nn.LinearGRPOLoss(**grpo_settings(loss_type, level))
        loss, metrics = module(*batch.given, ref_per_token_logps=batch.ref_logps)
        assert all((x == 0).all() for x in (loss, *metrics, *torch.autograd.grad(loss, batch.leaves)))


def _worker(rank, folder):
    batch = Rollouts()
    if rank == 1:
        batch.mask[0] = 0
    more = {"ref_per_token_logps": batch.ref_logps, "old_per_token_logps": batch.old}
    results = []
    for items in (None, 40):
        loss, _ = prefcore.nn.LinearGRPOLoss()(*batch.given, **more, num_items_in_batch=items)
        total, _ = prefcore.nn.LinearGRPOLoss(loss_type="bnpo")(*batch.given, **more)
        results.append((loss.detach(), total.detach() * batch.mask.sum(), batch.mask.sum()))
    torch.save(results, folder / f"{rank}.pt")


def test_dapo_divides_by_the_mean_count_of_all_ranks(two_ranks):
    folder = two_ranks(_worker)
    ranks = [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]
    counted = sum(rank[0][2] for rank in ranks).item() / 2
    for rank in ranks:
        for (loss, total, _), count in zip(rank, (counted, 20), strict=True):
            assert (loss - total / count).abs().item() <= FINE


@pytest.mark.quick
def test_all_losses_are_the_same_on_other_tiles(monkeypatch):
    monkeypatch.setenv("PREFCORE_CHECK", "1")  # linear_loss then compares them with those of other tiles
    batch, rollouts = Batch(FILLED), Rollouts()
    given = (batch.weight, batch.hidden, batch.target)
    for nll in (False, True):
        prefcore.nn.LinearDPOLoss(compute_nll_loss=nll)(*given, **batch.reference)
        prefcore.nn.LinearSimPOLoss(compute_nll_loss=nll)(*given)
        prefcore.nn.LinearCPOLoss(compute_nll_loss=nll)(*given)
        prefcore.nn.LinearORPOLoss(compute_nll_loss=nll)(*given, nll_target=batch.nll_target)
    labels = {"preference_labels": batch.desirable}
    prefcore.nn.LinearKTOLoss(use_ref_model=True)(batch.hidden, batch.weight, batch.target, **labels, **batch.reference)
    more = {"old_per_token_logps": rollouts.old, "vllm_is_ratio": rollouts.is_ratio}
    for loss_type, level in LEVELS:
        module = prefcore.nn.LinearGRPOLoss(**grpo_settings(loss_type, level))
        module(*rollouts.given, ref_per_token_logps=rollouts.ref_logps, **more)


def test_references_and_teachers_get_no_gradient():
    batch, (arguments, _) = Batch(FILLED, bias=True), distilled(bias=True)
    others = [*batch.reference.values(), arguments[2], arguments[3], arguments[6]]
    for x in others:
        x.requires_grad_()
    prefcore.nn.LinearDPOLoss()(batch.weight, batch.hidden, batch.target, batch.bias, **batch.reference)[0].backward()
    prefcore.nn.LinearJSDLoss()(*arguments).backward()
    assert all(x.grad is None for x in others)


def test_ignored_rows_may_hold_anything():
    batch = Batch(HOSTILE)
    with torch.no_grad():
        batch.hidden[batch.target == -100] = torch.nan
        batch.ref_hidden[batch.target == -100] = torch.nan
    loss, metrics = prefcore.nn.LinearDPOLoss()(batch.weight, batch.hidden, batch.target, **batch.reference)
    gradients = torch.autograd.grad(loss, batch.leaves)
    assert all(x.isfinite().all() for x in (loss, metrics[0], metrics[1], *gradients))
    assert (gradients[0][batch.target == -100] == 0).all()


def test_a_batch_without_any_token_is_finite():
    batch = Batch(((0, 0), (0, 0)))
    for name in ("LinearDPOLoss", "LinearORPOLoss", "LinearCPOLoss", "LinearSimPOLoss"):
        given = batch.reference if name == "LinearDPOLoss" else {}
        loss, metrics = getattr(prefcore.nn, name)()(batch.weight, batch.hidden, batch.target, **given)
        assert all(x.isfinite().all() for x in (loss, *metrics, *torch.autograd.grad(loss, batch.leaves)))


@pytest.mark.parametrize("frozen", ["weight", "hidden", "both"])
def test_what_needs_no_gradient_gets_none(frozen):
    batch = Batch(HOSTILE)
    for name in ("weight", "hidden"):
        if frozen in (name, "both"):
            getattr(batch, name).requires_grad_(False)
    loss, _ = prefcore.nn.LinearCPOLoss()(batch.weight, batch.hidden, batch.target)
    assert loss.requires_grad == (frozen != "both")
    if loss.requires_grad:
        loss.backward()
    assert (batch.weight.grad is None) == (frozen in ("weight", "both"))
    assert (batch.hidden.grad is None) == (frozen in ("hidden", "both"))


def test_16_bit_batches_train():
    batch = Batch(HOSTILE, bias=True, dtype=torch.bfloat16)
    loss, metrics = prefcore.nn.LinearDPOLoss()(batch.weight, batch.hidden, batch.target, batch.bias, **batch.reference)
    assert {x.dtype for x in (loss, *metrics)} == {torch.float32}
    loss.backward()
    assert all(x.grad.dtype == torch.bfloat16 and x.grad.isfinite().all() for x in batch.leaves)


def test_what_does_not_fit_is_refused():
    nn, batch = prefcore.nn, Batch(HOSTILE)
    weight, hidden, target = batch.weight, batch.hidden, batch.target
    for settings in (
        {"loss_type": "ipo"},
        {"loss_type": "exo_pair"},
        {"loss_type": "robust", "label_smoothing": 0.5},
    ):
        with pytest.raises(ValueError, match=next(iter(settings.values()))):
            nn.LinearDPOLoss(**settings)
    with pytest.raises(ValueError, match="ref_input"):
        nn.LinearDPOLoss()(weight, hidden, target)
    with pytest.raises(ValueError, match="as many of each"):
        nn.LinearCPOLoss()(weight, hidden[1:], target[1:])
    with pytest.raises(ValueError, match="_input"):
        nn.LinearCPOLoss()(weight, hidden[:, 1:], target)
    with pytest.raises(ValueError, match="nll_target"):
        nn.LinearORPOLoss()(weight, hidden, target, nll_target=target[:1])
    with pytest.raises(ValueError, match="preference_labels"):
        nn.LinearKTOLoss()(hidden, weight, target)
    with pytest.raises(ValueError, match="kl"):
        nn.LinearKTOLoss()(hidden, weight, target, preference_labels=batch.desirable, kl=torch.zeros(2))
    arguments, _ = distilled()
    with pytest.raises(ValueError, match="at least the student's 11 tokens"):
        nn.LinearJSDLoss()(*arguments[:3], arguments[3][1:], arguments[4])
    with pytest.raises(ValueError, match="teacher_input"):
        nn.LinearJSDLoss()(*arguments[:2], arguments[2][1:], *arguments[3:])
    for settings in ({"beta": 1.5}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            nn.LinearJSDLoss(**settings)


@needs_liger
def test_states_and_labels_may_be_slices():
    batch = Batch(FILLED, bias=True)
    states = torch.cat([batch.hidden.detach(), batch.hidden.detach()[:, :1]], 1).requires_grad_()
    labels, nll_labels = (torch.cat([torch.full_like(x[:, :1], -100), x], 1) for x in (batch.target, batch.nll_target))
    given = (batch.weight, states[:, :-1], labels[:, 1:], batch.bias, nll_labels[:, 1:])
    ours = prefcore.nn.LinearORPOLoss(beta=BETA)(*given)
    agree(ours, theirs("LinearORPOLoss", beta=BETA)(*given), [states, batch.weight, batch.bias])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_all_is_of_its_type_with_gradients_of_the_leaves(dtype):
    batch = Batch(HOSTILE, bias=True, dtype=torch.float32)
    hidden = batch.hidden.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = prefcore.nn.LinearDPOLoss()(batch.weight, hidden, batch.target, batch.bias, **batch.reference)
    plain, _ = prefcore.nn.LinearDPOLoss()(
        batch.weight.bfloat16(), hidden.bfloat16(), batch.target, batch.bias.bfloat16(),
        **{name: x.bfloat16() for name, x in batch.reference.items()},
    )  # fmt: skip
    assert torch.equal(loss, plain)
    loss.backward()
    assert [x.grad.dtype for x in (hidden, batch.weight, batch.bias)] == [dtype, torch.float32, torch.float32]


def test_a_compiled_module_gives_the_same():
    batch = Batch(HOSTILE, bias=True)
    given = (batch.weight, batch.hidden, batch.target, batch.bias)
    module = prefcore.nn.LinearDPOLoss(beta=BETA)
    # The shortest backend: what is asked is whether dynamo takes it, with its breaks.
    compiled = torch.compile(module, backend="eager")(*given, **batch.reference)
    agree(compiled, module(*given, **batch.reference), batch.leaves, FINE)
