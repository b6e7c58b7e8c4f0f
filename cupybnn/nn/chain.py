"""A model as a chain of blocks: each a linear layer and what follows it, whatever their names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cupybnn.autograd import Tensor
from cupybnn.nn.layers import Linear, Sequential
from cupybnn.nn.module import Module

__all__ = ["Block", "Chain", "stages"]


@dataclass(frozen=True)
class Block:
    """A linear layer and the modules between it and the next one.

    Attributes
    ----------
    name : str
        Of the linear layer within the model, such as "fc1".
    linear : Linear
        A `BinaryLinear` is one, too.
    rest : tuple of Module
        What follows, in order: batch norm, sign, dropout, ...
    """

    name: str
    linear: Linear
    rest: tuple[Module, ...]


@dataclass(frozen=True)
class Chain:
    """What a model computes, from its input to its logits.

    Attributes
    ----------
    inputs : tuple of Module
        What stands before the first linear layer.
    blocks : tuple of Block
        At least one. The last is the head: its results are the logits.
    """

    inputs: tuple[Module, ...]
    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, model: Module) -> Chain:
        """Read a model.

        Parameters
        ----------
        model : Sequential
            May hold further ones.

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
                f"without any."
            )
        return cls(tuple(inputs), tuple(Block(n, m, tuple(rest)) for n, m, rest in blocks))


def _is_sequential(module: Module) -> bool:
    """Whether a module does what `Sequential` does; a subclass may do something else."""
    return isinstance(module, Sequential) and type(module).forward is Sequential.forward


def _leaves(model: Module, prefix: str = "") -> Iterator[tuple[str, Module]]:
    """Yield (name, module) of what a `Sequential` applies, in order, those within it included."""
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
    """Yield (name, value) of what arises between the input of a chain and its logits.

    "fc1/product", "fc1/activation" (what the next layer gets), ..., "fcout/product" and "logits",
    by the names of the linear layers. Of a model that is not a chain, only "logits".

    Parameters
    ----------
    model : Module
    x : Tensor
        The model's input.
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
