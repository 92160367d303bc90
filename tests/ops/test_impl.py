"""The choice of an implementation."""

from __future__ import annotations

import warnings

import pytest
import torch

import prefcore
from prefcore import _impl, reference


@pytest.fixture
def nothing_built(monkeypatch):
    monkeypatch.setitem(_impl._MISSING, "cpu", "the extension is not built: run `pip install .`")
    _impl._warn_once.cache_clear()


LOGITS, TARGETS = torch.randn(3, 9), torch.tensor([1, 2, 8])


def test_auto_raises_where_its_implementation_is_missing(nothing_built):
    with pytest.raises(NotImplementedError, match=r"pip install .*PREFCORE_FALLBACK=1"):
        prefcore.logprobs(LOGITS, TARGETS)


def test_a_named_implementation_that_is_missing_is_refused_even_with_a_fallback(nothing_built, monkeypatch):
    monkeypatch.setenv("PREFCORE_FALLBACK", "1")
    with pytest.raises(NotImplementedError, match="pip install"):
        prefcore.logprobs(LOGITS, TARGETS, impl="cpu")


def test_a_permitted_fallback_warns_once(nothing_built, monkeypatch):
    monkeypatch.setenv("PREFCORE_FALLBACK", "1")
    with pytest.warns(RuntimeWarning, match="running the reference"):
        first = prefcore.logprobs(LOGITS, TARGETS)
    assert torch.equal(first.logps, reference.logprobs(LOGITS, TARGETS).logps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prefcore.logprobs(LOGITS, TARGETS)


def test_a_device_that_nothing_serves():
    with pytest.raises(NotImplementedError, match="no implementation serves meta tensors"):
        prefcore.logprobs(LOGITS.to("meta"), TARGETS.to("meta"))


@pytest.mark.parametrize("impl", ["torch", 5, None])
def test_an_unknown_name(impl):
    with pytest.raises(ValueError if isinstance(impl, str) else TypeError, match="impl"):
        prefcore.logprobs(LOGITS, TARGETS, impl=impl)
