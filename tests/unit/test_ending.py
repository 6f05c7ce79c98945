"""How the end of a job becomes its record: exit codes, signals, memory, two commands in one folder."""

import json
import threading
from types import SimpleNamespace

import pytest
import torch

from dlrscale import cli, config, jobs, launcher, record
from dlrscale.cli import run as command
from dlrscale.jobs import Ending
from dlrscale.launcher.ranks import RankNote, Ranks, oom_kills
from dlrscale.measure import Phases
from dlrscale.record import Outcome


def end(tmp_path, code, killed=0, log="", phase="backward"):
    """The outcome and the words for a launcher's exit code after one rank was in a phase."""
    ranks = Ranks(tmp_path)
    ranks._oom_kills -= killed
    if phase:
        RankNote(tmp_path, 1).say(phase)
    (tmp_path / "ranks.log").write_text(log)
    return command.end_of_ranks(code, ranks, tmp_path)


def test_a_rank_ended_from_outside_is_failed_with_the_signal(tmp_path):
    assert end(tmp_path, 247) == (Outcome.FAILED, "a rank was ended from outside by SIGKILL (rank 1 in backward)")
    assert end(tmp_path, 143)[1].endswith("by SIGTERM (rank 1 in backward)")
    assert end(tmp_path, 247, phase="")[1].endswith("by SIGKILL (at the start)")
    outcome, words = end(tmp_path, 1)
    assert outcome is Outcome.FAILED
    assert words == f"the ranks ended (launcher exit code 1) and left no record; see {tmp_path}/ranks.log"


def test_the_kernel_s_kill_is_out_of_memory(tmp_path):
    assert end(tmp_path, 247, killed=1)[0] is Outcome.OOM
    assert end(tmp_path, 143, killed=1)[0] is Outcome.FAILED  # another process of the host was killed for memory
    assert oom_kills() >= 0


@pytest.mark.parametrize("said", ["memory allocation of 20971520 bytes failed\n", "terminate called: std::bad_alloc"])
def test_a_native_abort_for_memory_is_out_of_memory(said, tmp_path):
    assert end(tmp_path, 250, log=said) == (Outcome.OOM, "a rank got no more memory and aborted (rank 1 in backward)")
    assert end(tmp_path, 250, log="assertion failed")[0] is Outcome.FAILED
    (tmp_path / "ranks.log").write_text(said)  # of an earlier start: it does not count
    ranks = Ranks(tmp_path)
    assert not ranks.aborted_for_memory()


def test_notes_outlive_a_rank_and_go_with_the_next_start(tmp_path):
    note = RankNote(tmp_path, 0)
    note.say("a-long-name-of-a-phase")
    note.say("load")
    ranks = Ranks(tmp_path)
    assert ranks.notes() == {}
    ranks.sample()
    assert ranks.peak_rss_bytes == 0
    RankNote(tmp_path, 0).say("forward")
    assert [phase for _, phase in ranks.notes().values()] == ["forward"]
    ranks.sample()
    assert ranks.peak_rss_bytes > 10 * 2**20  # this process


def test_out_of_memory_is_known_by_its_words():
    assert jobs.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert jobs.is_out_of_memory(MemoryError())
    assert jobs.is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert jobs.is_out_of_memory(OSError(12, "Cannot allocate memory"))
    assert not jobs.is_out_of_memory(RuntimeError("shapes differ"))
    assert not jobs.is_out_of_memory(ValueError("not enough memory of this"))
    assert jobs.lost_a_peer(RuntimeError("[/gloo/pair.cc:547] Connection closed by peer [127.0.0.1]:5"))
    assert not jobs.lost_a_peer(RuntimeError("shapes differ"))


def test_the_phase_that_broke_is_kept_with_its_peak():
    phases = Phases(torch.device("cpu"))
    with pytest.raises(MemoryError), phases.phase("evaluate"), phases.phase("inner"):
        raise MemoryError
    with phases.phase("save"):
        pass
    assert phases.broken == "inner"
    assert phases.peaks()["memory/host_peak_rss_bytes"] == phases.phases["inner"]["host_peak_rss_bytes"]


def test_one_rank_alone_writes_the_record(tmp_path):
    finished = []
    guard = SimpleNamespace(busy=threading.Lock(), last_words=None)

    def ending(rank):
        job = jobs.Run(config.LockConfig(model="", data="", out=""), {}, Phases(torch.device("cpu")), tmp_path, "id")
        job.metrics = {"a": 1.0, "b": float("nan")}
        job.sink = SimpleNamespace(finish=lambda entry, files: finished.append(entry["outcome"]))
        return Ending(job, {"id": "x", "config": {}}, guard, rank)

    first, second = ending(0), ending(1)
    second.write(Outcome.OOM, "out of memory")
    first.write(Outcome.FAILED, "connection closed")
    guard.last_words("ended by SIGTERM")  # rank 0's own, too late
    (entry,) = record.read_lines(tmp_path / "records.jsonl")
    assert (entry["outcome"], entry["error"], entry["metrics"]) == ("oom", "out of memory", {"a": 1.0})
    assert finished == ["oom"] * 3


def test_last_words_are_those_of_rank_zero(tmp_path):
    guard = SimpleNamespace(busy=threading.Lock(), last_words=None)
    job = jobs.Run(config.LockConfig(model="", data="", out=""), {}, Phases(torch.device("cpu")), tmp_path, "id")
    Ending(job, {"id": "x", "config": {}}, guard, 1)
    assert guard.last_words is None
    Ending(job, {"id": "x", "config": {}}, guard, 0)
    guard.last_words("ended by SIGTERM")
    (entry,) = record.read_lines(tmp_path / "records.jsonl")
    assert (entry["outcome"], entry["error"]) == ("failed", "ended by SIGTERM")


def test_an_old_log_says_nothing_of_this_start(tmp_path):
    (tmp_path / "ranks.log").write_text("No space left on device\n")
    ranks = Ranks(tmp_path)
    with open(tmp_path / "ranks.log", "a") as file:
        file.write("ImportError: x\n")
    assert "left no record" in command.end_of_ranks(1, ranks, tmp_path)[1]
    with open(tmp_path / "ranks.log", "a") as file:
        file.write("OSError: [Errno 28] No space left on device\n")
    assert "free some space" in command.end_of_ranks(1, ranks, tmp_path)[1]


def test_strange_files_beside_the_notes_do_not_matter(tmp_path):
    RankNote(tmp_path, 0)
    ranks = Ranks(tmp_path)
    RankNote(tmp_path, 0).say("forward")
    (tmp_path / ".ranks" / ".nfs0001").write_text("x")
    assert list(ranks.notes()) == [0]


@pytest.fixture
def lock_line(tmp_path, llama_folder, monkeypatch):
    """The words of a lock in a folder of its own, without MLflow."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    (tmp_path / "text.txt").write_text("the cat sat on a mat " * 400)
    return ["lock", "--model", str(llama_folder), "--data", str(tmp_path / "text.txt"), "--seq-len", "32", "--depth",
            "2", "--out", str(tmp_path / "out"), "--tracking-uri", "none"]  # fmt: skip


def call(line):
    with pytest.raises(SystemExit) as stop:
        cli.main(line)
    return stop.value.code


def test_two_commands_in_one_folder(lock_line, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(launcher, "run", lambda *_: pytest.fail("no rank may start"))
    out = tmp_path / "out"
    out.mkdir()
    with record.held(out / config.COMMAND_LOCK) as got:
        assert got
        assert call(lock_line) == 2
    assert f"Error: {out}: another command writes into this folder now" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == [config.COMMAND_LOCK]


def test_an_interrupt_leaves_a_record(lock_line, tmp_path, capsys, monkeypatch):
    def run(*_):
        raise launcher.Interrupted("SIGTERM")

    monkeypatch.setattr(launcher, "run", run)
    assert call(lock_line) == 130
    assert "interrupted" in capsys.readouterr().err
    entry = json.loads((tmp_path / "out" / "records.jsonl").read_text())
    assert (entry["outcome"], entry["error"]) == ("failed", "interrupted by SIGTERM")
    assert tuple(entry) == record.RECORD_KEYS


def test_ranks_that_leave_no_record_get_one(lock_line, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(launcher, "run", lambda *_: 247)
    assert call(lock_line) == 4
    assert "a rank was ended from outside by SIGKILL (at the start)" in capsys.readouterr().err
    monkeypatch.setattr(launcher, "run", lambda *_: launcher.EXIT_OOM)
    assert call(lock_line) == 0
    entries = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert [entry["outcome"] for entry in entries] == ["failed", "oom"]
