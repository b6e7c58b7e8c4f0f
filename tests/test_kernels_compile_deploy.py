"""The kernels of a packed network compile for every architecture and keep to their registers."""

from __future__ import annotations

import pytest
from kernel_compiler import compile_cubin
from test_kernels_compile import (
    ALIKE,
    ARCHITECTURES,
    capability,
    compile_all,
    most_shared_bytes,
    require,
)

from cupybnn.backends.cuda.architectures import sm90
from cupybnn.backends.cuda.byte_product import pixel_config
from cupybnn.backends.cuda.configs import Problem
from cupybnn.backends.cuda.packed_network import Team
from cupybnn.backends.cuda.resident import Shape

pytestmark = pytest.mark.slow

TEAMS = [Team(8, 1, 1), Team(16, 1, 1), Team(32, 1, 1, 1 << 14), Team(32, 1, 1), Team(8, 16, 16)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_kernels_compile(arch):
    require(arch)
    for source in ("smxx_threshold_pack", "smxx_byte_lines", "smxx_plane_sum"):
        compile_all(source, arch, [{}])
    if capability(arch) < 80:
        return
    teams = [t for t in TEAMS if t.shared <= most_shared_bytes(arch)]
    if arch != "sm_90a":
        # Each takes seconds: the team that needs most registers on one architecture, and one of few
        # rows on the others, whose code is the same.
        largest = [t for t in teams if t.cluster == 1][-1:]
        teams = largest if arch == ALIKE[0] else [Team(8, 1, 1, 1 << 14)]
    variants = [{**dict(t.defines), "PIXELS": int(t.rows != 16)} for t in teams]
    compile_all("sm80_packed_network", arch, variants, asked=[t.shared for t in teams])


def test_the_kernels_for_pixels_compile():
    require("sm_90a")
    problems = [Problem(m=m, n=4096, k=784, packed=True, capability=90, multiprocessors=132)
                for m in (30, 100, 300, 400, 1000, 70_000)]  # fmt: skip
    chosen = list(dict.fromkeys((pixel_config(p, d), d) for p in problems for d in (1, 3)))
    assert len({(c.tile_m, c.tile_n) for c, _ in chosen}) >= 4
    products = [{**dict(c.defines), "OUTPUT": 4, "SCALED": 0, "DIGITS": d} for c, d in chosen]
    asked = [c.shared for c, _ in chosen]
    compile_all("sm90_xnor_gemm", "sm_90a", products, asked=asked)
    teams = [(8, 16), (8, 1), (16, 1), (32, 1), (64, 1)]
    # Three digits need more registers than one.
    kinds = [(*team, 3) for team in teams] + [(*team, 1) for team in (teams[0], teams[-1])]
    variants = [{"ROWS": r, "CLUSTER": c, "DIGITS": d} for r, c, d in kinds]
    compile_all("sm90_pixel_network", "sm_90a", variants)


def test_layers_that_stay_in_shared_memory_compile():
    require("sm_90a")
    limit = most_shared_bytes("sm_90a")
    shapes = [Shape(4096, 784, 1), Shape(4096, 784, 3), Shape(4096, 512), Shape(512, 64),
              Shape(10, 512, end=True)]  # fmt: skip
    variants, asked = [], []
    for shape in shapes:
        for units in shape.strips:
            if stages := shape.stages(units, limit):
                variants.append(dict(shape.defines(units, stages)))
                asked.append(shape.shared_bytes(units, stages))
    assert len(variants) >= 12
    compile_all("sm90_resident_gemm", "sm_90a", variants, asked=asked)


def test_bytes_need_a_packed_result():
    require("sm_90a")
    defines = {**dict(sm90.config(1, 128, 6).defines), "OUTPUT": 0, "SCALED": 0, "DIGITS": 1}
    with pytest.raises(RuntimeError, match="products of bytes have packed results"):
        compile_cubin("sm90_xnor_gemm", "sm_90a", defines)


def test_a_team_is_a_cluster_or_a_grid():
    require("sm_90a")
    defines = {"ROWS": 8, "CLUSTER": 8, "COOPERATIVE": 1, "HELD": 1 << 14, "PIXELS": 0}
    with pytest.raises(RuntimeError, match="either a cluster or a cooperative grid is a team"):
        compile_cubin("sm80_packed_network", "sm_90a", defines)
