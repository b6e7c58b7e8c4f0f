"""Which kernel a shape gets, as data: no GPU is needed to look it up."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys

import pytest
import test_cuda_kernels

from cupybnn.backends.cuda import architectures, configs, dispatch, tuning
from cupybnn.backends.cuda.architectures import kernels_for, sm90
from cupybnn.backends.cuda.configs import Problem
from cupybnn.backends.cuda.dispatch import choose, force_kernel
from cupybnn.backends.cuda.sources import kernels_dir
from cupybnn.benchmark import tuning as benchmark_tuning

SQUARES = [128, 512, 1024, 2048, 4096, 8192, 16384, 32768]
SHAPES = [
    *((n, n, n) for n in SQUARES),
    (1, 16384, 16384), (16, 16384, 16384), (64, 64, 70_000), (16384, 10, 784), (300, 200, 65_536),
    (8192, 8192, 1_000_000), (1, 1, 1), (4096, 4096, 100),
]  # fmt: skip


def problem(capability, m, n, k, **kind):
    return Problem(
        **{"m": m, "n": n, "k": k, "multiprocessors": 132, **kind}, capability=capability
    )


def picked(capability, m, n, k, *, tuned=None, **kind):
    return choose(problem(capability, m, n, k, **kind), tuned or {})


@pytest.mark.parametrize(("packed", "scaled"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_built_in_choice_keeps_the_kernels_rules(shape, packed, scaled):
    m, n, k = shape
    chunks = -(-k // 1024)
    for capability in (61, 70, 75, 80, 86, 89, 90, 100, 120, 130):
        config = picked(capability, m, n, k, packed=packed, scaled=scaled)
        assert capability in architectures.KERNELS[config.kernel].CAPABILITIES
        limit = 99 if capability in (86, 89) or capability >= 120 else 163
        limit = 227 if capability == 90 else limit
        assert config.shared_bytes(scaled) <= limit * 1024
        assert config.split_k <= chunks, "each block that splits K must have a chunk"
        assert not config.deferred or 4 <= chunks <= 63
        assert not (packed and config.swap)
        assert not packed or config.tile_n % 32 == 0
        assert config.blocks(config.tiles(m, n, 1), config.parts_of(chunks), 132) > 0


@pytest.mark.parametrize("packed", [False, True])
def test_large_products_are_deferred_unless_wider_tiles_fill_the_gpu_better(packed):
    for n, k in ((4096, 4096), (8192, 8192), (16384, 16384), (8192, 63 * 1024)):
        assert picked(90, n, n, k, packed=packed).deferred
    # One round of 256 x 192 tiles, or two of half as many results.
    filled = picked(90, 3072, 2112, 16384, packed=packed)
    assert (filled.tile_m, filled.tile_n, filled.deferred) == (256, 192, False)
    # Counts would exceed 16 bits.
    assert not picked(90, 16384, 16384, 63 * 1024 + 1, packed=packed).deferred


def test_an_architecture_gets_its_own_kernel():
    kernels = {c: picked(c, 4096, 4096, 4096).kernel for c in (60, 75, 80, 86, 90, 100, 120, 999)}
    assert kernels == {
        60: "smxx", 75: "sm75", 80: "sm80", 86: "sm80", 90: "sm90", 100: "sm80", 120: "sm80",
        999: "sm80",
    }  # fmt: skip
    assert kernels_for(90) == ["sm90", "sm80", "sm75", "smxx"]


def test_every_candidate_fits_the_device():
    for capability, kernel, limit in ((80, "sm80", 163), (86, "sm80", 99), (90, "sm90", 227)):
        for m, n, k in SHAPES:
            for packed in (False, True):
                wanted = problem(capability, m, n, k, packed=packed)
                for config in dispatch.candidates(kernel, wanted):
                    assert config.shared_bytes(False) <= limit * 1024
                    chunks = -(-k // 1024)
                    assert config.split_k * config.parts_of(chunks) <= chunks
                    assert not (packed and config.swap)


def test_every_candidate_is_among_those_that_the_gpu_tests_run():
    tested = {(c.kernel, c.defines, c.swap) for c in test_cuda_kernels.reachable()}
    for capability, kernel in ((75, "sm75"), (80, "sm80"), (86, "sm80"), (90, "sm90")):
        for m, n, k in (*SHAPES, *(shape[:3] for shape in benchmark_tuning.SHAPES)):
            for packed in (False, True):
                wanted = problem(capability, m, n, k, packed=packed)
                chosen = dispatch.candidates(kernel, wanted)
                chosen.append(dispatch.builtin_config(kernel, wanted))
                assert {(c.kernel, c.defines, c.swap) for c in chosen} <= tested, (m, n, k, packed)


def test_forcing_a_kernel_or_a_configuration():
    mine = sm90.config(1, 128, 6)
    with force_kernel("smxx"):
        assert picked(90, 4096, 4096, 4096).kernel == "smxx"
        with force_kernel(mine):
            assert picked(90, 4096, 4096, 4096) is mine
        assert picked(90, 4096, 4096, 4096).kernel == "smxx"
    assert picked(90, 4096, 4096, 4096).kernel == "sm90"
    with pytest.raises(ValueError, match="must be one of sm90, sm80, sm75, smxx; got 'sm70'"):
        force_kernel("sm70").__enter__()
    with force_kernel("sm90"), pytest.raises(ValueError, match=r"'sm90' does not run on .* 8\.6"):
        picked(86, 10, 10, 10)


def test_the_choice_is_printed_in_debug_mode(capsys, monkeypatch):
    monkeypatch.setenv("CUPYBNN_DEBUG", "1")
    picked(90, 8192, 8192, 8192, packed=True)
    told = capsys.readouterr().err
    assert told.startswith("cupybnn: 1 x (8192, 8192) @ (8192, 8192) packed: sm90 128x256 ")
    assert told.endswith(" deferred, 4 stages\n")


class TestTunedTable:
    @pytest.fixture(autouse=True)
    def table(self, tmp_path, monkeypatch):
        path = tmp_path / "cache" / "tuned.json"
        monkeypatch.setattr(tuning, "table_path", lambda device: path)
        tuning.winners.cache_clear()
        yield path
        tuning.winners.cache_clear()

    def test_winners_are_kept_and_used(self):
        assert tuning.winners(0) == {}
        wanted = problem(90, 8192, 8192, 8192)
        best, key = dispatch.candidates("sm90", wanted)[5], wanted.key
        tuning.save(0, {key: best})
        assert tuning.winners(0) == {key: best}
        assert picked(90, 8192, 8192, 8192, tuned=tuning.winners(0)) == best
        assert picked(90, 8192, 8192, 8192, packed=True, tuned=tuning.winners(0)) != best
        with force_kernel("sm80"):
            assert picked(90, 8192, 8192, 8192, tuned=tuning.winners(0)).kernel == "sm80"

    def test_an_unmeasured_configuration_is_not_launched(self, table):
        wanted = problem(90, 8192, 8192, 8192)
        fields = dataclasses.asdict(sm90.config(1, 256, 4))
        fields["tile_m"] = 64  # not what its defines compile to
        table.parent.mkdir()
        table.write_text(json.dumps({wanted.key: fields}))
        config = picked(90, 8192, 8192, 8192, tuned=tuning.winners(0))
        assert config == dispatch.builtin_config("sm90", wanted)


def test_the_digest_changes_with_every_source(tmp_path, monkeypatch):
    """So that a table that was measured with other kernels is never read."""
    folder = tmp_path / "kernels"
    shutil.copytree(kernels_dir(), folder)
    monkeypatch.setattr(tuning, "kernels_dir", lambda: folder)
    seen = {tuning.sources_digest.__wrapped__()}
    for path in sorted(folder.rglob("*.cu*")):
        path.write_bytes(path.read_bytes() + b"// changed")
        seen.add(tuning.sources_digest.__wrapped__())
    assert len(seen) == 1 + len(list(folder.rglob("*.cu"))) + len(list(folder.rglob("*.cuh")))
    for module in (configs, sm90):
        changed = tmp_path / "changed" / f"{module.__name__}.py"
        changed.parent.mkdir(exist_ok=True)
        changed.write_text("# other configurations")
        with monkeypatch.context() as patch:
            if module is sm90:
                patch.setattr(architectures, "__file__", str(changed))
            else:
                patch.setattr(module, "__file__", str(changed))
            digest = tuning.sources_digest.__wrapped__()
        assert digest not in seen
        seen.add(digest)


def test_small_products_fill_the_gpu_that_they_run_on():
    def blocks(m, n, k, multiprocessors=132):
        config = picked(90, m, n, k, multiprocessors=multiprocessors)
        tiles = config.tiles(n, m, 1) if config.swap else config.tiles(m, n, 1)
        return config.blocks(tiles, config.parts_of(-(-k // 1024)), multiprocessors)

    whole = picked(90, 1536, 1408, 8192)
    assert whole == sm90.LARGE  # 132 tiles
    assert picked(90, 1536, 1408, 8192, multiprocessors=60) != whole
    for shape in ((128, 128, 1 << 20), (256, 256, 65_536), (100, 4096, 4096), (1, 16384, 16384)):
        assert 64 <= blocks(*shape) <= 132, shape
    for count in (32, 64):
        assert blocks(64, 64, 1 << 20, count) <= count


def test_a_part_of_k_fits_counts_of_16_bits():
    for chunks in (8, 63, 64, 500, 2**21):
        for config in (sm90.SPLIT, sm90.LONG, dataclasses.replace(sm90.LONG, parts=100)):
            parts = config.parts_of(chunks)
            most = -(-chunks // (config.split_k * parts))
            assert most * 1024 < 2**16
            assert config.split_k * parts <= chunks, "each part has a chunk"
            assert config.sums_bytes(3, parts) >= (parts > 1) * 12 * config.tile_m * config.tile_n
    assert sm90.LARGE.parts_of(2**21) == 1


def test_an_architecture_is_one_module(tmp_path, monkeypatch):
    """A module that is put into the folder is found, and first where it is the newest."""
    (tmp_path / "sm990.py").write_text(
        "from cupybnn.backends.cuda.architectures.smxx import *\n"
        "CAPABILITIES, TARGET = range(990, 1000), 'sm_990a'\n"
    )
    monkeypatch.setattr(architectures, "__path__", [*architectures.__path__, str(tmp_path)])
    found = architectures._discover()
    monkeypatch.delitem(sys.modules, f"{architectures.__name__}.sm990")
    monkeypatch.setattr(architectures, "KERNELS", found)
    assert list(found) == ["sm990", "sm90", "sm80", "sm75", "smxx"]
    assert kernels_for(991) == ["sm990", "sm80", "sm75", "smxx"]
    assert architectures.compiler_target("sm990_xnor_gemm") == "sm_990a"
    assert architectures.compiler_target("sm90_sign_gemm") == "sm_90a"
    assert architectures.compiler_target("smxx_pack") is None
