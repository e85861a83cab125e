"""A device that is not there: its tensors have shape, dtype and place, and only single numbers a value.

What is computed on the CPU is computed; what is computed on the pretended device is only checked: operands
on different devices are an error, and whoever reads a value back is noted, because a GPU would have to be
waited for. Only random generators are taken at their word.
"""

import contextlib

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class Generator(torch.Generator):
    """A generator of any device, on the CPU."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls)


def _stay(one, other):
    """In place of swapping a parameter with itself."""
    assert one.device == other.device


def _backward(tensor):
    """In place of autograd, which needs the driver: a gradient for every leaf that the graph reaches."""
    nodes, seen = [tensor.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        if hasattr(node, "variable"):
            node.variable.grad = torch.empty_like(node.variable)


@contextlib.contextmanager
def pretended_device(kind, monkeypatch):
    """Pretend a device, given out as a PretendedDevice."""
    # Autograd counts the devices when it is first used: a thread for this one would not survive a fork.
    torch.ones((), requires_grad=True).backward()
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch.Tensor, "backward", _backward)
    monkeypatch.setattr(torch.utils, "swap_tensors", _stay)  # of module.to(device)
    device = PretendedDevice(torch.device(kind))
    with FakeTensorMode(allow_non_fake_inputs=True), device:
        yield device


class PretendedDevice(TorchDispatchMode):
    """The mode in which the device is pretended.

    Attributes:
        reads: the operations that waited for the device, since `reads` was last emptied.
        dtypes: of every tensor that was on the device.
    """

    def __init__(self, device):
        super().__init__()
        self.device, self.reads, self.dtypes = device, [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and func.namespace == "aten":
            with self:  # composite operations arrive whole
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        there = [one for one in tree_leaves((args, kwargs)) if isinstance(one, FakeTensor)]
        target = kwargs.get("device")
        wanted = target is not None and torch.device(target).type == self.device.type
        if not there and not wanted:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if there and self._reads(func, args, target):
            self.reads.append(str(func))
            return self._made_up(func, args, kwargs)
        if func is aten._to_copy.default and not there:  # to the device
            made = torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=self.device)
            with unset_fake_temporarily():
                made.value = args[0].item() if args[0].ndim == 0 else None
            self.dtypes.add(made.dtype)
            return made
        found = func(*args, **kwargs)
        self.dtypes |= {one.dtype for one in tree_leaves(found) if isinstance(one, FakeTensor)}
        return found

    @staticmethod
    def _reads(func, args, target):
        """Whether the values of the device's tensors are needed on the CPU."""
        if func is aten.copy_.default:
            return not isinstance(args[0], FakeTensor)
        leaving = target is not None and torch.device(target).type == "cpu"
        waiting = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default)
        return leaving or func in waiting

    @staticmethod
    def _made_up(func, args, kwargs):
        """Values for those who read them."""
        if func is aten._local_scalar_dense.default:
            known = getattr(args[0], "value", None)
            return {torch.bool: True, torch.int64: 1}.get(args[0].dtype, 1.0) if known is None else known
        with unset_fake_temporarily():
            if func is aten.copy_.default:
                return args[0].zero_()
            return torch.full(args[0].shape, 0.5).to(kwargs.get("dtype") or args[0].dtype)
