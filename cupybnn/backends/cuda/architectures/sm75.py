"""XOR on tensor cores, from Turing on. Hopper and later emulate it, slower than popcounts."""

from __future__ import annotations

from cupybnn.backends.cuda.configs import Config, Problem

CAPABILITIES = range(75, 1000)
TARGET = None


def config() -> Config:
    """Return the only configuration."""
    return Config("sm75", (), 64, 64, 128)


def choose(problem: Problem) -> Config:
    """Return the configuration for a problem."""
    return config()


def candidates(problem: Problem) -> list[Config]:
    """Return the configurations worth measuring for a problem."""
    return [config()]
