"""A model as a chain of blocks, each a linear layer and the modules that follow it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cupybnn.autograd import Tensor
from cupybnn.nn.containers import Sequential
from cupybnn.nn.layers import Linear
from cupybnn.nn.module import Module

__all__ = ["Block", "Chain", "stages"]


@dataclass(frozen=True)
class Block:
    """A linear layer and the modules between it and the next one.

    Attributes
    ----------
    name : str
        Name of the linear layer in the model, such as "fc1".
    linear : Linear
        Possibly a `BinaryLinear`.
    rest : tuple of Module
        The modules that follow, in order: batch norm, sign, dropout, ...

    Examples
    --------
    >>> from cupybnn import nn
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm(3), nn.Sign(), nn.Linear(3, 2))
    >>> block = nn.Chain.of(model).blocks[0]
    >>> block.name, [type(module).__name__ for module in block.rest]
    ('0', ['BatchNorm', 'Sign'])
    """

    name: str
    linear: Linear
    rest: tuple[Module, ...]


@dataclass(frozen=True)
class Chain:
    """The modules of a model, from its input to its logits.

    Attributes
    ----------
    inputs : tuple of Module
        The modules before the first linear layer.
    blocks : tuple of Block
        At least one. The last one is the head, which computes the logits.

    Examples
    --------
    >>> from cupybnn import nn
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm(3), nn.Sign(), nn.Linear(3, 2))
    >>> [block.name for block in nn.Chain.of(model).blocks]
    ['0', '3']
    """

    inputs: tuple[Module, ...]
    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, model: Module) -> Chain:
        """Split a model into blocks.

        Parameters
        ----------
        model : Sequential
            May be nested.

        Raises
        ------
        ValueError
            If `model` is not a `Sequential` or holds no linear layer.

        Examples
        --------
        >>> from cupybnn import nn
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm(3), nn.Sign(), nn.Linear(3, 2))
        >>> [(block.name, len(block.rest)) for block in nn.Chain.of(model).blocks]
        [('0', 2), ('3', 0)]
        """
        inputs: list[Module] = []
        blocks: list[tuple[str, Linear, list[Module]]] = []
        for name, module in _leaves(model):
            if isinstance(module, Linear):
                blocks.append((name, module, []))
            elif blocks:
                blocks[-1][2].append(module)
            else:
                inputs.append(module)
        if not blocks:
            raise ValueError(
                f"A chain must hold at least one linear layer; got a {type(model).__name__} "
                f"with none."
            )
        return cls(tuple(inputs), tuple(Block(n, m, tuple(rest)) for n, m, rest in blocks))


def _is_sequential(module: Module) -> bool:
    """Whether a module computes what `Sequential` does; a subclass may override it."""
    return isinstance(module, Sequential) and type(module).forward is Sequential.forward


def _leaves(model: Module, prefix: str = "") -> Iterator[tuple[str, Module]]:
    """Yield (name, module) for the modules that a `Sequential` applies, nested ones flattened."""
    if not _is_sequential(model):
        raise ValueError(
            f"A chain must be an nn.Sequential of layers; got a {type(model).__name__}, whose "
            f"forward pass may do anything."
        )
    for name, module in vars(model).items():
        if isinstance(module, Sequential):
            yield from _leaves(module, f"{prefix}{name}.")
        elif isinstance(module, Module):
            yield f"{prefix}{name}", module


def stages(model: Module, x: Tensor) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) for the intermediate results of a chain, up to its logits.

    "fc1/product", "fc1/activation" (the input of the next layer), ..., "fcout/product" and
    "logits", named after the linear layers. A model that is not a chain yields only "logits".

    Parameters
    ----------
    model : Module
    x : Tensor
        The model's input.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import nn
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm(3), nn.Sign(), nn.Linear(3, 2))
    >>> from cupybnn.autograd import Tensor
    >>> x = Tensor(np.ones((2, 4), np.float32))
    >>> [(name, value.shape) for name, value in nn.stages(model, x)]
    [('0/product', (2, 3)), ('0/activation', (2, 3)), ('3/product', (2, 2)), ('logits', (2, 2))]
    """
    if not _is_sequential(model):
        yield "logits", model(x)
        return
    layer = ""
    for name, module in _leaves(model):
        linear = isinstance(module, Linear)
        if linear and layer:
            yield f"{layer}/activation", x
        x = module(x)
        if linear:
            layer = name
            yield f"{name}/product", x
    yield "logits", x
