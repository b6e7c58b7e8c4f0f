"""Tensors of other libraries go in without a copy, and results come out by DLPack."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from gemm_cases import BFLOAT16, assert_product, host, reference, signs

from cupybnn import pack, sign, xnor_gemm, xnor_gemm_packed
from cupybnn.backends.devices import cuda_status
from cupybnn.backends.interop import as_native, type_name

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="needs PyTorch")


@pytest.fixture(params=DEVICES)
def device(request, torch):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    return request.param


def module_of(device):
    if device == "cpu":
        return np
    import cupy

    return cupy


def numbers(tensor):
    """Host copy that NumPy can compute with."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "int8", "int64", "bool"])
def test_pytorch_tensors(torch, device, dtype):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(70, 130, generator=generator).round().to(getattr(torch, dtype)).to(device)
    b = torch.randn(50, 130, generator=generator).round().to(getattr(torch, dtype)).to(device).T
    assert not b.is_contiguous()
    expected = reference(numbers(a), numbers(b))
    result = xnor_gemm(a, b)
    assert isinstance(result, module_of(device).ndarray)
    assert_product(result, expected, dtype)
    assert_product(xnor_gemm(pack(a), pack(b, axis=-2)), expected, dtype)
    np.testing.assert_array_equal(host(sign(a)), signs(numbers(a)))
    back = torch.from_dlpack(result)
    assert back.device.type == device
    np.testing.assert_array_equal(back.cpu().numpy(), expected)


@pytest.mark.skipif(not BFLOAT16, reason="needs ml_dtypes")
def test_pytorch_bfloat16(torch, device):
    a = torch.randn(20, 70).bfloat16().to(device)
    result = xnor_gemm(a, a.T)
    assert result.dtype == np.float32
    assert_product(result, reference(numbers(a), numbers(a).T), "bfloat16")


def test_pytorch_bfloat16_without_ml_dtypes(torch, monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(TypeError, match=r"'a' of xnor_gemm is a bfloat16.*ml_dtypes.*x\.float\(\)"):
        xnor_gemm(torch.ones(3, 3).bfloat16(), np.ones((3, 3)))


def test_nothing_is_copied(torch, device):
    tensor = torch.ones(4, 6, device=device).T
    array = as_native(tensor, "'x'")
    tensor[0, 0] = -5
    assert float(array[0, 0]) == -5
    back = torch.from_dlpack(module_of(device).asarray(array))
    assert back.data_ptr() == tensor.data_ptr()


def test_mixed_with_native_arrays(torch, device):
    xp = module_of(device)
    a = torch.randn(5, 40, device=device)
    b = xp.asarray(np.random.default_rng(0).standard_normal((40, 3)))
    assert_product(xnor_gemm(a, b), reference(numbers(a), host(b)), "mixed")
    result = xnor_gemm(a, b, scale=torch.full((3,), 2.0, device=device))
    assert_product(result, 2 * reference(numbers(a), host(b)), "scale")
    threshold = torch.tensor([1, 2, 3], device=device)
    bits = xnor_gemm_packed(a, b, threshold=threshold).unpack(bool)
    assert (host(bits) == (reference(numbers(a), host(b)) >= [1, 2, 3])).all()


def test_gradients_are_not_lost_silently(torch, device):
    tensor = torch.ones(3, 3, device=device, requires_grad=True)
    with pytest.raises(TypeError, match=r"'a' of xnor_gemm.*torch\.Tensor.*x\.detach\(\)"):
        xnor_gemm(tensor, tensor)
    assert_product(xnor_gemm(tensor.detach(), tensor.detach()), np.full((3, 3), 3), "detached")


def test_tensors_without_sign(torch, device):
    tensor = torch.ones(3, 3, device=device)
    with pytest.raises(TypeError, match="got dtype uint8"):
        xnor_gemm(tensor.to(torch.uint8), tensor)
    with pytest.raises(TypeError, match="complex"):
        xnor_gemm(tensor.to(torch.complex64), tensor)


def test_tensors_that_are_nowhere(torch):
    with pytest.raises(TypeError, match=r"'b' of xnor_gemm must be a tensor that DLPack"):
        xnor_gemm(np.ones((3, 3)), torch.ones(3, 3, device="meta"))


class OnlyCudaArrayInterface:
    """What Numba, for one, hands out."""

    def __init__(self, interface):
        self.__cuda_array_interface__ = interface


@pytest.mark.gpu
def test_cuda_array_interface():
    import cupy

    x = cupy.asarray(np.random.default_rng(0).standard_normal((5, 40), dtype=np.float32))
    foreign = OnlyCudaArrayInterface(x.__cuda_array_interface__)
    assert as_native(foreign, "'x'").data.ptr == x.data.ptr
    assert_product(xnor_gemm(foreign, x.T), reference(x.get(), x.T.get()), "interface")


@pytest.mark.skipif(cuda_status().available, reason="needs a machine without CUDA")
def test_gpu_tensors_without_cupy_say_why():
    foreign = OnlyCudaArrayInterface({"shape": (3, 3), "typestr": "<f4", "data": (0, False)})
    with pytest.raises(TypeError, match=r"'a' of xnor_gemm is a .* on a GPU and needs CuPy"):
        xnor_gemm(foreign, np.ones((3, 3)))


class OnDevice:
    """A tensor that says by DLPack that it lives on another kind of device."""

    def __dlpack__(self, **_):
        raise BufferError("not from there")

    def __dlpack_device__(self):
        return (10, 0)  # ROCm


def test_other_kinds_of_devices():
    with pytest.raises(
        TypeError, match=r"host memory or on a CUDA device; .*DLPack device type 10"
    ):
        xnor_gemm(OnDevice(), np.ones((3, 3)))


def test_numpy_results_go_to_dlpack(xp):
    result = xnor_gemm(xp.ones((3, 4)), xp.ones((4, 5)))
    assert_product(xp.from_dlpack(result), np.full((3, 5), 4), "dlpack")


def test_names_of_types():
    assert type_name([]) == "list"
    assert type_name(np.ones(3)) == "numpy.ndarray"
    assert type_name(np.float32(1)) == "numpy.float32"
    assert type_name(type("Own", (), {"__module__": "__main__"})()) == "Own"
    assert type_name(type("Inner", (), {"__module__": "_package.part"})()) == "package.Inner"


def test_pytorch_view_that_negates(torch, device):
    """The imaginary part of a conjugate is a view of memory that holds the opposite."""
    z = torch.tensor([[1 + 2j, 3 - 4j], [-1 - 1j, 2 + 5j]], device=device)
    x = z.conj().imag
    np.testing.assert_array_equal(host(sign(x)), [[-1, 1], [1, -1]])
    y = numbers(x.resolve_neg())
    assert_product(xnor_gemm(x, x), reference(y, y), "negated")


class LikeJax:
    """A host array whose DLPack NumPy refuses, but which gives an array by itself."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **_):
        raise BufferError("Unsupported dtype in DLTensor.")

    def __dlpack_device__(self):
        return (1, 0)

    def __array__(self, dtype=None, copy=None):
        if self.array is None:
            raise RuntimeError("not from there either")
        return self.array


@pytest.mark.skipif(not BFLOAT16, reason="needs ml_dtypes")
def test_bfloat16_that_comes_as_an_array():
    a = np.random.default_rng(0).standard_normal((5, 70)).astype(BFLOAT16[0])
    result = xnor_gemm(LikeJax(a), LikeJax(a.T))
    assert result.dtype == np.float32
    assert_product(result, reference(a, a.T), "bfloat16")
    scale = LikeJax(np.full(5, 2).astype(BFLOAT16[0]))
    assert_product(xnor_gemm(a, a.T, scale=scale), 2 * reference(a, a.T), "scale")
    with pytest.raises(TypeError, match=r"that DLPack can export.*Unsupported dtype"):
        xnor_gemm(LikeJax(None), a)
