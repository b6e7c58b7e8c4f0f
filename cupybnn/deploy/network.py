"""A trained network with its binary weights as bits, to predict with."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from cupybnn import nn
from cupybnn.backends.devices import CPU, Device, array_module, resolve
from cupybnn.deploy import c_header, file, onnx_file, qonnx_file
from cupybnn.deploy.conversion import packed_model
from cupybnn.deploy.evaluation import ClassificationReport, evaluate
from cupybnn.deploy.forward import Forward
from cupybnn.deploy.inputs import InputSpec, like
from cupybnn.deploy.layers import PackedLayer
from cupybnn.training.saved import load_model

__all__ = ["PackedNetwork"]


class PackedNetwork:
    """A trained network in as few bits as its predictions need.

    Hidden layers with binary weights are products of bits, and batch norm and sign after them an
    integer threshold for each unit; layers with real weights stay as they are. Dropout, latent
    weights and all else that acts in training alone is gone. The result is that of the model's
    evaluation.

    Make one by `from_model`, `from_torch`, `from_run` or `load`.

    Attributes
    ----------
    layers : tuple of PackedLayer
    inputs : InputSpec
    classes : ndarray, shape (classes,)
        What `predict` returns: the names of the classes, or their numbers.
    device : Device

    Examples
    --------
    >>> import numpy as np
    >>> import cupybnn
    >>> result = cupybnn.train(dataset="digits", binary=True, max_steps=60, device="cpu")
    >>> net = cupybnn.PackedNetwork.from_model(result.model)
    >>> net(np.zeros((2, 64), np.float32)).shape
    (2, 10)
    """

    def __init__(
        self,
        layers: Sequence[PackedLayer],
        inputs: InputSpec,
        classes: Any = None,
        device: Device = CPU,
    ) -> None:
        self.layers = tuple(layers)
        self.inputs = inputs
        count = self.layers[-1].units
        self.classes = np.arange(count) if classes is None else np.asarray(classes)
        if self.classes.shape != (count,):
            raise ValueError(
                f"The 'classes' of a PackedNetwork must name each of its {count} outputs; got "
                f"{self.classes.shape}."
            )
        for name, times in Counter(self.classes.tolist()).items():
            if times > 1:  # a prediction would not say which
                raise ValueError(
                    f"The 'classes' of a PackedNetwork must be different names; got {name!r} "
                    f"more than once."
                )
        self.device = device
        self._forward = Forward(self.layers, inputs, device)

    # Making one --------------------------------------------------------------------------------

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        *,
        pixel_max: float | None = None,
        image_shape: tuple[int, ...] | None = None,
        classes: Iterable[Any] | None = None,
    ) -> PackedNetwork:
        """Pack a trained model.

        Parameters
        ----------
        model : Module
            A chain of our layers (`cupybnn.nn.Sequential`), with parameters in float32. A model
            that `cupybnn.train` or `cupybnn.load_model` returned knows the rest itself.
        pixel_max : float, optional
            Greatest pixel, 255 for MNIST, where the network is to take pixels of whole numbers; it
            was trained on ``pixels / pixel_max`` then. Floating inputs are taken as they are.
        image_shape : tuple of int, optional
            (height, width), where inputs may be images.
        classes : iterable, optional
            Names of the classes; default: those of its data, or their numbers from 0.

        Returns
        -------
        PackedNetwork
            On the device of the model.

        Raises
        ------
        TypeError
            If `model` is not a Module.
        ValueError
            If a layer cannot be packed; the message names it and says why.
        """
        layers, inputs, names = packed_model(model, pixel_max, image_shape, classes)
        return cls(layers, inputs, names).to(model.device)

    @classmethod
    def from_torch(
        cls,
        model: Any,
        *,
        pixel_max: float | None = None,
        image_shape: tuple[int, ...] | None = None,
        classes: Iterable[Any] | None = None,
    ) -> PackedNetwork:
        """Pack a trained model of PyTorch; needs PyTorch.

        Parameters
        ----------
        model : torch.nn.Sequential
            A chain, possibly nested, of Linear, BatchNorm1d, ReLU, Flatten, Dropout and Identity,
            and of `cupybnn.torch.XnorLinear` and `cupybnn.torch.SignSTE`, in float32. The first
            layer must take numbers: Linear, or XnorLinear with ``binary_input=False``.
        pixel_max, image_shape, classes
            As for `from_model`.

        Returns
        -------
        PackedNetwork
            On the device of the model. It predicts as the model does in evaluation mode: products
            of signs are exact, and sums of real numbers agree within rounding.

        Raises
        ------
        TypeError
            If `model` is not a `torch.nn.Sequential`.
        ValueError
            If a layer cannot be packed; the message names it and says why.

        Examples
        --------
        >>> import torch
        >>> import cupybnn
        >>> from cupybnn.torch import XnorLinear
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(64, 32), torch.nn.BatchNorm1d(32), XnorLinear(32, 10)
        ... ).eval()
        >>> net = cupybnn.PackedNetwork.from_torch(model)
        >>> x = torch.randn(5, 64)
        >>> torch.equal(net.predict(x), model(x).argmax(1))
        True
        """
        from cupybnn.deploy.torch_model import model_from_torch

        chain = model_from_torch(model)
        net = cls.from_model(chain, pixel_max=pixel_max, image_shape=image_shape, classes=classes)
        device = next((p.device for p in model.parameters()), None)
        return net if device is None or device.type == "cpu" else net.to(str(device))

    @classmethod
    def from_run(
        cls,
        run: str | os.PathLike[str],
        which: str = "newest",
        *,
        classes: Iterable[Any] | None = None,
        device: str = "auto",
    ) -> PackedNetwork:
        """Pack the model of a training run; its data are not loaded.

        Parameters
        ----------
        run : path-like
            A run folder, or a checkpoint.
        which : {"newest", "best"}
            See `cupybnn.load_model`.
        classes : iterable, optional
            Names of the classes; default: those of the data, if it has any.
        device : str
            Where the network is to be: "auto", "cpu", "cuda" or "cuda:N".

        Raises
        ------
        CheckpointError
            If there is no such checkpoint, or it cannot be read.
        ValueError
            If a layer cannot be packed.
        """
        model = load_model(run, which=which, device=device)
        return cls.from_model(model, classes=classes)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | Device = "cpu") -> PackedNetwork:
        """Read what `save` wrote.

        Parameters
        ----------
        path : path-like
        device : str or Device
            Where the network is to be.

        Raises
        ------
        ValueError
            If the file is damaged, of another kind or contradicts itself.
        """
        layers, inputs, classes = file.read(path)
        return cls(layers, inputs, classes).to(device)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the network to one file: an .npz without pickle, a bit for each binary weight.

        Parameters
        ----------
        path : path-like
            Holds all of the network afterwards, or what it held before.
        """
        host = self.to("cpu")
        file.write(path, host.layers, host.inputs, host.classes)

    def to_onnx(
        self,
        path: str | os.PathLike[str],
        *,
        inputs: str | None = None,
        target: str = "cpu",
        opset: int = onnx_file.OLDEST_OPSET,
    ) -> None:
        """Write the network as ONNX, a bit for each binary weight; needs the package onnx.

        The batch may have any size. Outputs are "logits" and "probabilities", float32 of shape
        (batch, classes), and "class_index", int64 of shape (batch,): positions in `classes`, which
        the metadata list as JSON next to the image shape and the greatest pixel.

        Products of signs are those of integers, so the result is exact wherever this network's is.
        Sums of real numbers are rounded in another order. Where binary weights meet pixels, the
        graph sums whole pixels, exactly, and compares with a threshold for that: a unit can differ
        from this network's where its sum is within a rounding error of the threshold.

        Parameters
        ----------
        path : path-like
            Holds all of the network afterwards, or what it held before.
        inputs : {"pixels", "numbers"}, optional
            The input of the graph and its name: "pixels" are uint8, images of shape (batch, height,
            width) where the network knows their shape, scaled in the graph; "numbers" are float32
            of shape (batch, features), as in training. Default: pixels, if the network scales
            them, and numbers if it does not (a `pixel_max` of None or 1).
        target : {"cpu", "cuda"}
            For which of onnxruntime's providers: on a CPU, products of signs are of bytes (the
            operator MatMulInteger), on CUDA of float16, or float32 where sums can exceed 2,048.
        opset : int
            Version of the operators, 13 or newer.

        Raises
        ------
        SettingError
            If the package onnx is not installed, an argument is not one of those above, or the
            network does not take pixels of a byte.

        Examples
        --------
        >>> import tempfile
        >>> import cupybnn
        >>> result = cupybnn.train(dataset="digits", binary=True, max_steps=10, device="cpu")
        >>> net = cupybnn.PackedNetwork.from_model(result.model, pixel_max=16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     net.to_onnx(f"{folder}/net.onnx")
        """
        onnx_file.write(path, self, inputs=inputs, target=target, opset=opset)

    def to_qonnx(self, path: str | os.PathLike[str]) -> None:
        """Write the network as QONNX, for FINN, hls4ml and the package qonnx; needs onnx.

        Weights and activations are signs by BipolarQuant nodes of the domain
        ``qonnx.custom_op.general``, on float32 (https://github.com/fastmachinelearning/qonnx).
        Batch norm and flips are folded into thresholds and weights. The input "numbers" is one row
        of numbers scaled as in training, shape (1, features); the output is "logits".

        Parameters
        ----------
        path : path-like
            Holds all of the network afterwards, or what it held before.

        Raises
        ------
        SettingError
            If the package onnx is not installed.
        """
        qonnx_file.write(path, self)

    def to_c(self, path: str | os.PathLike[str], *, name: str = "net") -> None:
        """Write the network as a C99 header that needs no library and no memory but the stack.

        It defines ``int net_predict(const uint8_t *pixels)``, which returns a position in
        `classes`, and ``void net_logits(const uint8_t *pixels, T *logits)``; T is float, or int32_t
        where the logits are integers.

        Products of signs and of signs and pixels are of integers, exactly. Sums of real numbers are
        in float, in another order than here; for where a result can differ see `to_onnx`.

        Parameters
        ----------
        path : path-like
            Holds all of the header afterwards, or what it held before.
        name : str
            What the names in the header begin with: letters, digits and underscores.

        Raises
        ------
        SettingError
            If the network does not take pixels of a byte, or `name` is none that C allows.

        Examples
        --------
        >>> import tempfile
        >>> import cupybnn
        >>> result = cupybnn.train(dataset="digits", binary=True, max_steps=10, device="cpu")
        >>> net = cupybnn.PackedNetwork.from_model(result.model, pixel_max=16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     net.to_c(f"{folder}/digits.h", name="digits")
        """
        c_header.write(path, self, name=name)

    def to(self, device: str | Device) -> PackedNetwork:
        """Return the network on "cpu", "cuda", "cuda:1", ...; itself, if it is there already."""
        target = resolve(device)
        if target == self.device:
            return self
        layers = [layer.to(target) for layer in self.layers]
        return PackedNetwork(layers, self.inputs, self.classes, target)

    # Using it ----------------------------------------------------------------------------------

    def __call__(self, x: Any) -> Any:
        """Return the logits.

        Parameters
        ----------
        x : array_like
            Inputs, shape (batch, features) or one of shape (features,); images, too, where the
            network has an image shape. Whole numbers are pixels, floating ones are taken as they
            are. NumPy, CuPy or any array that DLPack hands over, on the device of the network.

        Returns
        -------
        array of float32, shape (batch, classes) or (classes,)
            Of the kind of `x`; later calls do not change it.

        Notes
        -----
        On a GPU up to 64 inputs go through all layers in one launch. Above that, and where layers
        are too wide for it, a batch size that comes again is captured as a CUDA graph, or its
        launches are prepared, and the last sixteen are kept. On Hopper, pixels of a byte (uint8)
        are fastest: they are multiplied as bytes on the tensor cores, with weights of 22 bits or
        more, exactly. The product of a layer with real weights or real inputs is rounded in a way
        that depends on all this: such results agree within rounding, and a sign behind them may
        differ where one is that close to its threshold. What is exact in the model, products of
        signs, is exact here. On a CPU with the extra ``cpu``, uint8 pixels are multiplied exactly
        with the same weights as on Hopper.
        """
        usual = self._forward.usual
        if usual is not None:
            logits = usual(x)
            if logits is not None:
                return logits
        return like(self._forward(x), x)

    def predict_proba(self, x: Any) -> Any:
        """Return the probabilities of the classes: the softmax of the logits, of their shape."""
        logits = self._forward(x)
        xp = array_module(logits)
        shifted = xp.exp(logits - logits.max(axis=-1, keepdims=True))
        return like(shifted / shifted.sum(axis=-1, keepdims=True), x)

    def predict(self, x: Any) -> Any:
        """Return the most probable class of each input.

        Returns
        -------
        array, shape (batch,), or one value for one input
            Elements of `classes`: numbers stay on the device of `x`, names are a NumPy array.
        """
        best = self._forward(x).argmax(axis=-1)
        if self.classes.dtype.kind in "iu":
            xp = array_module(best)
            return like(xp.asarray(self.classes)[best], x)
        return self.classes[best.get() if self.device.kind == "cuda" else best]

    def evaluate(self, images: Any, labels: Any) -> ClassificationReport:
        """Compare predictions with the true classes.

        Parameters
        ----------
        images : array_like, shape (examples, ...)
            As for a call; they may be on another device and are taken to the network's in parts.
        labels : array_like, shape (examples,)
            The true class of each, an element of `classes`.

        Returns
        -------
        ClassificationReport
            Accuracy, loss, precision and recall of each class, confusion matrix, mistakes; print
            it to see them.

        Raises
        ------
        ValueError
            If there are not as many labels as images, or a label is none of the classes.
        """
        return evaluate(self, images, labels)

    # Looking at it -----------------------------------------------------------------------------

    def summary(self) -> nn.Summary:
        """Return a table of the layers: shapes, bits, bytes, operations; print it to see it."""
        return nn.Summary(tuple(layer.row() for layer in self.layers))

    @property
    def nbytes(self) -> int:
        """Bytes of weights, thresholds and steps, without padding."""
        return self.summary().total("nbytes")

    def __repr__(self) -> str:
        sizes = "-".join(str(n) for n in (self.inputs.features, *(y.units for y in self.layers)))
        return f"PackedNetwork({sizes}, {self.nbytes:,} bytes, on {self.device})"
