"""``prefcore doctor``."""

import argparse
import importlib.metadata
import json

import pytest
import torch

from prefcore import _impl, _native
from prefcore.cli import doctor
from prefcore.hf import _backends

pytestmark = pytest.mark.quick


def report(capsys, *options):
    parser = argparse.ArgumentParser()
    doctor.add_parser(parser.add_subparsers())
    args = parser.parse_args(["doctor", *options])
    assert args.run(args) == 0
    return capsys.readouterr().out


def test_the_json_names_versions_devices_and_every_op(capsys):
    data = json.loads(report(capsys, "--json"))
    assert data["versions"]["torch"] == importlib.metadata.version("torch")
    assert data["devices"]["cpu"]["threads"] == torch.get_num_threads()
    assert len(data["devices"]["cuda"]) == torch.cuda.device_count()
    assert set(data["ops"]) == set(_impl.IMPLEMENTATIONS)


def test_an_op_is_available_where_auto_takes_it(capsys):
    for op, entry in json.loads(report(capsys, "--json"))["ops"].items():
        assert entry["implementations"]["reference"] is None
        assert entry["auto"]["cpu"] == "cpu"
        assert entry["implementations"]["cpu"] is None, op


def test_the_text_names_the_instruction_sets_that_can_be_asked_for(capsys):
    names = _native.require().cpu_isa_names()
    assert f"row kernels   {', '.join(names)}" in report(capsys)


def test_the_text_names_every_op_and_implementation(capsys):
    text = report(capsys)
    for op, offered in _impl.IMPLEMENTATIONS.items():
        assert f"{op}: auto takes cpu on cpu" in text
        assert all(impl in text for impl in offered.values())


def test_a_missing_extension_is_named_with_the_way_to_get_it(capsys, monkeypatch):
    monkeypatch.setattr(_native, "load", lambda: None)
    monkeypatch.setitem(_impl._MISSING, "cpu", "it is not built: build it")
    text = report(capsys)
    assert "prefcore._C   not built" in text
    assert "not here: it is not built: build it" in text
    assert "auto takes nothing on cpu" in text


def test_every_attention_backend_is_listed_with_why_it_cannot_run(capsys):
    entry = json.loads(report(capsys, "--json"))["attention"]
    assert list(entry["backends"]) == list(_backends.BACKENDS)
    assert entry["backends"]["sdpa"] is None
    assert entry["backends"][entry["auto"]] is None
    text = report(capsys)
    assert f"auto takes {entry['auto']} on {entry['device']}" in text
    for name, lack in entry["backends"].items():
        assert f"    {name:12}{'available' if lack is None else f'not here: {lack}'}" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs these backends")
def test_without_a_gpu_the_attention_backends_say_so(capsys):
    lacks = json.loads(report(capsys, "--json"))["attention"]["backends"]
    assert "GPU" in lacks["varlen"] or "varlen_attn" in lacks["varlen"]
    assert lacks["flex"] == "it has no backward on a CPU"


def test_an_extra_names_what_is_absent_or_too_old(monkeypatch):
    have = {"transformers": "4.57.6", "accelerate": "1.10.0"}
    monkeypatch.setattr(doctor, "_version", have.get)
    bounds = ["transformers>=5.0", "accelerate>=1.10", "matplotlib>=3.9"]
    required = ["torch>=2.11", *(f'{bound}; extra == "hf"' for bound in bounds), 'trl>=1.16; extra == "trl"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: required)
    assert doctor._extra("hf") == {
        "present": False,
        "get": "pip install 'transformers>=5.0' 'matplotlib>=3.9'",
    }


def test_a_present_extra_asks_for_nothing(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: "5.0.0+local")
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["transformers>=5.0; extra == 'hf'"])
    assert doctor._extra("hf") == {"present": True, "get": None}
