"""Lists and dicts of modules."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from cupybnn import nn, ops, optim
from cupybnn.autograd import Tensor


def linear(seed=0):
    return nn.Linear(2, 2, rng=seed)


def names(module):
    return [name for name, _ in module.named_modules()][1:]


class Tower(nn.Module):
    def __init__(self, layers=3):
        self.layers = nn.ModuleList(linear(seed) for seed in range(layers))
        self.heads = nn.ModuleDict({"a": linear(7), "b": linear(8)})

    def forward(self, x, head):
        for layer in self.layers:
            x = ops.relu(layer(x) + x)
        return self.heads[head](x)


def test_layers_of_a_list_and_a_dict_learn():
    net = Tower()
    assert [name for name, _ in net.named_parameters()] == [
        *("layers.0.weight", "layers.1.weight", "layers.2.weight"),
        *("heads.a.weight", "heads.b.weight"),
    ]
    before = net.state_dict()
    optimizer = optim.SGD(net.parameters(), 0.1)
    net(Tensor(np.ones((3, 2), "float32")), "b").sum().backward()
    optimizer.step()
    changed = {name: (a != before[name]).any() for name, a in net.state_dict().items()}
    assert changed == {name: name != "heads.a.weight" for name in before}
    net.eval()
    assert not net.layers[1].training


@pytest.mark.parametrize("kind", [nn.ModuleList, lambda modules: nn.Sequential(*modules)])
def test_behaves_as_a_list(kind):
    a, b, c, d = (linear(seed) for seed in range(4))
    both = kind([a, b]), [a, b]
    for change in (
        lambda m: m.append(c),
        lambda m: m.insert(0, d),
        lambda m: m.insert(-1, a),
        lambda m: m.extend([b, c]),
        lambda m: m.__setitem__(1, d),
        lambda m: m.__setitem__(-1, a),
        lambda m: m.__setitem__(slice(1, 3), [c, b, a]),
        lambda m: m.__delitem__(0),
        lambda m: m.__delitem__(slice(None, None, 2)),
        lambda m: m.reverse(),
        lambda m: m.pop(),
        lambda m: m.__iadd__([c, d]),
        lambda m: m.remove(c),
        lambda m: m.clear(),
        lambda m: m.append(a),
    ):
        for m in both:
            change(m)
        ours, expected = both
        assert list(ours) == expected
        assert len(ours) == len(expected)
        assert [ours[i] for i in range(-len(expected), len(expected))] == 2 * expected
        assert list(ours[1:]) == expected[1:]
        assert list(reversed(ours)) == expected[::-1]
        assert all(m in ours for m in expected)
        assert list(vars(ours)) == [str(i) for i in range(len(expected))]


def test_mistakes_with_indices():
    net = nn.Sequential(linear())
    for index in (1, -2):
        with pytest.raises(IndexError, match=rf"Sequential must be from -1 to 0; got {index}"):
            net[index]
    with pytest.raises(IndexError, match="ModuleList is empty; got the index 0"):
        nn.ModuleList()[0]
    with pytest.raises(TypeError, match="must be an integer or a slice; got 'fc'"):
        net["fc"]


def test_sequential_keeps_names():
    net = nn.Sequential(linear(), fc=linear(), act=nn.ReLU())
    net.append(linear())
    net.append(nn.ReLU(), "last")
    assert names(net) == ["0", "fc", "act", "3", "last"]
    net.insert(0, nn.Sign())
    assert names(net) == ["0", "1", "fc", "act", "4", "last"]
    part = net[1:5]
    assert type(part) is nn.Sequential
    assert names(part) == ["0", "fc", "act", "3"]
    assert part.fc is net.fc
    net[2] = nn.ReLU()
    assert isinstance(net.fc, nn.ReLU)


def test_a_slice_is_in_the_mode_of_the_whole():
    net = nn.Sequential(nn.Dropout(0.5, rng=0), nn.ReLU()).eval()
    assert not net[:1].training
    x = Tensor(np.ones((2, 2)))
    assert net[:1](x) is x


@pytest.mark.parametrize("name", ["forward", "update", "training", "parameters", "", "a.b"])
def test_names_that_cannot_be_had(name):
    message = "must not be empty, contain a dot or be the name of an attribute"
    with pytest.raises(ValueError, match=message):
        nn.ModuleDict({name: nn.ReLU()})
    if name != "update":  # a method of ModuleDict alone
        with pytest.raises(ValueError, match=message):
            nn.Sequential(**{name: nn.ReLU()})


def test_names_that_are_taken():
    with pytest.raises(ValueError, match="name '0' is already used"):
        nn.Sequential(linear(), **{"0": linear()})
    with pytest.raises(ValueError, match="name 'fc' is already used"):
        nn.Sequential(fc=linear()).append(linear(), "fc")


@pytest.mark.parametrize("value", [ops.relu, None, [nn.ReLU()], nn.ReLU])
def test_only_modules(value):
    for add in (
        lambda: nn.Sequential(value),
        lambda: nn.ModuleList([value]),
        lambda: nn.ModuleDict({"a": value}),
        lambda: nn.Sequential(nn.ReLU()).append(value),
        lambda: nn.Sequential(nn.ReLU()).__setitem__(0, value),
    ):
        with pytest.raises(TypeError, match=f"takes modules; got {type(value).__name__} for"):
            add()


def test_behaves_as_a_dict():
    a, b = linear(0), linear(1)
    ours, expected = nn.ModuleDict(), {}
    for change in (
        lambda d: d.update({"x": a}),
        lambda d: d.update(y=b, z=a),
        lambda d: d.__setitem__("x", b),
        lambda d: d.pop("y"),
        lambda d: d.setdefault("x", a),
        lambda d: d.__delitem__("z"),
    ):
        for d in (ours, expected):
            change(d)
        assert dict(ours) == expected
        assert list(ours.items()) == list(expected.items())
        assert len(ours) == len(expected)
        assert ("x" in ours, "training" in ours) == ("x" in expected, False)
    with pytest.raises(KeyError):
        ours["training"]
    with pytest.raises(TypeError, match="must be a string; got 1"):
        ours[1] = a


@pytest.mark.parametrize("container", [nn.ModuleList([linear()]), nn.ModuleDict({"a": linear()})])
def test_identity_and_calls(container):
    assert container == container
    assert container != copy.copy(container)
    assert len({container, container}) == 1
    with pytest.raises(NotImplementedError, match="only holds modules and cannot be called"):
        container(Tensor([1.0]))


def test_repr():
    assert repr(nn.ModuleDict({"a": nn.ReLU()})) == "ModuleDict(\n  (a): ReLU()\n)"
    assert repr(nn.ModuleList()) == "ModuleList()"
