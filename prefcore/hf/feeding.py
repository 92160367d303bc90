"""What losses are fed: the names of a loss's parameters say what to gather of the policy, of those that it is held
against, and of the data."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import prefcore
from prefcore import losses
from prefcore.data import ListDataset, PackedBatch, pack
from prefcore.data.extras import WithExtras
from prefcore.data.lists import WithMismatched
from prefcore.losses._groups import place_of_first_greatest
from prefcore.ops._checks import check_number

# Of whom, of which responses, what.
_GATHERED = re.compile(r"(ref_|prev_)?(chosen_|rejected_|kl_)?(logps|lengths)")
_OF_TOKENS = ("kl_values", "log_sum_sq_probs")
_OF_GROUPS = ("scores", "labels", "cu_groups")
# With length_normalize=True, as if they were asked for.
_LENGTHS = ("lengths", "chosen_lengths", "rejected_lengths")
# Needs that numbers beside the data may meet.
_DATA = frozenset(("rewards", "preferences", "soft_labels", "token_masks", "classes"))
_SOURCES: dict[str, str] = {
    "rewards": "scores of the responses, which the data may give (chosen_score and rejected_score, or scores)",
    "preferences": "a judge's preferences, which no data file has",
    "soft_labels": "probabilities that a label is right, which no data file has",
    "token_masks": "weights or marks of tokens, which no data file has",
    "classes": "classes of the responses, which no data file has",
    "denoising_errors": "errors of a diffusion model's denoiser",
    "third_response": "log-probs of a further response to each prompt, which preference data do not have",
    "contexts": "log-probs or predictions in contexts that preference data do not have",
    "old": "log-probs of the policy that sampled the responses, from a rollout",
    "advantages": "advantages, of prefcore.advantages",
    "entropy": "entropies of the policy's distributions",
}


@dataclass(frozen=True)
class Feed:
    """A loss of a trainer's, with its coefficients and the names of the tensors that it is fed."""

    method: losses.Method
    settings: dict[str, Any]
    weight: float
    inputs: tuple[str, ...]
    beta: float | Tensor  # of the rewards beta·(logps − ref_logps)

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def of_tokens(self) -> bool:
        return "token_logps" in self.method.needs

    @property
    def takes_beta(self) -> bool:
        return "beta" in _Parameters(self.method).arguments

    @property
    def unlearns(self) -> bool:
        """Whether it makes all tokens of its responses less likely: no mask says which."""
        return self.method.name == "unlikelihood" and "mask" not in self.inputs

    @property
    def running_mean(self) -> bool:
        """Whether it is held against the mean of all rewards so far, which the trainer keeps."""
        return self.method.family == "unpaired" and "delta" in self.inputs

    @property
    def couples(self) -> bool:
        """Whether the loss of an example depends on the others of its batch."""
        alone = "kl_logps" in inspect.signature(self.method.function).parameters and not self.mismatched
        return not (self.method.separable or self.running_mean or alone)

    @property
    def mismatched(self) -> bool:
        return any(name.endswith("kl_logps") for name in self.inputs)

    @property
    def counts_over_ranks(self) -> bool:
        """Whether the loss itself couples the examples of all ranks."""
        return self.mismatched and "process_group" in inspect.signature(self.method.function).parameters

    @property
    def columns(self) -> set[str]:
        """The extras of datasets that it is fed and that they must have."""
        parameters = _Parameters(self.method)
        fed = {parameters.column(name) or name for name in self.inputs if not parameters.gathered(name)}
        return fed - {"rewards"} if parameters.graded else fed

    def gathers(self, source: str, kind: str = "logps") -> bool:
        return any(m[1] == source and m[3] == kind for m in map(_GATHERED.fullmatch, self.inputs) if m)


class Wants(NamedTuple):
    """What is gathered of each batch, once for all losses."""

    reference: bool
    previous: bool
    reference_tokens: bool  # its log-probs of tokens; else their sums do
    previous_tokens: bool
    divergence: bool
    log_sum_sq_probs: bool
    mismatched: bool

    @classmethod
    def of(cls, feeds: Sequence[Feed]) -> Wants:
        given = {name for feed in feeds for name in feed.inputs}
        return cls(
            reference=bool(given & {"scores", "kl_values"}) or any(feed.gathers("ref_") for feed in feeds),
            previous=any(feed.gathers("prev_") for feed in feeds),
            reference_tokens=any(feed.of_tokens and feed.gathers("ref_") for feed in feeds),
            previous_tokens=any(feed.of_tokens and feed.gathers("prev_") for feed in feeds),
            divergence="kl_values" in given,
            log_sum_sq_probs="log_sum_sq_probs" in given,
            mismatched=any(feed.mismatched for feed in feeds),
        )


def read_losses(
    loss: str | Sequence[str],
    beta: float | None = None,
    loss_args: Mapping[str, Any] | None = None,
    loss_weights: Sequence[float] | None = None,
    columns: Collection[str] | None = None,
    trainer: str = "PreferenceTrainer",
) -> list[Feed]:
    """The registered methods with their coefficients and inputs, tried out on one pair or group where that can be.

    Args:
        loss, beta, loss_args, loss_weights: as :class:`prefcore.hf.PreferenceTrainer` has them.
        columns: ``extras`` that all datasets have; None if these are not known yet, so that none is missed.
        trainer: who lacks what a loss needs, for the message.

    Raises:
        TypeError: an argument that is unknown, missing or of a wrong type.
        ValueError: a loss that is not registered or given twice, a coefficient outside its domain, a column that the
            data lack.
        NotImplementedError: a method that needs what a trainer cannot gather.
    """
    if beta is not None:
        check_number("beta", beta)
        if not 0 < beta < float("inf"):
            raise ValueError(f"beta must be positive, got {beta}")
    names = [loss] if isinstance(loss, str) or not isinstance(loss, Sequence) else list(loss)
    if not names:
        raise ValueError("no loss is given")
    if loss_args is not None and not isinstance(loss_args, Mapping):
        raise TypeError(f"loss_args must be a mapping of arguments to values, got {type(loss_args).__name__}")
    methods = [losses.get(name) for name in names]
    for number, method in enumerate(methods):
        if method in methods[:number]:
            raise ValueError(f"the loss {method.name!r} is given twice; give it one weight")
    weights = _weights(loss_weights, len(methods))
    arguments = _arguments(names, methods, dict(loss_args or {}))
    feeds = [
        _feed(name, method, own, weight, beta, columns, trainer)
        for name, method, own, weight in zip(names, methods, arguments, weights, strict=True)
    ]
    for feed in feeds:
        _try(feed)
    return feeds


def columns_of(datasets: Sequence[WithExtras]) -> set[str] | None:
    """The extras that all of them have; None without a dataset."""
    return set.intersection(*(set(dataset.extras) for dataset in datasets)) if datasets else None


def check_division(feeds: Sequence[Feed], max_tokens: int | None) -> None:
    """Refuse ``max_tokens`` beside a loss of all examples of a batch together."""
    coupled = [feed.name for feed in feeds if feed.couples]
    if coupled and max_tokens is not None:
        raise ValueError(
            f"max_tokens may divide a batch, whose examples the loss {coupled[0]!r} couples; leave max_tokens out"
        )


def check_data(feeds: Sequence[Feed], dataset: Any) -> None:
    """Refuse a dataset that cannot feed the losses.

    Raises:
        ValueError: lists for a loss of pairs, single responses for a loss that compares some, extras that the dataset
            lacks, labels other than 1 and 0 for a loss of desirable and undesirable responses, or single responses that
            are undesirable for a loss that imitates them (desirable for one that unlearns them).
    """
    bare = dataset.dataset if isinstance(dataset, WithMismatched) else dataset
    listed = isinstance(bare, ListDataset)
    for feed in feeds:
        lacking = sorted(feed.columns - set(bare.extras))
        if lacking:
            raise ValueError(
                f"the loss {feed.name!r} is fed {', '.join(lacking)}, which a dataset lacks; see with_extras"
            )
        if not listed:
            continue
        sides = any(name.startswith(("chosen_", "rejected_")) for name in feed.inputs)
        if sides or feed.method.family in ("pairwise", "token"):
            raise ValueError(
                f"the loss {feed.name!r} is of pairs, and a ListDataset holds lists or single responses; see "
                "tokenize_pairs"
            )
        if feed.method.family == "listwise" and all(len(own) == 1 for own in bare.lengths()[1]) and _compares(feed):
            raise ValueError(f"the loss {feed.name!r} compares responses to a prompt, and no item has two of them")
        for index in range(len(bare)):
            labels = bare[index]["labels"]
            if "desirable" in feed.inputs and not ((labels == 0) | (labels == 1)).all():
                raise ValueError(
                    f"the loss {feed.name!r} takes labels of 1, desirable, and 0, got {labels.tolist()} "
                    f"for item {index}"
                )
            alone = feed.method.family == "sft" and "cu_groups" not in feed.inputs and len(labels) == 1
            if alone and labels[0] == (1 if feed.unlearns else 0):
                does, what = ("unlearns", "desirable") if feed.unlearns else ("imitates", "undesirable")
                raise ValueError(f"the loss {feed.name!r} {does} responses, and that of item {index} is {what}")


def _weights(given: Sequence[float] | None, count: int) -> list[float]:
    if given is None:
        return [1.0] * count
    weights = list(given)
    if len(weights) != count:
        raise ValueError(f"expected loss_weights for {count} losses, got {len(weights)}")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise TypeError(f"loss_weights must be numbers, got {type(weight).__name__}")
        if not 0 < weight < float("inf"):
            raise ValueError(f"loss_weights must be positive, got {weight}")
    return [float(weight) for weight in weights]


def _arguments(names: list[str], methods: list[losses.Method], given: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of each loss: its own, or of arguments for all those that it knows."""
    nested = [key for key, value in given.items() if isinstance(value, Mapping)]
    if nested:
        spellings = [{name, method.name, *method.aliases} for name, method in zip(names, methods, strict=True)]
        strange = sorted(key for key in nested if not any(key in known for known in spellings))
        if strange or len(nested) < len(given):
            raise TypeError(
                f"loss_args must hold arguments, or the arguments of each loss by its name ({', '.join(names)}), "
                f"got {', '.join(map(repr, strange or given))}"
            )
        return [{k: v for key in nested if key in known for k, v in given[key].items()} for known in spellings]
    if len(methods) == 1:
        return [given]
    known = [_Parameters(method).arguments for method in methods]
    unknown = sorted(name for name in given if not any(name in each for each in known))
    if unknown:
        raise TypeError(f"none of the losses {', '.join(names)} takes {', '.join(unknown)}")
    return [{name: value for name, value in given.items() if name in each} for each in known]


class _Parameters:
    """A method's parameters: tensors that are fed to it, and coefficients."""

    def __init__(self, method: losses.Method) -> None:
        self.method = method
        self._all = inspect.signature(method.function).parameters
        self.tensors = [name for name in self._all if self._is_tensor(name)]
        self.coefficients = [name for name in self._all if name not in self.tensors and name != "process_group"]

    @property
    def arguments(self) -> list[str]:
        """What a user may give or ask for."""
        return [*self._all, *(("beta",) if "scores" in self._all and "beta" not in self._all else ())]

    def default(self, name: str) -> Any:
        return self._all[name].default

    def required(self, name: str) -> bool:
        return self.default(name) is inspect.Parameter.empty

    def positional(self, name: str) -> bool:
        return self._all[name].kind is not inspect.Parameter.KEYWORD_ONLY

    def gathered(self, name: str) -> bool:
        """Whether a trainer makes it of models and responses, without further data."""
        unpaired, of_tokens = self.method.family == "unpaired", "token_logps" in self.method.needs
        match = _GATHERED.fullmatch(name)
        if match:
            source, responses, kind = match.groups()
            return not (kind == "lengths" and source) and not (of_tokens and kind == "logps" and responses)
        if name in _OF_TOKENS or name == "cu_seqlens":
            return of_tokens
        if name in _OF_GROUPS:
            return self.method.family in ("listwise", "unpaired") or (
                name == "cu_groups" and self.method.family == "sft"
            )
        return unpaired and (name == "desirable" or (name == "delta" and self.required(name)))

    @property
    def graded(self) -> bool:
        """Whether it ranks lists, whose labels do for rewards where the data have none."""
        return "groups" in self.method.needs

    def column(self, name: str) -> str | None:
        """The extra of a dataset that it may be, if any: no output of a model."""
        column = name.removeprefix("chosen_").removeprefix("rejected_")
        needs = self.method.needs
        data = (
            not self.required(name) or (not _DATA.isdisjoint(needs) and not self.positional(name)) or "classes" in needs
        )
        return column if column == "rewards" or (data and not name.endswith("logps")) else None

    def _is_tensor(self, name: str) -> bool:
        annotation = str(self._all[name].annotation).replace(" ", "").replace("torch.", "")
        return self.positional(name) or self.gathered(name) or annotation in ("Tensor", "Tensor|None")


def _feed(
    name: str,
    method: losses.Method,
    given: dict[str, Any],
    weight: float,
    beta: float | None,
    columns: Collection[str] | None,
    trainer: str,
) -> Feed:
    if method.family not in ("pairwise", "unpaired", "token", "listwise", "sft"):
        raise NotImplementedError(
            f"{trainer} trains on preference data; {name!r} is a method of the family {method.family!r}, "
            f"which prefcore.losses.{method.name} computes of what you give it"
        )
    parameters = _Parameters(method)
    asked = {key for key, value in given.items() if value is True and key in parameters.tensors}
    settings = {key: value for key, value in given.items() if key not in asked}
    if settings.get("length_normalize"):
        asked |= set(_LENGTHS)
    for one, other in (("chosen_", "rejected_"), ("rejected_", "chosen_")):
        asked |= {other + key.removeprefix(one) for key in asked if key.startswith(one)}
    inputs: list[str] = []
    lacking: list[str] = []
    impossible: list[str] = []
    for key in parameters.tensors:
        if key in settings or not (parameters.required(key) or key in asked):
            continue
        column = parameters.column(key)
        known = columns is None or column in columns or (parameters.graded and column == "rewards")
        if parameters.gathered(key) or (column and known):
            inputs.append(key)
        else:
            (lacking if column else impossible).append(key)
    if impossible:
        raise NotImplementedError(_cannot(name, method, impossible, trainer))
    if lacking:
        raise ValueError(_lacks(name, method, parameters, lacking, trainer))

    takes_beta = "beta" in parameters.coefficients
    if takes_beta and "beta" not in settings and (beta is not None or parameters.required("beta")):
        settings["beta"] = 0.1 if beta is None else beta
    scale = settings.get("beta", parameters.default("beta") if takes_beta else beta)
    if not takes_beta and "scores" in inputs:
        settings.pop("beta", None)  # theirs alone
    unset = [key for key in parameters.coefficients if parameters.required(key) and key not in settings]
    inputs += [key for key in unset if columns and key in columns]
    missing = [key for key in unset if key not in inputs]
    unknown = sorted(settings.keys() - set(parameters.coefficients) - set(parameters.tensors))
    if unknown or missing:
        problem = f"does not take {', '.join(unknown)}" if unknown else f"needs {', '.join(missing)}"
        raise TypeError(f"the loss {name!r} {problem}; its arguments are {', '.join(parameters.coefficients)}")
    return Feed(method, settings, weight, tuple(inputs), 0.1 if scale is None else scale)


def _needed(method: losses.Method) -> str:
    known = [_SOURCES[need] for need in sorted(method.needs) if need in _SOURCES]
    return f" ({'; '.join(known)})" if known else ""


def _cannot(name: str, method: losses.Method, missing: list[str], trainer: str) -> str:
    kind = "token_logps of single responses apart, as " if "token_logps" in method.needs else ""
    return (
        f"{trainer} has no {kind}{', '.join(missing)}, which the loss {name!r} needs{_needed(method)}; "
        f"call prefcore.losses.{method.name} with them, and prefcore.hf.response_logps for log-probs"
    )


def _lacks(name: str, method: losses.Method, parameters: _Parameters, missing: list[str], trainer: str) -> str:
    columns = dict.fromkeys(str(parameters.column(key)) for key in missing)
    given = f"dataset.with_extras({', '.join(f'{column}=...' for column in columns)})"
    if trainer == "PreferenceTrainer":
        where = f"the data hold none: give them by {given}"
    else:
        where = f"{trainer} has none; prefcore.hf.PreferenceTrainer takes them by {given}"
    return f"the loss {name!r} needs {', '.join(missing)}{_needed(method)}; {where}"


def _try(feed: Feed) -> None:
    """Call the loss on a pair, so that coefficients outside their domain are refused at once."""
    if feed.columns - {"rewards"}:
        return  # what they may hold is not known here
    responses = [[0, 0], [0], [0]] if feed.mismatched else [[0, 0], [0]]
    rewards = torch.tensor([1.0, 0.0, 0.0])[: len(responses)]
    _call(feed, responses, torch.full((sum(map(len, responses)),), -1.0), rewards=rewards)


def _compares(feed: Feed) -> bool:
    """Whether a listwise loss teaches nothing of a prompt's only response."""
    if feed.columns - {"rewards"}:
        return False  # what they may hold is not known here
    tokens = torch.full((2,), -1.0, requires_grad=True)
    one = torch.ones(1)
    value = _call(feed, [[0, 0]], tokens, labels=one, rewards=one)
    gradient = torch.autograd.grad(value.sum(), tokens)[0] if value.requires_grad else tokens.new_zeros(())
    return not gradient.any()


def _call(feed: Feed, responses: list[list[int]], tokens: Tensor, **extras: Tensor) -> Tensor:
    """The loss of responses to one prompt, by the log-probs ``[T]`` of their tokens under all models."""
    batch = replace(pack([[0]], [responses]), extras=extras)
    source, policy = Source(None, tokens.detach()), Policy(tokens, None, tokens, tokens)
    return Gathered(batch, policy, source, source, feed.mismatched).loss(feed, torch.zeros(()), None)


class Policy(NamedTuple):
    """Of each scored token ``[T]`` under the policy."""

    logps: Tensor
    aux_loss: Tensor | None = None  # of the batch, see prefcore.hf.scoring.Hidden
    kl_values: Tensor | None = None  # KL(reference || policy)
    log_sum_sq_probs: Tensor | None = None


class Source(NamedTuple):
    """What a policy is held against: log-probs of responses ``[S]`` or of their tokens ``[T]``, or both."""

    sums: Tensor | None
    tokens: Tensor | None

    def to(self, device: torch.device) -> Source:
        return Source(*(None if values is None else values.to(device) for values in self))


class Gathered:
    """What is known of a batch: each loss takes of it what its parameters name.

    Args:
        batch: G groups; in each the last response is one to another prompt if ``mismatched``. S counts the others.
    """

    def __init__(
        self, batch: PackedBatch, policy: Policy, reference: Source | None, previous: Source | None, mismatched: bool
    ) -> None:
        self.batch, self.policy = batch, policy
        self.mismatched = mismatched
        self.groups = batch.cu_groups.numel() - 1
        self.cu_groups = batch.cu_groups
        device = batch.cu_groups.device
        self._rows: Tensor | None = None  # [S], the sequences that are no mismatched ones; None: all
        self._others: Tensor | None = None  # [G]
        if mismatched:
            count = batch.cu_seqlens.numel() - 1 - self.groups
            before = torch.arange(self.groups + 1, device=device, dtype=torch.int32)
            self.cu_groups = batch.cu_groups - before
            self._others = batch.cu_groups[1:] - 1
            self._rows = torch.arange(count, device=device) + self._of_responses(before[:-1], count)
        self.responses = batch.cu_seqlens.numel() - 1 - (self.groups if mismatched else 0)
        self.paired = "labels" not in batch.extras
        self._lengths = batch.cu_seqlens.diff()
        self._sources = {"": Source(None, policy.logps), "ref_": reference, "prev_": previous}
        self._sums: dict[str, Tensor] = {}

    def loss(self, feed: Feed, delta: Tensor | None, process_group: Any) -> Tensor:
        """The unreduced loss; ``delta`` is the mean of all rewards so far."""
        settings = dict(feed.settings)
        given = {name: delta if feed.running_mean and name == "delta" else self.get(name, feed) for name in feed.inputs}
        if process_group is not None and feed.counts_over_ranks:
            settings["process_group"] = process_group
        return feed.method.function(**given, **settings)

    def get(self, name: str, feed: Feed) -> Tensor:
        """The tensor that a parameter of a loss names."""
        match = _GATHERED.fullmatch(name)
        if match:
            source, responses, kind = match[1] or "", match[2] or "", match[3]
            if kind == "logps" and feed.of_tokens:
                tokens = self._tokens(source)
                return self._of_tokens(tokens, feed)
            values = self._lengths if kind == "lengths" else self.sums(source)
            return self._of_sequences(values, feed, responses)
        if name in _OF_TOKENS:
            return self._of_tokens(getattr(self.policy, name), feed)
        if name == "cu_seqlens":
            lengths = self._of_sequences(self._lengths, feed)
            return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        if name == "cu_groups":
            return self.cu_groups
        if name == "scores":
            return feed.beta * (self.real(self.sums()) - self.real(self.sums("ref_")).detach())
        if name == "labels":
            return self.labels()
        if name == "desirable":
            return self.labels() > 0.5
        side = next((side for side in ("chosen_", "rejected_") if name.startswith(side)), "")
        if name == "rewards" and name not in self.batch.extras:
            return self.labels()  # of lists alone, see _Parameters.graded
        values = self.batch.extras[name.removeprefix(side)]
        if name.removeprefix(side) == "rewards":
            values = values.to(self.policy.logps.dtype)  # they may be whole numbers
        if len(values) == len(self._lengths):
            return self._of_sequences(values, feed, side)
        return self._of_tokens(values, feed) if len(values) == len(self.batch.targets) else values

    def sums(self, source: str = "") -> Tensor:
        """Log-probs of all sequences, under the policy, the reference (``"ref_"``) or the previous (``"prev_"``)."""
        if source not in self._sums:
            given = self._source(source)
            if given.sums is None:
                sums = prefcore.sequence_reduce(self._tokens(source), self.batch.cu_seqlens, "sum")
            else:
                sums = given.sums
            self._sums[source] = sums
        return self._sums[source]

    def real(self, values: Tensor) -> Tensor:
        """Of values of all sequences those ``[S]`` of responses to their own prompts."""
        return values if self._rows is None else values[self._rows]

    def labels(self) -> Tensor:
        """``[S]``; the chosen of a pair has 1, the rejected 0."""
        if not self.paired:
            return self.real(self.batch.extras["labels"]).to(self.policy.logps.dtype)
        return (torch.arange(self.responses, device=self.cu_groups.device) % 2 == 0).to(self.policy.logps.dtype)

    def extremes(self) -> tuple[Tensor, Tensor]:
        """Of each group the numbers among the S of the response with the highest and with the lowest label."""
        if self.paired:
            first = torch.arange(self.groups, device=self.cu_groups.device) * 2
            return first, first + 1
        labels = self.labels()
        return self._highest(labels), self._highest(-labels)

    def by_group(self, values: Tensor) -> Tensor:
        """Sums ``[G]`` of values of responses ``[S]``."""
        return values.new_zeros(self.groups).index_add(0, self._groups(), values)

    def _highest(self, values: Tensor) -> Tensor:
        return place_of_first_greatest(values, self._groups(), self.groups)

    def _groups(self) -> Tensor:
        return self._of_responses(torch.arange(self.groups, device=self.cu_groups.device), self.responses)

    def _of_responses(self, values: Tensor, count: int) -> Tensor:
        # The size is given, else a GPU would be waited for.
        return values.repeat_interleave(self.cu_groups.diff(), output_size=count)

    def _source(self, source: str) -> Source:
        given = self._sources[source]
        if given is None:
            raise RuntimeError(f"{source}logps were not gathered")
        return given

    def _tokens(self, source: str) -> Tensor:
        tokens = self._source(source).tokens
        if tokens is None:
            raise RuntimeError(f"{source}logps were gathered of responses, not of tokens")
        return tokens

    def _chosen_rows(self, feed: Feed) -> Tensor | None:
        """The sequences that a loss is of; None: all."""
        if feed.method.family != "sft" or "cu_groups" in feed.inputs:
            return self._rows
        own = self.extremes()[int(feed.unlearns)]
        return own if self._rows is None else self._rows[own]

    def _of_sequences(self, values: Tensor, feed: Feed, responses: str = "") -> Tensor:
        if responses == "kl_":
            return values[self._others]
        if responses:
            return self.real(values).view(-1, 2)[:, 0 if responses == "chosen_" else 1]
        rows = self._chosen_rows(feed)
        return values if rows is None else values[rows]

    def _of_tokens(self, values: Tensor, feed: Feed) -> Tensor:
        rows = self._chosen_rows(feed)
        if rows is None:
            return values
        wanted = torch.zeros_like(self._lengths, dtype=torch.bool)
        wanted[rows] = True
        return values[wanted.repeat_interleave(self._lengths, output_size=len(values))]  # waits for a GPU
