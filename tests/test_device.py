"""Tests of device.py: names, and a probe that survives what would kill the process."""

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine import device
from engine.device import autocast_dtype, compile_network, cpu_bfloat16_works, select_device
from tests.networks import tiny_unet
from unet import Condition


def test_auto_takes_something_that_computes():
    assert torch.ones(2, device=select_device("auto")).sum() == 2


def test_the_cpu_is_always_there():
    assert select_device("cpu").type == "cpu"


@pytest.mark.parametrize("name", ["gpu", "", "tpu:0"])
def test_an_unknown_device_is_named(name):
    with pytest.raises(ValueError, match=f"not '{name}'"):
        select_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_missing_device_is_an_error_not_a_fallback():
    with pytest.raises(ValueError, match="not available"):
        select_device("cuda")


def test_precisions():
    cpu = torch.device("cpu")
    assert autocast_dtype(cpu, "fp32") is None
    assert autocast_dtype(cpu, "auto") is None
    with pytest.raises(ValueError, match="fp16"):
        autocast_dtype(cpu, "fp16")


@pytest.mark.skipif(not cpu_bfloat16_works(), reason="this CPU has no bfloat16 arithmetic")
def test_bfloat16_is_used_when_asked_for():
    assert autocast_dtype(torch.device("cpu"), "bf16") == torch.bfloat16


def test_insisting_on_bfloat16_without_hardware_is_an_error(monkeypatch):
    monkeypatch.setattr(device, "cpu_bfloat16_works", lambda: False)
    with pytest.raises(ValueError, match="bf16 is not available"):
        autocast_dtype(torch.device("cpu"), "bf16")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_probe_that_dies_is_survived(monkeypatch):
    monkeypatch.setattr(device, "_probe_and_exit", lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert not device._survives_bfloat16()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_probe_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(device, "PROBE_SECONDS", 0.1)
    monkeypatch.setattr(device, "_probe_and_exit", signal.pause)
    assert not device._survives_bfloat16()


def test_tiles_that_fail_are_switched_off_and_tried_again(monkeypatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(device.torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(
        device, "_survives_bfloat16", lambda: os.environ.get("ONEDNN_MAX_CPU_ISA") == "AVX512_CORE_BF16"
    )
    assert cpu_bfloat16_works.__wrapped__()
    monkeypatch.setattr(device, "_survives_bfloat16", lambda: False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    assert not cpu_bfloat16_works.__wrapped__()
    assert "ONEDNN_MAX_CPU_ISA" not in os.environ


def test_a_compiled_network_has_the_gradients_of_the_eager_one():
    """torch.compile once gave silently wrong gradients on CPUs, at an identical loss."""
    eager = tiny_unet(conditioning="both", context_blocks=1)
    compiled = copy.deepcopy(eager)
    if not compile_network(compiled, torch.device("cpu")):
        pytest.skip("this machine has no compiler that torch.compile can use")
    generator = torch.Generator().manual_seed(0)
    noisy, upscaled = torch.randn(2, 2, 3, 16, 16, generator=generator)
    condition = Condition(upscaled, upscaled[..., ::2, ::2])
    for network in (eager, compiled):
        network(noisy, torch.tensor([3, 900]), condition).square().mean().backward()
    assert compiled._compiled_call_impl is not None
    for (name, one), other in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        difference = (one.grad - other.grad).norm() / one.grad.norm()
        assert difference < 1e-4, f"gradient of {name}"


def test_a_missing_compiler_is_said_and_not_fatal():
    program = (
        "import logging, torch; from device import compile_network; logging.basicConfig()\n"
        "network = torch.nn.Linear(2, 2)\n"
        "print(compile_network(network, torch.device('cpu')), network(torch.ones(1, 2)).shape)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "False torch.Size([1, 2])"
    assert "going on without it" in result.stderr
