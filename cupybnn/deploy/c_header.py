"""A packed network as a C99 header: tables of bits and thresholds, and what walks over them."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterator
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np

import cupybnn
from cupybnn.deploy.c_layer import NOT_OURS, LayerCode, described, function, literal, not_ours
from cupybnn.deploy.layers import Step
from cupybnn.deploy.plan import Planned, check_pixels, plan, scale_factor
from cupybnn.errors import SettingError
from cupybnn.files import atomic_write

if TYPE_CHECKING:
    from cupybnn.deploy.network import PackedNetwork

__all__ = ["header", "write"]

_LONGEST_NAME = 60
_EXACT = 1 << 20  # integers up to here stay apart when float32 multiplies them a few times


def write(path: str | os.PathLike[str], net: PackedNetwork, *, name: str = "net") -> int:
    """Write a network as a C header, and return how many bytes its tables have.

    See `PackedNetwork.to_c`.
    """
    text, table_bytes = header(net, name=name)
    with atomic_write(path) as out:
        out.write(text.encode("ascii"))
    return table_bytes


def header(net: PackedNetwork, *, name: str = "net") -> tuple[str, int]:
    """Return the text of a network's C header, and how many bytes its tables have."""
    if not re.fullmatch(rf"[A-Za-z][A-Za-z0-9_]{{0,{_LONGEST_NAME - 1}}}", name):
        raise SettingError(
            f"The 'name' must be a letter and then letters, digits and underscores, "
            f"{_LONGEST_NAME} at most, because names in C begin with it; got {name!r}."
        )
    check_pixels(net.inputs)
    writer = _Writer(net.to("cpu"))
    text = "\n".join(writer.parts())
    text = re.sub(r"\bNET_", f"{name.upper()}_", re.sub(r"\bnet_", f"{name}_", text))
    return text.replace(NOT_OURS, ""), writer.table_bytes


class _Writer:
    """Writes the parts of a header."""

    def __init__(self, net: PackedNetwork) -> None:
        self._net = net
        self._layers = plan(net.layers, net.inputs, pixels=True)
        self._late: tuple[Step, ...] = ()
        last = self._layers[-1]
        if last.integer and _keep_order(last):
            # The greatest result is known without them, in integers.
            self._late = last.steps
        scale = scale_factor(net.inputs)
        self._code = []
        for number, layer in enumerate(self._layers, 1):
            steps = () if self._late and layer is last else layer.steps
            self._code.append(LayerCode(number, layer, steps, scale, whole=layer is last))
        self._results = self._code[-1].result
        self._logits = "float" if self._late else self._results
        self.table_bytes = sum(code.table_bytes for code in self._code)

    def parts(self) -> Iterator[str]:
        """Yield the parts, each without a line end."""
        tables = "\n".join(code.text for code in self._code)
        yield self._comment()
        yield "#ifndef NET_H_INCLUDED\n#define NET_H_INCLUDED\n\n#include <stdint.h>"
        yield (
            f"\n#define NET_FEATURES {self._net.inputs.features}\n"
            f"#define NET_CLASSES {len(self._net.classes)}\n"
        )
        yield _helpers("bits.h")
        if not all(layer.integer for layer in self._layers):
            yield _helpers("numbers.h")
        yield tables
        yield self._functions()
        yield "#endif\n"

    def _comment(self) -> str:
        spec = self._net.inputs
        assert spec.pixel_max is not None
        sizes = "-".join(str(n) for n in (spec.features, *(layer.units for layer in self._layers)))
        image = ""
        if spec.image_shape is not None:
            image = f", an image of {' x '.join(map(str, spec.image_shape))} row by row"
        span = f" from 0 to {spec.pixel_max:g}"
        if spec.pixel_max == 1:  # as of scikit-learn's features, which need not be pixels
            span = ", whole numbers that are not scaled"
        notes = [
            f"pixels: {spec.features} bytes{span}{image}.",
            f"Layers: {'; '.join(map(described, self._layers))}.",
        ]
        if self._layers[0].integer and np.frexp(spec.pixel_max)[0] != 0.5:  # no power of two
            notes.append(
                "The first layer sums whole pixels, exactly. Programs that add scaled pixels in "
                "floating point may find another sign where a sum is within a rounding error of "
                "its threshold."
            )
        if self._logits == "float":
            notes.append(
                "For logits that are the same to the last bit on every machine, compile without "
                "fused multiply-add: -ffp-contract=off."
            )
        lines = [
            *_wrapped(
                f"A trained network, {sizes}, written by cupybnn {cupybnn.__version__}. C99, no "
                f"library, no memory but the stack; {self.table_bytes:,} bytes of tables."
            ),
            "",
            "Position of the most probable class, a number for each class, and a class's name:",
            "    int net_predict(const uint8_t *pixels)",
            f"    void net_logits(const uint8_t *pixels, {self._logits} *logits)",
            "    const char *net_class_name(int position)",
        ]
        for note in notes:
            lines += ["", *_wrapped(note)]
        return "/*\n" + "".join(f" * {line}".rstrip() + "\n" for line in lines) + " */"

    def _functions(self) -> str:
        """Return the functions for users."""
        kind, last, x, body = self._results, len(self._code), "pixels", []
        for i, code in enumerate(self._code[:-1], 1):
            body += [f"{code.result} x{i}[{code.result_size}];", f"net_layer{i}({x}, x{i});"]
            x = f"x{i}"
        body.append(f"net_layer{last}({x}, y);")
        texts = [function(f"void net_results(const uint8_t *pixels, {kind} *y)", body)]

        body = ["net_results(pixels, logits);"]
        if kind != self._logits:
            body = [
                f"{kind} y[NET_CLASSES];",
                "net_results(pixels, y);",
                "for (int i = 0; i < NET_CLASSES; ++i) {",
                "    logits[i] = (float)y[i];",
                *(f"    logits[i] *= {literal(step.by[0])};" for step in self._late),
                "}",
            ]
        texts.append(
            function(f"void net_logits(const uint8_t *pixels, {self._logits} *logits)", body)
        )
        body = [
            f"{kind} y[NET_CLASSES];",
            "int best = 0;",
            "net_results(pixels, y);",
            "for (int i = 1; i < NET_CLASSES; ++i) {",
            "    if (y[i] > y[best]) {",
            "        best = i;",
            "    }",
            "}",
            "return best;",
        ]
        texts.append(function("int net_predict(const uint8_t *pixels)", body))
        names = ", ".join(_string(str(name)) for name in self._net.classes)
        body = [
            f"static const char *const names[NET_CLASSES] = {{{names}}};",
            "return names[position];",
        ]
        texts.append(function("const char *net_class_name(int position)", body))
        return "\n".join(texts)


def _helpers(name: str) -> str:
    return resources.files("cupybnn.deploy").joinpath("c", name).read_text(encoding="ascii")


def _keep_order(layer: Planned) -> bool:
    """Whether the steps of a layer keep the order of its integer results, and make no two equal."""

    def keeps(step: Step) -> bool:
        if step.kind != "multiply":
            return False
        by = np.asarray(step.by)
        return bool((by == by[0]).all() and 1e-9 < by[0] < 1e9)

    return -layer.least < _EXACT and all(map(keeps, layer.steps))


def _string(text: str) -> str:
    """Return a text as a C string, with what is not plain in it as octal numbers."""
    plain = rb"[A-Za-z0-9 _.,:;()+*=<>@#$%&'/-]"
    octets = text.encode("utf-8", "replace")
    pieces = (octets[i : i + 1] for i in range(len(octets)))
    quoted = "".join(x.decode() if re.match(plain, x) else f"\\{x[0]:03o}" for x in pieces)
    return f'"{not_ours(quoted)}"'


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 96, break_long_words=False, break_on_hyphens=False)
