"""Tests of engine/device.py: devices and precisions by name, and torch.compile against the eager network."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.device import (
    autocast_dtype,
    compile_network,
    default_workers,
    is_out_of_memory,
    select_device,
)
from network import Condition
from tests.networks import tiny_unet
from util import ResidualBlock


def test_auto_takes_something_that_computes():
    assert torch.ones(2, device=select_device("auto")).sum() == 2


def test_the_cpu_is_always_there():
    assert select_device("cpu").type == "cpu"


@pytest.mark.parametrize("name", ["gpu", "", "tpu:0", "cpu:x", "cpu:1", "meta"])
def test_an_unknown_device_is_named(name):
    with pytest.raises(ValueError, match=repr(name)):
        select_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_missing_device_is_an_error_not_a_fallback():
    with pytest.raises(ValueError, match="cuda"):
        select_device("cuda")


def test_precisions():
    cpu = torch.device("cpu")
    assert autocast_dtype(cpu, "fp32") is None
    assert autocast_dtype(cpu, "bf16") == torch.bfloat16
    assert autocast_dtype(cpu, "fp16") == torch.float16
    with pytest.raises(ValueError, match="fp8"):
        autocast_dtype(cpu, "fp8")


@pytest.mark.parametrize(
    ("has", "used", "expected"),
    [
        ({}, "DEFAULT", None),
        ({"avx512_f": True, "avx512_bf16": False, "amx_tile": False}, "AVX512", None),
        ({"avx512_bf16": True, "amx_tile": False}, "AVX512", torch.bfloat16),
        ({"avx512_bf16": True, "amx_tile": False}, "AVX2", None),  # held to older instructions by a variable
        ({"avx512_bf16": True, "amx_tile": True}, "AVX512", None),  # maybe announced only
    ],
)
def test_auto_on_a_cpu_is_bfloat16_where_it_is_fast_and_safe(monkeypatch, has, used, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: used)
    assert autocast_dtype(torch.device("cpu"), "auto") == expected


def test_a_cpu_reads_its_images_itself_and_a_gpu_has_workers_for_it():
    assert default_workers(cpu := torch.device("cpu"), 1) == default_workers(cpu, 8) == 0
    assert 1 <= default_workers(torch.device("cuda"), 1) <= 8
    assert default_workers(torch.device("cuda"), 10_000) == 1


@pytest.mark.parametrize(("may_use", "on_this_node", "expected"), [(1, "1", 1), (6, "2", 3), (64, "1", 8)])
def test_workers_are_as_many_as_the_job_may_use(may_use, on_this_node, expected, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(may_use)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", on_this_node)
    assert default_workers(torch.device("cuda"), 16) == expected


def test_bf16_is_refused_where_it_cannot_be_had():
    with pytest.raises(ValueError, match="meta"):
        autocast_dtype(torch.device("meta"), "bf16")


def assert_equal_gradients(eager, compiled, call):
    outputs = [call(network) for network in (eager, compiled)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    for output in outputs:
        output.square().mean().backward()
    for (name, one), (_, other) in zip(eager.named_parameters(), compiled.named_parameters(), strict=True):
        difference = (one.grad - other.grad).norm() / one.grad.norm()
        assert difference < 1e-4, f"gradient of {name}"


@pytest.mark.slow
def test_the_traced_network_has_the_gradients_of_the_eager_one():
    """What torch.compile makes of the graph, forward and backward, before it writes C++ for it."""
    eager = tiny_unet(conditioning="both", dim_mults=(1,), blocks_per_level=1)
    traced = copy.deepcopy(eager)
    traced.compile(backend="aot_eager", dynamic=False)
    generator = torch.Generator().manual_seed(0)
    noisy, upscaled = torch.randn(2, 2, 3, 16, 16, generator=generator)
    condition = Condition(upscaled, upscaled[..., ::2, ::2])
    t = torch.tensor([3, 900])
    assert_equal_gradients(
        eager, traced, lambda network: network(noisy, t, network.encode_context(condition)[0])
    )


@pytest.mark.slow
def test_a_compiled_block_has_the_gradients_of_the_eager_one():
    """torch.compile once gave silently wrong gradients on CPUs, at an identical loss."""
    torch.manual_seed(0)
    eager = ResidualBlock(8, 8, 16, norm="pixel")
    torch.nn.init.normal_(
        eager.conv2.weight
    )  # it starts at zero, and nothing before it would have a gradient
    compiled = copy.deepcopy(eager)
    if not compile_network(compiled, torch.device("cpu")):
        pytest.skip("this machine has no compiler that torch.compile can use")
    features, embedding = torch.randn(2, 8, 8, 8), torch.randn(2, 16)
    assert_equal_gradients(eager, compiled, lambda block: block(features, embedding))


@pytest.mark.slow
def test_a_missing_compiler_is_said_and_not_fatal():
    program = (
        "import logging, torch; from engine.device import compile_network; logging.basicConfig()\n"
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


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 17 GB, max allowed: 18 GB)"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_memory_that_ran_out_is_known_on_every_device(error, expected):
    assert is_out_of_memory(error) == expected
