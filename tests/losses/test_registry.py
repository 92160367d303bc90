import inspect

import pytest

import prefcore.losses as losses
from prefcore.losses import _registry


def test_names_and_aliases_lead_to_the_functions():
    assert {"cdpo", "dpo", "ipo"} == {name for name in losses.names() if losses.get(name).family == "pairwise"}
    assert {"grpo", "ppo", "rloo"} < set(losses.names())
    for name in losses.names():
        assert losses.get(name).function is getattr(losses, name)
        assert losses.get(name).name == name
    assert losses.get("sigmoid") is losses.get("dpo")


@pytest.mark.parametrize("name", ["cdpo", "dpo", "ipo"])
def test_entries_tell_what_a_trainer_must_know(name):
    method = losses.get(name)
    assert method.family == "pairwise"
    assert method.separable
    assert method.needs == {"reference"}
    assert method.paper in inspect.getdoc(method.function)
    assert "ref_chosen_logps" in inspect.signature(method.function).parameters


@pytest.mark.parametrize("name", [name for name in losses.names() if losses.get(name).family == "policy"])
def test_policy_entries_tell_what_to_hand_over_and_how_to_aggregate(name):
    method = losses.get(name)
    parameters = inspect.signature(method.function).parameters
    assert ("old" in method.needs) == ("old_logps" in parameters)
    assert ("advantages" in method.needs) == ("advantages" in parameters)
    assert method.separable == (name not in ("ppo_max", "clip_cov", "kl_cov"))
    if method.aggregation is None:
        assert "[S]" in inspect.getdoc(method.function) or name == "luspo"


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"loss must be one of \(.*'cdpo'.*'dpo', .*\).* got 'dpoo'"):
        losses.get("dpoo")
    with pytest.raises(TypeError, match="loss must be a str, got int"):
        losses.get(5)


def test_a_taken_name_or_an_unknown_need_is_refused_and_leaves_no_trace(monkeypatch):
    monkeypatch.setattr(_registry, "_METHODS", dict(_registry._METHODS))

    def fresh():
        pass

    with pytest.raises(ValueError, match="the name 'sigmoid' is taken by 'dpo'"):
        losses._registry.register(family="pairwise", paper="", aliases=("sigmoid",))(fresh)
    with pytest.raises(ValueError, match=r"needs must be among .* got \['luck'\]"):
        losses._registry.register(family="pairwise", paper="", needs=("luck",))(fresh)
    assert "fresh" not in losses.names()
