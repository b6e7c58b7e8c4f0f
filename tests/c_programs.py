"""Small C programs around an exported header: compiled with every warning as an error, and run."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

STRICT = ("-std=c99", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror")

#: Reads images and writes, for each, its logits as they lie in memory and its class as an int32.
PROGRAM = """
#include "net.h"
#include "net.h"
#include <stdio.h>

int main(void)
{
    uint8_t pixels[NET_FEATURES];
    LOGIT logits[NET_CLASSES];
    while (fread(pixels, 1, sizeof pixels, stdin) == sizeof pixels) {
        int32_t best = net_predict(pixels);
        net_logits(pixels, logits);
        fwrite(logits, sizeof logits, 1, stdout);
        fwrite(&best, sizeof best, 1, stdout);
    }
    return 0;
}
"""

#: The same without a C library, by Linux's system calls for 32-bit x86; classes alone.
PROGRAM_I386 = """
#include "net.h"

static long call(long number, long file, void *at, long size)
{
    long result;
    __asm__ volatile("int $0x80"
                     : "=a"(result)
                     : "a"(number), "b"(file), "c"(at), "d"(size)
                     : "memory");
    return result;
}

void *memset(void *to, int byte, unsigned size);
void *memset(void *to, int byte, unsigned size)
{
    volatile unsigned char *at = to;
    while (size--) {
        *at++ = (unsigned char)byte;
    }
    return to;
}

__attribute__((force_align_arg_pointer)) void _start(void);
void _start(void)
{
    static uint8_t pixels[NET_FEATURES];
    long have = 0, got;
    while ((got = call(3, 0, pixels + have, NET_FEATURES - have)) > 0) {
        have += got;
        if (have == NET_FEATURES) {
            int32_t best = sizeof(long) == 4 ? net_predict(pixels) : -1;
            call(4, 1, &best, sizeof best);
            have = 0;
        }
    }
    call(1, 0, 0, 0);
    __builtin_unreachable();
}
"""


@functools.cache
def compiler() -> tuple[str, ...]:
    """Return the command of the system's C compiler, or of ziglang's from PyPI."""
    for name in ("gcc", "clang", "cc"):
        if path := shutil.which(name):
            return (path,)
    if importlib.util.find_spec("ziglang") is not None:
        return (sys.executable, "-m", "ziglang", "cc")
    pytest.skip("there is no C compiler: neither gcc, clang nor cc, nor the package ziglang")


def compiled(folder: Path, program: str, *options: str, command: tuple[str, ...] = ()) -> Path:
    """Compile a program with the header ``net.h`` in a folder."""
    (folder / "main.c").write_text(program)
    made = folder / "program"
    done = subprocess.run(
        [*(command or compiler()), *STRICT, *options, "main.c", "-o", str(made)],
        cwd=folder, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return made


def run(program: Path, pixels: np.ndarray, logits: type, classes: int) -> tuple[np.ndarray, ...]:
    """Return the logits and the classes that `PROGRAM` finds."""
    done = subprocess.run([program], input=pixels.tobytes(), capture_output=True, check=True)
    rows = np.frombuffer(done.stdout, [("logits", logits, classes), ("best", np.int32)])
    assert len(rows) == len(pixels)
    return rows["logits"], rows["best"]


def network_of(net, folder: Path, *options: str, **arguments) -> Path:
    """Write a network's header into a folder and compile `PROGRAM` with it."""
    net.to_c(folder / "net.h", **arguments)
    whole = "int32_t *logits" in (folder / "net.h").read_text()
    return compiled(folder, PROGRAM, f"-DLOGIT={'int32_t' if whole else 'float'}", *options)
