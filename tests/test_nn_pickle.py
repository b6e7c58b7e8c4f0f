"""Models and optimizers copied and pickled, by every protocol."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from arrays import host

from cupybnn import nn, ops, optim
from cupybnn.autograd import Tensor

WAYS = {f"protocol {n}": n for n in range(pickle.HIGHEST_PROTOCOL + 1)} | {"deepcopy": None}


@pytest.fixture(params=WAYS)
def twin(request):
    """Give a function that copies an object in one of the ways."""
    protocol = WAYS[request.param]
    if protocol is None:
        return copy.deepcopy
    return lambda x: pickle.loads(pickle.dumps(x, protocol))


class Net(nn.Module):
    """Every kind of layer, a shared one, and modules in a list and a dict."""

    def __init__(self):
        self.body = nn.Sequential(
            nn.Flatten(),
            nn.Linear(6, 8, bias=True, rng=0),
            nn.BatchNorm(8),
            nn.Dropout(0.9, rng=1),
            norm=nn.Scale(0.5),
            sign=nn.Sign("stochastic_sign"),
            coins=nn.SignDropout(0.8, rng=2),
        )
        self.blocks = nn.ModuleList([nn.BinaryLinear(8, 8, ste="ede_sign", rng=3)])
        self.heads = nn.ModuleDict({"a": nn.Linear(8, 3, rng=4)})
        self.again = self.heads["a"]

    def forward(self, x):
        return self.again(self.blocks[0](self.body(x)).tanh())


def optimizer_of(net):
    binary, real = optim.parameter_groups(net, (optim.is_binary, {"name": "binary"}))
    return optim.Combined(
        optim.Bop([binary], lr=0.5, schedule=optim.schedules.warm_up(3)),
        optim.AdamW([real], schedule=optim.schedules.cosine(20), lr_scale=optim.binarynet_scale),
    )


def step(net, optimizer, xp, seed):
    rng = np.random.default_rng(seed)
    x = Tensor(xp.asarray(rng.standard_normal((16, 2, 3)), "float32"))
    loss = ops.softmax_cross_entropy(net(x), xp.asarray(rng.integers(0, 3, 16)))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def contents(net):
    return {name: a.tobytes() for name, a in net.state_dict().items()}


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("read", [False, True])
def test_together_they_go_on_as_one(xp, twin, steps, read):
    net = Net().to("cpu" if xp is np else "cuda")
    optimizer = optimizer_of(net)
    average = optim.WeightAverage(net.parameters(), 0.9)
    for seed in range(steps):
        step(net, optimizer, xp, seed)
        average.update()
    lent = [p.data for p in net.parameters()] if read else []
    net2, optimizer2, average2 = twin((net, optimizer, average))
    assert contents(net2) == contents(net)
    assert repr(net2) == repr(net)
    assert repr(optimizer2) == repr(optimizer)
    mine, copied = list(net.parameters()), list(net2.parameters())
    assert len(mine) == len(copied)
    for p, q in zip(mine, copied, strict=True):
        assert type(q) is nn.Parameter
        assert q is not p
        assert (q.bits, q.limit, q.requires_grad, q.is_leaf) == (p.bits, p.limit, True, True)
        assert (q.grad is None) == (p.grad is None)
        if p.grad is not None:
            np.testing.assert_array_equal(host(q.grad), host(p.grad))
    assert net2.again is net2.heads["a"]
    updated = {id(p) for group in optimizer2.groups for p in group["params"]}
    assert updated == {id(q) for q in copied} == {id(q) for q in average2.parameters}
    before = contents(net)
    losses = []
    for model, chosen, mean in ((net2, optimizer2, average2), (net, optimizer, average)):
        losses.append([step(model, chosen, xp, seed) for seed in range(10, 13)])
        mean.update()
        if model is net2:
            assert contents(net) == before  # they share no memory
    assert losses[0] == losses[1]
    assert contents(net2) == contents(net)
    for a, b in zip(average.averages, average2.averages, strict=True):
        np.testing.assert_array_equal(host(a), host(b))
    assert len(lent) in (0, len(mine))


def test_alone(twin):
    layer = nn.Linear(2, 2, rng=0)
    layer.eval()
    other = twin(layer)
    assert not other.training
    optimizer = twin(optim.Adam(layer.parameters(), 0.5))
    (parameter,) = optimizer.groups[0]["params"]
    assert parameter is not layer.weight
    np.testing.assert_array_equal(parameter.data, layer.weight.data)
    with pytest.raises(ValueError, match="'lr' of Adam must be"):
        optimizer.groups[0]["lr"] = -1
    summary = layer.summary()
    assert twin(summary) == summary


def test_copies_of_groups_stay_checked():
    group = optim.SGD([nn.Parameter(np.ones(2))], 0.5).groups[0]
    for other in (copy.copy(group), copy.deepcopy(group)):
        with pytest.raises(ValueError, match="'momentum' of SGD must be"):
            other["momentum"] = 3
    assert copy.copy(group)["params"][0] is group["params"][0]
