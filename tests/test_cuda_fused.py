"""What the fused kernels of a training step are launched with, by name and byte; without a GPU."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from cupybnn.backends.cuda import (
    fused,
    fused_batch,
    fused_head,
    fused_layers,
    fused_parameter,
    fused_update,
    fused_walk,
    sign_gemm,
)
from cupybnn.backends.cuda.fused_layers import Activation, ActivationGradient, Activations, Layer
from cupybnn.backends.cuda.structs import Kernel, Struct

SHARED, MULTIPROCESSORS = 232448, 132
STRUCTS = {
    s.name: s
    for module in (fused_batch, fused_head, fused_layers, fused_parameter, fused_update, sign_gemm)
    for s in vars(module).values()
    if isinstance(s, Struct)
}


class Array:
    """What a launch asks of a CuPy array; each lies at an address of its own."""

    taken = 0x1000_0000

    def __init__(self, shape, dtype=np.float32):
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.dtype = np.dtype(dtype)
        self.itemsize, self.size = self.dtype.itemsize, int(np.prod(self.shape))
        Array.taken += 0x10_0000
        self.data = SimpleNamespace(ptr=Array.taken)


def packed(*shape) -> SimpleNamespace:
    return SimpleNamespace(shape=shape, words=Array(1, np.uint32), popcounts=Array(1, np.int32))


def decode(struct: Struct, data: bytes) -> dict[str, object]:
    """Read fields of 8 bytes, as their types say; several are a list."""
    dtypes, found, end = {"double": np.float64, "i64": np.int64}, {}, 0
    for f in struct.fields:
        values = np.frombuffer(data, dtypes.get(f.type, np.uint64), f.count or 1, end).tolist()
        found[f.name] = values if f.count else values[0]
        end += 8 * len(values)
    assert len(data) == end
    return found


def at(array: Array | None) -> int:
    return 0 if array is None else array.data.ptr


@pytest.fixture
def machine(monkeypatch):
    """A device of the given kind as far as the launch code can tell, and launches in order."""
    state = SimpleNamespace(capability=90, stream=1, launches=[])

    def load_kernel(source, function, defines, device, shared=0):
        def launch(grid, block, arguments, shared_mem=0):
            assert shared_mem == shared
            (kernel,) = (
                k
                for module in (fused_batch, fused_head, fused_layers, fused_update)
                for k in vars(module).values()
                if isinstance(k, Kernel) and (k.source, k.function) == (source, function)
            )
            names = [f.name for f in kernel.fields]
            by_name = {}
            for field, value in zip(kernel.fields, arguments, strict=True):
                if field.type in STRUCTS and field.type != "Parameters":
                    by_name[field.name] = decode(STRUCTS[field.type], value.tobytes())
                else:
                    by_name[field.name] = value
            assert list(by_name) == names
            state.launches.append(
                SimpleNamespace(
                    function=function, defines=dict(defines), grid=grid, threads=block[0],
                    shared=shared, arguments=by_name,
                )
            )  # fmt: skip

        return launch

    stream = SimpleNamespace(get_current_stream=lambda: SimpleNamespace(ptr=state.stream))
    cupy = SimpleNamespace(empty=Array, zeros=Array, cuda=stream)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(fused, "load_kernel", load_kernel)
    for module in (fused, fused_walk):
        monkeypatch.setattr(module, "multiprocessors", lambda device: MULTIPROCESSORS)
    monkeypatch.setattr(fused_walk, "architecture", lambda device: state.capability)
    monkeypatch.setattr(fused_walk, "shared_memory_limit", lambda device: SHARED)
    return state


def batch_norm(units: int) -> fused_layers.BatchNorm:
    names = ("gamma", "beta", "grad_gamma", "grad_beta", "running_mean", "running_variance")
    arrays = {name: Array(units) for name in (*names, "mean", "inverse")}
    return fused_layers.BatchNorm(**arrays, decay=0.75, eps=0.5)


def test_a_batch(machine):
    launcher = fused.Launcher(0, np.dtype(np.uint16))
    arrays = {
        "images": Array((9, 784), np.uint8), "all_labels": Array(9, np.int64),
        "order": Array((5, 64), np.int32), "labels": Array(64, np.int64),
        "step": Array(1, np.int64), "x": Array((64, 784), np.uint16),
        "pops": Array((3, 64), np.int32),
    }  # fmt: skip
    draw = fused_batch.Draw(seed=2**63 + 9, offset=-3, keep_prob=0.5)
    fused_batch.Gather(**arrays, drop=draw).launch(launcher)
    (launch,) = machine.launches
    assert launch.arguments["p"] == {
        **{name: at(array) for name, array in arrays.items()},
        "ring": 5, "rows": 64, "cols": 784, "pop_count": 192, "first": 0, "whole": 64,
        "seed": 2**63 + 9, "draw": -3, "last": 2**31 - 1,
    }  # fmt: skip
    assert launch.defines == {"REAL": "bfloat16_bits", "DROP": 1, "VECTOR": 8}
    assert (launch.grid, launch.threads) == ((25,), 256)
    gradient = Array((64, 784), np.uint16)
    kept = {name: arrays[name] for name in ("step", "x")}
    fused_batch.Attack(**kept, gradient=gradient, amount=0.25).launch(launcher)
    attack = machine.launches[1]
    assert attack.arguments["p"]["order"] == attack.arguments["p"]["ring"] == 0
    assert attack.arguments["p"]["last"] == 2**32 - 1  # nothing is dropped
    assert attack.arguments["gradient"] == at(gradient)
    assert attack.arguments["amount"] == np.float32(0.25)
    assert attack.defines == {"REAL": "bfloat16_bits", "DROP": 0, "VECTOR": 4}


def test_deformed_images_are_held_in_shared_memory(machine):
    launcher = fused.Launcher(0, np.dtype(np.float32))
    arrays = {
        "images": Array((9, 63), np.uint8), "all_labels": Array(9, np.int64),
        "order": Array((5, 4), np.int32), "labels": Array(4, np.int64),
        "step": Array(1, np.int64), "x": Array((4, 63)),
    }  # fmt: skip
    deformation = fused_batch.Deformation(
        shape=(7, 9), seed=5, shift=1.5, rotation=180.0, scale=0.25, shear=0.5
    )
    fused_batch.Gather(**arrays, deformation=deformation).launch(launcher)
    (launch,) = machine.launches
    assert (launch.function, launch.grid, launch.shared) == ("gather_deformed", (4,), 63)
    assert launch.arguments["d"] == {
        "height": 7, "width": 9, "seed": 5, "shift": 1.5, "rotation": np.pi, "scale": 0.25,
        "shear": 0.5, "elastic": 0, "bump_height": 1, "bump_width": 1, "knots_down": 0,
        "knots_right": 0, "flip": 0,
    }  # fmt: skip
    smooth = replace(deformation, elastic=1.5, flip=True, bumps=((1.0, 12), (9 / 7, 12)))
    fused_batch.Gather(**arrays, deformation=smooth).launch(launcher)
    launch = machine.launches[1]
    # Noise, bumps down and right, and columns of the field, in float32; and the image.
    assert launch.shared == 4 * (2 * 12 * 12 + 7 * 12 + 9 * 12 + 2 * 7 * 12) + 63
    wanted = {"elastic": 1.5, "bump_width": 9 / 7, "knots_down": 12, "knots_right": 12, "flip": 1}
    assert wanted.items() <= launch.arguments["d"].items()


@pytest.mark.parametrize("capability", [80, 90])
def test_an_activation_and_its_gradient(machine, capability):
    """Clusters of Hopper do in one launch what takes two elsewhere."""
    machine.capability = capability
    launcher = fused.Launcher(0, np.dtype(np.float32), shapes=[(1024, 512)], classes=10)
    norm = batch_norm(512)
    kept, mask = Array((1024, 16), np.uint32), Array((1024, 16), np.uint32)
    product = Array((1024, 512), np.int16)
    layer = Layer(product=product, kept=kept, norm=norm, drop=1, keep_prob=0.5)
    signs, dense = packed(1024, 512), Array((1024, 512))
    to = Activations(output="both_signs", dense=dense, packed=signs, gate=mask, window=1.5)
    Activation(layer=layer, to=to).launch(launcher)
    first, *rest = machine.launches
    assert [first.function, *(x.function for x in rest)] == ["normalise", "activate"][
        : 2 - (capability == 90)
    ]
    for launch in machine.launches:
        assert launch.arguments["p"] == {
            "z": at(product), "kept": at(kept), "mean": at(norm.mean), "inverse": at(norm.inverse),
            "gamma": at(norm.gamma), "beta": at(norm.beta), "rows": 1024, "cols": 512,
            "keep_scale": 2.0, "share": 1 / 1024,
        }  # fmt: skip
        assert launch.arguments["to"] == {
            "dense": at(dense), "words": at(signs.words), "pops": at(signs.popcounts),
            "gate": at(mask), "window": 1.5,
        }  # fmt: skip
        wanted = {"DROP": 1, "NORM": 1, "PRODUCT": "short", "GATE": 1, "OUTPUT": 4, "REAL": "float"}
        assert wanted.items() <= launch.defines.items()
    got = {name: first.arguments[name] for name in ("mean", "inverse", "running_mean")}
    assert got == {n: at(getattr(norm, n)) for n in got}
    assert first.arguments["running_variance"] == at(norm.running_variance)
    numbers = [first.arguments[name] for name in ("decay", "gain", "eps")]
    assert numbers == [0.75, 0.25, 0.5]
    assert {type(x) for x in numbers} == {np.float32}

    machine.launches.clear()
    grad, out = Array((1024, 512)), Array((1024, 512))
    ActivationGradient(layer=layer, gate="mask", mask=mask, grad=grad, out=out).launch(launcher)
    names = ["gradient_sums", "gradient"][: 2 - (capability == 90)]
    assert [launch.function for launch in machine.launches] == names
    for launch in machine.launches:
        wanted = {"grad": grad, "out": out, "gate": mask, "grad_gamma": norm.grad_gamma}
        wanted["grad_beta"] = norm.grad_beta
        assert {name: launch.arguments[name] for name in wanted} == {
            name: at(array) for name, array in wanted.items()
        }
        assert launch.defines["GATE"] == 1


def test_a_layer_without_batch_norm_has_no_sums(machine):
    launcher = fused.Launcher(0, np.dtype(np.float32))
    layer = Layer(product=Array((70, 45)))
    Activation(layer=layer, to=Activations(output="relu", dense=Array((70, 45)))).launch(launcher)
    ActivationGradient(
        layer=layer, gate="none", mask=None, grad=Array((70, 45)), out=Array((70, 45))
    ).launch(launcher)
    assert [x.function for x in machine.launches] == ["activate", "gradient"]
    assert machine.launches[1].arguments["grad_gamma"] == 0
    Activation(layer=layer, to=Activations()).launch(launcher)  # neither statistics nor output
    assert len(machine.launches) == 2


def head_of(layer: Layer, classes: int = 10, **more) -> fused_head.Head:
    rows, cols = layer.shape
    arrays = {
        "weight": Array((cols, classes)), "grad_weight": Array((cols, classes)),
        "labels": Array(rows, np.int64), "logits": Array((rows, classes)),
        "grad_logits": Array((rows, -(-classes // 4) * 4)), "mean_loss": Array(1),
        "out": Array((rows, cols)),
    }  # fmt: skip
    settings = {"reads": "relu", "loss": "cross_entropy", "smoothing": 0.25, "gate": "mask"}
    return fused_head.Head(layer=layer, window=1.5, **{**arrays, **settings, **more})


@pytest.mark.parametrize(
    ("rows", "cols", "at_a_time"),
    [(64, 512, 1), (2111, 512, 1), (2112, 512, 2), (4224, 512, 4), (9000, 512, 4), (9000, 514, 1)],
)
def test_the_gradient_of_the_head_adds_up_what_its_logits_left(machine, rows, cols, at_a_time):
    launcher = fused.Launcher(0, np.dtype(np.float32), shapes=[(rows, cols)], classes=10)
    head = head_of(Layer(product=Array((rows, cols))))
    head.launch_logits(launcher)
    head.launch_gradient(launcher)
    logits, sums, *_ = machine.launches
    assert logits.defines["ROWS"] == at_a_time
    assert logits.grid == (-(-rows // (8 * at_a_time)),)
    back = sums.arguments["back"]
    assert back["partial_count"] == logits.grid[0]
    assert back["partials"] == logits.arguments["partials"]
    assert launcher._losses.size >= 2 * logits.grid[0]
    assert sums.grid[0] == -(-cols // 32) + 1  # one more strip, for the loss
    assert back["weight"] == at(head.weight)
    assert back["grad"] == at(head.grad_logits) == logits.arguments["grad"]
    assert (back["out"], back["mean_loss"]) == (at(head.out), at(head.mean_loss))
    assert (back["window"], back["grad_factor"]) == (1.5, 0)
    assert logits.arguments["smoothing"] == np.float32(0.25)
    assert sums.defines["GATE"] == 0  # only signs have one


def test_a_head_of_signs_is_followed_by_a_factor_or_a_norm(machine):
    launcher = fused.Launcher(0, np.dtype(np.float32), shapes=[(64, 32)], classes=10)
    layer = Layer(product=Array((64, 32)))
    norm, factor, grad = batch_norm(10), Array(1), Array(1)
    for more in ({}, {"norm": norm, "factor": factor, "grad_factor": grad}, {"factor": factor}):
        with pytest.raises(AssertionError):
            head_of(layer, reads="sign", **more)
    with pytest.raises(AssertionError):
        head_of(layer, norm=norm)
    head_of(layer, reads="sign", factor=factor, grad_factor=grad).launch_logits(launcher)
    scaled = machine.launches.pop()
    assert scaled.arguments["factor"] == at(factor)
    assert (scaled.defines["HEAD"], scaled.defines["OUTPUT_NORM"]) == (2, 0)
    head = head_of(layer, reads="sign", norm=norm)
    head.launch_logits(launcher)
    head.launch_gradient(launcher)
    logits, normed, sums, *_ = machine.launches
    assert logits.defines["OUTPUT_NORM"] == sums.defines["OUTPUT_NORM"] == 1
    assert sums.defines["GATE"] == 1
    assert normed.arguments["p"] == {
        "logits": at(head.logits), "grad": at(head.grad_logits), "labels": at(head.labels),
        "gamma": at(norm.gamma), "beta": at(norm.beta), "running_mean": at(norm.running_mean),
        "running_variance": at(norm.running_variance), "grad_gamma": at(norm.grad_gamma),
        "grad_beta": at(norm.grad_beta), "mean_loss": at(head.mean_loss), "rows": 64,
        "totals": 0, "whole_gamma": 0, "whole_beta": 0, "share": 1 / 64, "loss_share": 1 / 64,
        "decay": 0.75, "eps": 0.5, "smoothing": 0.25,
    }  # fmt: skip


@pytest.mark.parametrize("capability", [80, 90])
def test_layers_may_differ_in_width(machine, capability):
    machine.capability = capability
    shapes = [(100, 1024), (100, 37), (100, 4096), (33, 8)]
    launcher = fused.Launcher(0, np.dtype(np.float32), shapes=shapes, classes=10)
    for shape in shapes:
        layer = Layer(product=Array(shape), norm=batch_norm(shape[1]))
        Activation(layer=layer, to=Activations()).launch(launcher)
        head_of(layer).launch_gradient(launcher)
    small = fused.Launcher(0, np.dtype(np.float32), shapes=shapes[1:2], classes=10)
    layer = Layer(product=Array(shapes[0]), norm=batch_norm(1024))
    with pytest.raises(AssertionError, match="wider than any known"):
        Activation(layer=layer, to=Activations()).launch(small)


def test_scratch_memory_is_used_on_one_stream_a_step(machine):
    launcher = fused.Launcher(0, np.dtype(np.float32), shapes=[(64, 32)], classes=10)
    layer = Layer(product=Array((64, 32)), norm=batch_norm(32))
    activation = Activation(layer=layer, to=Activations())
    launcher.begin_step()
    activation.launch(launcher)
    machine.stream = 2
    # What needs no scratch memory may run at the same time.
    fused_layers.UnpackRows(packed=packed(64, 32), out=Array((64, 32))).launch(launcher)
    with pytest.raises(AssertionError, match="on two streams"):
        activation.launch(launcher)
    launcher.begin_step()
    activation.launch(launcher)


def parameter(shape, **more) -> fused_update.ParameterUpdate:
    arrays = {name: Array(shape) for name in ("weight", "grad", "mean", "square")}
    return fused_update.ParameterUpdate(**{**arrays, **more})


def update_of(launcher, groups) -> fused_update.Update:
    return fused_update.Update(
        launcher, groups, betas=(0.75, 0.5), penalty="l1", keep_gradients=True,
        rates=Array((1024, 4)), step=Array(1, np.int64), mean_loss=Array(1), loss=Array(1),
    )  # fmt: skip


def test_parameters_of_an_update(machine):
    launcher = fused.Launcher(0, np.dtype(np.float32))
    latent = parameter(
        (45, 72), grad=Array((45, 72), np.uint16), kept_grad=Array((45, 72)), copy=Array((45, 72)),
        packed=packed(45, 72), binary=True, gate="window", limit=1.0, lr_scale=0.5, penalty=0.25,
        weight_decay=0.125,
    )  # fmt: skip
    bias = parameter((130,))
    bias.mean.data.ptr += 4  # so that four neighbors are not aligned
    update = update_of(launcher, [[latent, bias]])
    update.launch(0)
    (launch,) = machine.launches
    table = launch.arguments["parameters"].tobytes()
    size = fused_parameter.PARAMETER.size
    first, second = (
        decode(fused_parameter.PARAMETER, table[i * size : (i + 1) * size]) for i in (0, 1)
    )
    assert first == {
        "weight": at(latent.weight), "grad": at(latent.grad), "mean": at(latent.mean),
        "square": at(latent.square), "copy": at(latent.copy), "words": at(latent.packed.words),
        "pops": at(latent.packed.popcounts), "kept_grad": at(latent.kept_grad), "rows": 45,
        "cols": 72, "count": 45 * 72, "first_block": 0, "flags": 1 + 4 + 8 + 16, "limit": 1.0,
        "lr_scale": 0.5, "penalty": 0.25, "weight_decay": 0.125,
    }  # fmt: skip
    assert (second["rows"], second["cols"], second["count"]) == (2, 128, 130)
    assert (second["first_block"], second["flags"], second["limit"]) == (2, 0, 0.0)
    assert table[2 * size : 8 * size] == bytes(6 * size)
    assert int.from_bytes(table[8 * size :], "little") == 2
    assert launch.grid == (3,)
    assert (launch.arguments["gain_mean"], launch.arguments["gain_square"]) == (0.25, 0.5)
    assert launch.arguments["ring"] == 1024
    assert launch.defines == {"REAL": "float", "PENALTY": 1, "WRITE_GRADIENT": 1}


def test_an_update_that_reads_the_gradients_of_all_ranks(machine):
    launcher = fused.Launcher(0, np.dtype(np.uint16))
    some = [parameter((64, 128), binary=True, distances=(-256, 0, 1 << 40)) for _ in range(2)]
    update = update_of(launcher, [some, [parameter(3)]])
    update.launch(0)
    update.launch(1)
    reading, plain = machine.launches
    assert (reading.function, plain.function) == ("adam_of_ranks", "adam")
    assert reading.defines["RANKS"] == 3
    assert "RANKS" not in plain.defines
    assert reading.arguments["away"] == {"of": [-256, 0, 1 << 40, 0, 0, 0, 0, 0]}
    with pytest.raises(ValueError, match="too many values"):
        update_of(launcher, [[some[0], parameter(3)], [parameter(3)]])


def test_parts_of_the_penalty_do_not_overlap_and_the_last_launch_ends_the_step(
    machine, monkeypatch
):
    """Ten parameters take two launches; a product that updates leaves its parts first."""
    launcher = fused.Launcher(0, np.dtype(np.float32))
    by_product = parameter((256, 512), grad=None, packed=packed(256, 512), binary=True)
    groups = [[by_product, parameter(300)], [parameter(128 * 32 * i) for i in range(1, 11)]]
    update = update_of(launcher, groups)
    taken = {}
    monkeypatch.setattr(
        sign_gemm, "weight_update", lambda signs, matrix, update, **more: taken.update(update)
    )
    update.launch_fused_update(0, signs=packed(9, 256), matrix=Array((9, 512), np.uint16))
    update.launch(0)
    update.launch(1)
    assert taken["earlier"] == 0
    assert taken["parameter"] == by_product.pack(0)
    product_parts = 4 * sign_gemm.WRITERS  # four tiles of 128 x 256
    assert [x.arguments["earlier"] for x in machine.launches] == [
        product_parts, product_parts + 1, product_parts + 1 + 36,
    ]  # fmt: skip
    assert [x.grid[0] for x in machine.launches] == [1, 36, 19]
    assert [int(x.arguments["final"]) for x in machine.launches] == [0, 0, 1]
    assert update._common["partials"].size == product_parts + 1 + 36 + 19
    with pytest.raises(AssertionError, match="increments the step"):
        update_of(launcher, [[by_product]])
