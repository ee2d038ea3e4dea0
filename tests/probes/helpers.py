"""Everything about a model and the process that a probe must leave as it was, as one value to compare."""

import random
from collections import deque

import numpy as np
import torch


def bits(tensor):
    """The identity and the bytes of a tensor."""
    if tensor is None:
        return None
    return id(tensor), tensor.requires_grad, tensor.dtype, tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


def attribute(value):
    """An attribute of a module: what it is, and for a container what is in it."""
    if isinstance(value, torch.Tensor):
        return bits(value)
    if isinstance(value, dict):
        return id(value), [(key, id(item), attribute(item)) for key, item in value.items()]
    if isinstance(value, list | tuple | deque):
        return id(value), [(id(item), attribute(item)) for item in value]
    return repr(value)


def trace(model):
    """Weights, gradients, buffers, modes, attributes, hooks and random states."""
    modules = [{name: attribute(value) for name, value in vars(module).items()} for module in model.modules()]
    parameters = {
        name: (bits(p), bits(p.grad), attribute(p._backward_hooks), attribute(p._post_accumulate_grad_hooks))
        for name, p in model.named_parameters(remove_duplicate=False)
    }
    buffers = {name: bits(b) for name, b in model.named_buffers(remove_duplicate=False)}
    state = np.random.get_state()
    generators = torch.get_rng_state().numpy().tobytes(), state[1].tobytes(), state[2:], random.getstate()
    return modules, parameters, buffers, generators, torch.get_default_dtype(), torch.is_grad_enabled()


class Once(torch.autograd.Function):
    """A square whose backward cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g
