"""How ranks find each other in a folder, and how they notice a loss."""

from __future__ import annotations

import contextlib
import os
import threading
import time

import pytest
from ranks import in_threads, together
from test_parallel_ranks import check_exchanges

from cupybnn import parallel
from cupybnn.errors import RankError
from cupybnn.parallel.locks import LAUNCHER, WAITING, hold, is_held, release, remove_abandoned
from cupybnn.parallel.meeting import Meeting


class TestMeeting:
    def test_a_rank_that_does_not_come(self, tmp_path):
        began = time.monotonic()
        with pytest.raises(RankError, match=r"Rank 1, 2 did not come to .* All 3 ranks"):
            Meeting(tmp_path / "ranks", 0, 3, 0.02)
        assert time.monotonic() - began < 5
        assert list(tmp_path.iterdir()) == []

    def test_ranks_that_wait_in_vain_leave_nothing(self, tmp_path):
        def run(rank):
            Meeting(tmp_path / "ranks", rank, 3, 0.05 * (1 + rank))

        # Without rank 0, which makes the folder of the session, nothing is known of the others.
        for ranks, absent in (((0, 1), "2"), ((1, 2), "0"), ((2,), "0"), ((0,), "1, 2")):
            errors = in_threads(len(ranks), lambda k, ranks=ranks: run(ranks[k]))
            assert all(f"Rank {absent} did not come" in str(error) for error in errors), errors
            assert [error.report for error in errors] == [True, False][: len(ranks)]
            assert list(tmp_path.iterdir()) == []

    def test_a_rank_that_keeps_the_others_waiting(self, tmp_path):
        def run(ranks):
            if ranks.rank == 1:
                time.sleep(4)
            ranks.barrier()

        errors = together(tmp_path, 3, run, seconds=1.5)
        assert all("has kept the others waiting for 1.5 seconds" in str(e) for e in errors)
        assert all(str(e).startswith("Rank 1 (process ") for e in errors)
        assert [e.report for e in errors[::2]] == [True, False]  # one of them prints it

    def test_a_rank_may_be_busy_for_longer(self, tmp_path):
        def run(ranks):
            if ranks.rank == 1:
                with ranks.busy():
                    time.sleep(1.5)
            ranks.barrier()

        assert together(tmp_path, 3, run, seconds=0.5) == [None] * 3

    def test_a_rank_that_was_busy_has_all_its_time_from_then_on(self, tmp_path):
        def run(ranks):
            if ranks.rank == 1:
                with ranks.busy(), ranks.busy():
                    time.sleep(1.5)
                time.sleep(0.4)
            ranks.barrier()

        assert together(tmp_path, 2, run, seconds=1.0) == [None] * 2

    @pytest.mark.parametrize("busy", [True, False])
    def test_signs_of_life_go_on_while_the_device_gives_no_answer(self, tmp_path, busy):
        """As in a copy from a GPU that waits for another rank."""

        def run(ranks):
            if ranks.rank == 0:
                with ranks.busy() if busy else contextlib.nullcontext():
                    time.sleep(1.5)
                ranks.barrier()
                return
            answer = threading.Event()
            ranks._meeting.waiting_since = lambda: answer.wait() and None
            try:
                ranks.barrier()
            finally:
                answer.set()

        first, second = together(tmp_path, 2, run, seconds=0.5)
        assert (first is second is None) == busy
        assert busy or "Rank 0 (process" in str(second)
        assert busy or "kept the others waiting for 0.5 seconds" in str(second)

    def test_an_exchange_that_all_have_begun_ends_though_they_are_busy(self, tmp_path):
        def run(ranks):
            with ranks.busy():
                if ranks.rank == 0:
                    ranks.barrier()
                ranks._meeting.begun += 1  # begins, and sends nothing
                while True:
                    ranks.check()
                    time.sleep(0.01)

        first, _ = together(tmp_path, 2, run, seconds=0.5)
        assert "All ranks began an exchange that has not ended" in str(first)

    def test_a_rank_without_signs_of_life(self, tmp_path):
        def run(ranks):
            if ranks.rank == 2:
                ranks._meeting._write_state = lambda: None
            for _ in range(100):
                ranks.barrier()
                time.sleep(0.02)

        errors = together(tmp_path, 3, run, seconds=0.5)
        assert "Rank 2 " in str(errors[0])
        assert "no sign of life for 0.5 seconds" in str(errors[0])

    def test_a_rank_that_ends_while_another_looks_at_it_has_not_died(self, tmp_path):
        def meet(rank):
            return Meeting(tmp_path / "ranks", rank, 2, 60.0)

        first, second = in_threads(2, meet)
        look = second._state

        def state(rank):
            found = look(rank)
            first.close(RankError("Rank 7 has died.", False))  # just after
            return found

        second._state = state
        assert second._loss() in (None, "Rank 7 has died.")
        assert second._loss() == "Rank 7 has died."
        second.close()

    def test_ranks_end_with_the_process_that_started_them(self, tmp_path):
        (tmp_path / "ranks").mkdir()
        lock = hold(tmp_path / "ranks" / LAUNCHER)
        threading.Timer(0.5, release, [lock]).start()

        def run(ranks):
            while True:
                ranks.barrier()

        errors = together(tmp_path, 2, run)
        os.close(lock)
        assert all("The process that started the ranks has ended" in str(e) for e in errors)

    def test_folders_of_killed_ranks_do_not_confuse_new_ones(self, tmp_path):
        base = tmp_path / "ranks"
        (base / "session-old").mkdir(parents=True)
        (base / "session-old" / "rank-0.lock").touch()  # nobody holds it
        (base / "session-old" / "rank-0").write_text("{}")
        (base / "current").write_text("session-old")
        assert together(tmp_path, 3, check_exchanges) == [None] * 3
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs locks of files")
    def test_folders_of_ranks_that_were_all_killed_are_removed_later(self, tmp_path):
        names = ["ranks-old", "ranks-held", "ranks-young", "ranks-alive", "other-old"]
        for name in names:
            folder = tmp_path / name / "session-1"
            folder.mkdir(parents=True)
            for file in (folder / "rank-0.lock", folder / "rank-0"):
                file.touch()
                if "young" not in name:
                    os.utime(file, (1e9, 1e9))
        (tmp_path / "ranks-alive/session-1/rank-0").touch()  # a sign of life, without locks
        for name in (LAUNCHER, WAITING):  # killed before rank 0 had come
            (tmp_path / f"ranks-{name}").mkdir()
            (tmp_path / f"ranks-{name}" / name).touch()
            os.utime(tmp_path / f"ranks-{name}" / name, (1e9, 1e9))
        descriptor = hold(tmp_path / "ranks-held/session-1/rank-0.lock")
        remove_abandoned(tmp_path, "ranks-")
        os.close(descriptor)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])

    def test_a_user_without_a_name_has_a_folder(self, tmp_path, monkeypatch):
        """As in a container that runs with a number alone."""

        def nobody(*_):
            raise KeyError("getpwuid(): uid not found")

        monkeypatch.setattr("getpass.getuser", nobody)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(RankError, match="Rank 1 did not come"):
            parallel.connect("cpu", seconds=0.01)

    def test_locks_tell_whether_a_process_lives(self, tmp_path):
        path = tmp_path / "lock"
        descriptor = hold(path)
        assert is_held(path)
        release(descriptor)
        assert not is_held(path)
        os.close(descriptor)

    def test_the_last_resort_is_for_a_main_thread_that_cannot_leave(self, tmp_path, monkeypatch):
        monkeypatch.setattr("cupybnn.parallel.watching._LAST_RESORT", 0.2)
        said = threading.Event()
        meetings = [None, None]

        def run(rank):
            call = (lambda sentence: said.set()) if rank == 0 else None
            meetings[rank] = Meeting(tmp_path / "ranks", rank, 2, 0.5, call)

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stuck = threading.Event()
        meetings[0].on_lost.append(stuck.wait)  # as NCCL may be, when it is to give up
        meetings[1].close(OSError("disk"))
        assert said.wait(10)
        stuck.set()
        meetings[0].close()
