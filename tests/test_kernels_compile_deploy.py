"""The kernels of a packed network compile for every architecture and keep to their registers."""

from __future__ import annotations

import pytest
from kernel_compiler import compile_cubin
from test_kernels_compile import ARCHITECTURES, capability, compile_all, most_shared_bytes, require

from cupybnn.backends.cuda.packed_network import Team

pytestmark = pytest.mark.slow

TEAMS = [Team(8, 1, 1), Team(16, 1, 1), Team(32, 1, 1, 1 << 14), Team(32, 1, 1), Team(8, 16, 16)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_kernels_compile(arch):
    require(arch)
    compile_all("smxx_threshold_pack", arch, [{}])
    if capability(arch) < 80:
        return
    teams = [t for t in TEAMS if t.shared <= most_shared_bytes(arch)]
    # The team that needs most registers is enough elsewhere: each takes seconds.
    teams = teams if arch == "sm_90a" else [t for t in teams if t.cluster == 1][-1:]
    variants = [{**dict(t.defines), "PIXELS": int(t.rows != 16)} for t in teams]
    compile_all("sm80_packed_network", arch, variants, asked=[t.shared for t in teams])


def test_a_team_is_a_cluster_or_a_grid():
    require("sm_90a")
    defines = {"ROWS": 8, "CLUSTER": 8, "COOPERATIVE": 1, "HELD": 1 << 14, "PIXELS": 0}
    with pytest.raises(RuntimeError, match="either a cluster or a cooperative grid is a team"):
        compile_cubin("sm80_packed_network", "sm_90a", defines)
