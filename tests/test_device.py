"""Tests of engine/device.py: devices and precisions by name, and torch.compile against the eager network."""

import copy
import os
import shutil

import pytest
import torch

from engine.device import autocast_dtype, default_workers, is_out_of_memory, select_device
from engine.processes import started_processes
from util import ResidualBlock

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("name", ["gpu", "", "tpu:0", "cpu:x", "cpu:1", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_an_error_and_no_fallback(name):
    with pytest.raises(ValueError, match=repr(name)):
        select_device(name)


@pytest.mark.parametrize("given", ["4", "two", "0"])
def test_a_world_size_without_torchrun_is_refused(given, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", given)
    with pytest.raises(ValueError, match=given), started_processes("cpu"):
        pass


def test_precisions_by_name():
    names = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    assert {name: autocast_dtype(CPU, name) for name in names} == names
    for device, wrong in (("cpu", "fp8"), ("meta", "bf16")):
        with pytest.raises(ValueError, match=wrong):
            autocast_dtype(torch.device(device), wrong)


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
    assert autocast_dtype(CPU, "auto") == expected


@pytest.mark.parametrize(
    ("device", "may_use", "on_this_node", "expected"),
    [(CPU, 64, "1", 0), (CUDA, 1, "1", 1), (CUDA, 6, "2", 3), (CUDA, 64, "1", 8), (CUDA, 4, "9", 1)],
)
def test_a_gpu_has_workers_by_the_cores_that_the_job_may_use(
    device, may_use, on_this_node, expected, monkeypatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(may_use)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", on_this_node)
    assert default_workers(device, 16) == expected


@pytest.mark.slow
def test_a_compiled_block_has_the_gradients_of_the_eager_one():
    """torch.compile once gave silently wrong gradients on CPUs, at an identical loss."""
    torch.manual_seed(0)
    eager = ResidualBlock(8, 8, 16, norm="pixel")
    # It starts at zero, and nothing before it would have a gradient.
    torch.nn.init.normal_(eager.conv2.weight)
    compiled = copy.deepcopy(eager)
    if shutil.which("c++") is None:
        pytest.skip("this machine has no compiler that torch.compile can use")
    compiled.compile(dynamic=False)
    features, embedding = torch.randn(2, 8, 8, 8), torch.randn(2, 16)
    outputs = [block(features, embedding) for block in (eager, compiled)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    for output in outputs:
        output.square().mean().backward()
    for (name, one), other in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        assert (one.grad - other.grad).norm() < 1e-4 * one.grad.norm(), f"gradient of {name}"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 17 GB, max allowed: 18 GB)"), True),
        (ValueError("out of memory"), False),
    ],
)
def test_memory_that_ran_out_is_known_on_every_device(error, expected):
    assert is_out_of_memory(error) == expected
