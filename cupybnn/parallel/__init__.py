"""The processes that train together: none, or connected by NCCL, MPI or files."""

from cupybnn.parallel.joining import connect
from cupybnn.parallel.launch import Launch, detect
from cupybnn.parallel.ranks import Alone, Pending, Ranks

__all__ = ["Alone", "Launch", "Pending", "Ranks", "connect", "detect"]
