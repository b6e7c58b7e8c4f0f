"""A scikit-learn estimator on binarized networks."""

from cupybnn.estimator.classifier import BinaryMLPClassifier

__all__ = ["BinaryMLPClassifier"]
