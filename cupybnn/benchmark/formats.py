"""The formats of the records of ``cupybnn bench``, ``bench train`` and ``bench infer``."""

from __future__ import annotations

from typing import Any

from cupybnn.errors import SettingError
from cupybnn.schema import (
    Check,
    SchemaError,
    anything,
    boolean,
    integer,
    list_of,
    mapping_of,
    nullable,
    number,
    one_of,
    record,
    text,
)

__all__ = ["FORMAT", "RULES", "RecordError", "kind_of"]

FORMAT = 1


class RecordError(SettingError):
    """A file is not a record of ``cupybnn bench``, or has values that no benchmark can write."""


def kind_of(record: dict[str, Any]) -> str:
    """Return the kind of a record: "product", "train", "scaling" or "infer"."""
    return str(record.get("kind", "product"))  # missing in the first records


_name = text(most=500)
_size = integer(1, 2**31)
_seconds = number(1e-12, 1e9)
_rate = number(1e-12, 1e18)
_share = nullable(number(0, 1e9))
_ratio = number(1e-9, 1e9)


def _figures(**fields: Check) -> Check:
    return record(fields, others=True)


def _unless_failed(*names: str) -> Check:
    """Return a check that a row has all of `names`, unless it has an error."""

    def check(row: dict[str, Any], place: str) -> None:
        missing = [name for name in names if name not in row]
        if missing and "error" not in row:
            raise SchemaError(f"{place} lacks {', '.join(missing)}")

    return check


def _row(required: dict[str, Check], figures: dict[str, Check], more: dict[str, Check]) -> Check:
    """Return a check for a row: its required fields, and either all figures or an error.

    It may have both figures and an error, if the result is wrong.
    """
    optional = {"error": text(), **figures, **more}
    return record(required, optional, others=True, also=_unless_failed(*figures))


# --- products

_times = _figures(median=_seconds, min=_seconds, p10=_seconds, p90=_seconds)


def _timed(row: dict[str, Any], place: str) -> None:
    _unless_failed("throughput", "issued", "tops")(row, place)
    if "throughput" in row and ("issued" not in row or "tops" not in row):
        raise SchemaError(f"{place} must have throughput, issued and tops together")


_method = record(
    {"method": _name, "ours": boolean},
    {
        "throughput": _times,
        "issued": _figures(median=_seconds),
        "tops": _rate,
        "of_peak": _share,
        "of_memory": _share,
        "speedup_throughput": _ratio,
        "checked": boolean,
        "error": text(),
    },
    others=True,
    also=_timed,
)
_product = record(
    {"group": _name, "m": _size, "n": _size, "k": _size, "note": _name, "rows": list_of(_method)},
    others=True,
)
_single = _figures(mean=_seconds, std=number(0, 1e9), median=_seconds)
_original = _row(
    {"n": _size, "runs": _size},
    {
        "matmul": _single,
        "xnor_gemm": _single,
        "speedup_average": _ratio,
        "speedup_median": _ratio,
    },
    {},
)
_packing = _row(
    {"dtype": _name, "packed_along": _name, "size": _size},
    {"median": _seconds, "bytes_per_second": _rate},
    {"of_copy": _share},
)
_host = _row({"call": _name}, {"median": _seconds, "min": _seconds}, {})
_layer = _row(
    {"size": _size, "layer": _name, "how": one_of("eager", "graph"), "dtype": _name},
    {"call": _figures(median=_seconds), "device": _figures(median=_seconds)},
    {"over_linear": _ratio, "checked": boolean},
)
_start = _row({"cache": _name}, {"first_call": _seconds, "second_call": _seconds}, {})

# --- training

_step = _row(
    {
        "library": one_of("cupybnn", "PyTorch"),
        "how": _name,
        "product": one_of("xnor", "matmul", "4 planes", "1 plane"),
        "precision": _name,
    },
    {
        "step": _figures(median=_seconds, min=_seconds, p90=_seconds),
        "examples_per_second": _figures(median=_rate, average=_rate),
        "memory_bytes": nullable(integer()),
        "pool_bytes": nullable(integer()),
    },
    {
        "kernels": mapping_of(_seconds),
        "others_processors": nullable(number(0, 1e6)),
        "failed": boolean,
    },
)


def _best_are_rows(size: dict[str, Any], place: str) -> None:
    for kind, index in size["best"].items():
        if index >= len(size["rows"]) or "examples_per_second" not in size["rows"][index]:
            raise SchemaError(f"{place}.best.{kind} must be the number of a row with figures")


_training_size = record(
    {
        "hidden": _size,
        "batch": _size,
        "rows": list_of(_step),
        "best": record({}, {name: integer() for name in ("xnor", "matmul", "PyTorch")}),
        "xnor_over_matmul": mapping_of(_ratio),
        "over_pytorch": nullable(_ratio),
        "memory_of_pytorch": nullable(_ratio),
    },
    {"disturbed": boolean, "rounded_over_pytorch": mapping_of(_ratio)},
    others=True,
    also=_best_are_rows,
)

# --- inference

_median = _figures(median=_seconds, min=_seconds, p90=_seconds)
_calls = _row(
    {"library": one_of("cupybnn", "PyTorch", "onnxruntime"), "how": _name, "precision": _name},
    {
        "call": _median,
        "examples_per_second": _rate,
        "equal": boolean,
        "same_classes": number(0, 1),
    },
    {
        "device": _median,
        "others_processors": nullable(number(0, 1e6)),
        "failed": boolean,
        "binary_first": boolean,
    },
)


_inference_size = record(
    {
        "hidden": _size,
        "batch": _size,
        "rows": list_of(_calls),
        "disturbed": boolean,
        "over": mapping_of(_ratio),
    },
    {"over_binary_first": mapping_of(_ratio)},
    others=True,
)

# --- scaling

_scaling = _row(
    {
        "library": one_of("cupybnn", "PyTorch"),
        "kind": one_of("weak", "strong"),
        "ranks": _size,
        "hidden": _size,
        "size": _size,
        "batch": _size,
        "precision": _name,
    },
    {
        "how": _name,
        "step": _figures(median=_seconds, min=_seconds, p90=_seconds),
        "alone": _seconds,
        "exposed": number(-1e9, 1e9),
        "examples_per_second": _rate,
        "state_bytes": integer(),
    },
    {
        "alone_how": _name,
        "speedup": _ratio,
        "efficiency": _ratio,
        "over_pytorch": _ratio,
        "failed": boolean,
    },
)

# --- all

_version = nullable(_name)
_COMMON = {
    "date": text(r"\d{4}-\d\d-\d\dT[-+:.\dZ]*"),
    "machine": record(
        {
            "cupybnn": _name,
            "python": _name,
            "cpu": _name,
            "cpus": _size,
            "numpy": _version,
            "torch": _version,
            "cuda": record(
                {"cupy": _version, "driver": _version}, {"runtime_cuda": _version}, others=True
            ),
        },
        others=True,
    ),
    "gpu": nullable(_figures(name=_name, arch=_name, multiprocessors=_size)),
    "notes": list_of(text()),
}
#: The check for each kind of record.
RULES = {
    "product": record(
        {**_COMMON, "format": one_of(FORMAT), "products": list_of(_product)},
        {
            "kind": one_of("product"),
            "copy": _figures(bytes_per_second=_rate),
            "peak_operations_per_second": nullable(_rate),
            "original": list_of(_original),
            "packing": list_of(_packing, least=1),
            "host": list_of(_host),
            "torch": list_of(_layer),
            "first_call": list_of(_start),
            "device": _name,
            "quick": boolean,
            "seconds": number(0, 1e9),
            "method": anything,
        },
        others=True,
    ),
    "train": record(
        {
            **_COMMON,
            "format": one_of(FORMAT),
            "kind": one_of("train"),
            "method": mapping_of(text()),
            "sizes": list_of(_training_size),
        },
        others=True,
    ),
    "scaling": record(
        {
            **_COMMON,
            "format": one_of(FORMAT),
            "kind": one_of("scaling"),
            "method": mapping_of(text()),
            "counts": list_of(_size, least=1),
            "rows": list_of(_scaling),
        },
        others=True,
    ),
    "infer": record(
        {
            **_COMMON,
            "format": one_of(FORMAT),
            "kind": one_of("infer"),
            "method": mapping_of(text()),
            "sizes": list_of(_inference_size),
        },
        others=True,
    ),
}
