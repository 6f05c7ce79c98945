"""What a full disk or a forbidden place does: one message, and what was there before stays whole."""

import contextlib
import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from dlrscale import cli, config, errors, export, models, record


@contextlib.contextmanager
def largest_file(size):
    """No file of this process grows beyond `size` bytes: what a full disk looks like to every writer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_torch(folder):
    import torch

    torch.save({"a": torch.zeros(50_000)}, folder / "a.pt")


def write_safetensors(folder):
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(50_000)}, folder / "a.safetensors")


def write_text(folder):
    (folder / "a.txt").write_text("x" * 50_000)


def write_json(folder):
    record.write_atomic(folder / "a.json", "x" * 50_000)


@pytest.mark.parametrize("write", [write_torch, write_safetensors, write_text, write_json])
def test_every_writer_s_words_are_known(tmp_path, write):
    with largest_file(10_000), pytest.raises(Exception) as error:  # noqa: PT011
        write(tmp_path)
    said = errors.describe(error.value, tmp_path)
    assert said.startswith(f"No space left for {tmp_path}")
    assert said.endswith("run the same command again.")
    assert "\n" not in said


def test_what_describe_knows():
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        said = errors.describe(OSError(number, os.strerror(number), "/a/file"))
        assert "No space left for /a/file" in said
        assert os.strerror(number) in said
    assert "No space left (" in errors.describe(OSError(errno.ENOSPC, "x"))
    for number in (errno.EACCES, errno.EROFS):
        assert "/a/file cannot be read or written" in errors.describe(OSError(number, "x", "/a/file"))
    above = ValueError("above")
    above.__context__ = OSError(errno.ENOSPC, "x", "/deep")
    assert "/deep" in errors.describe(above)
    for other in (ValueError("x"), OSError(errno.ENOENT, "x", "/a"), RuntimeError("CUDA error"), OSError("words only")):
        assert errors.describe(other, "/out") is None


def test_an_export_that_finds_no_space_leaves_the_old_one(make_llama, tokenizer, tmp_path):
    folder = tmp_path / "model"
    export.save_folder(make_llama(seed=1), tokenizer, folder, {})
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with largest_file(20_000), pytest.raises(Exception) as error:  # noqa: PT011
        export.save_folder(make_llama(seed=2), tokenizer, folder, {})
    assert errors.describe(error.value)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    models.check_folder(folder)
    export.save_folder(make_llama(seed=2), tokenizer, folder, {})
    assert (folder / "model.safetensors").read_bytes() != before["model.safetensors"]


def test_a_line_that_finds_no_space_leaves_the_older_ones(tmp_path):
    file = tmp_path / "records.jsonl"
    record.append_line(file, {"a": 1})
    with largest_file(1000), pytest.raises(OSError, match="File too large"):
        record.append_line(file, {"a": "x" * 2000})
    assert file.read_bytes() == b'{"a": 1}\n'
    with largest_file(1000):
        record.append_line(file, {"a": 2})
    assert list(record.read_lines(file)) == [{"a": 1}, {"a": 2}]


def test_a_text_that_finds_no_space_leaves_the_older_one(tmp_path):
    file = tmp_path / "run.json"
    record.write_atomic(file, "old")
    with largest_file(1000), pytest.raises(OSError, match="File too large"):
        record.write_atomic(file, "x" * 2000)
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_the_command_ends_in_one_message(monkeypatch, capsys):
    def fail(**kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", "/full/run.json")

    monkeypatch.setattr(cli.dlrscale, "main", fail)
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 4
    said = capsys.readouterr().err
    assert said.startswith("Error: No space left for /full/run.json")
    assert said.count("\n") == 1


def test_an_out_folder_that_may_not_be_written_is_refused(tmp_path):
    """As root permissions do not bind; without that capability they do."""
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(0o555)
    code = (
        "import sys; from pathlib import Path; from dlrscale import config, errors\n"
        "try:\n    config.check_folder(Path(sys.argv[1]), 'a', 'b')\nexcept errors.ConfigError as e:\n    print(e)"
    )
    for out in (tmp_path / "locked", tmp_path / "locked" / "a" / "b"):
        line = [*without_override(), sys.executable, "-c", code, str(out)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=30)
        assert f"--out {out}: {tmp_path / 'locked'} cannot be written" in done.stdout, done.stderr
    config.check_folder(tmp_path / "new", "a", "b")


def without_override():
    """What goes in front of a command so that permissions bind it, also where it is root's."""
    import shutil

    if os.geteuid():
        return []
    if not shutil.which("setpriv"):
        pytest.skip("root without setpriv: permissions do not bind")
    return ["setpriv", "--inh-caps=-dac_override,-dac_read_search", "--bounding-set=-dac_override,-dac_read_search"]


def test_every_error_has_an_exit_code():
    kinds = (errors.ConfigError, errors.SurgeryError, errors.PlanError, errors.JobError)
    assert [kind.exit_code for kind in kinds] == [2, 2, 3, 4]
    assert errors.ConfigError(["a", "b"]).faults == ["a", "b"]
    assert Path(errors.__file__).name == "errors.py"
