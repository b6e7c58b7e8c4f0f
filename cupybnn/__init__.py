"""1-bit matrix multiplication and binarized neural networks for NumPy and CuPy."""

__version__ = "0.1.0"
