"""Checkpoint folders: which are whole, which layouts read which, and what is said of the others."""

import json
import shutil

import pytest

from dlrscale import engine
from dlrscale.engine import Layout, checkpoints, find_checkpoint
from dlrscale.engine.checkpoints import broken, check_bytes, sha256
from dlrscale.errors import ConfigError


@pytest.fixture
def one_rank(monkeypatch):
    """The process group of one rank."""
    import torch.distributed as dist

    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "all_gather_object", lambda found, own: found.__setitem__(0, own))


def write(folder, step, ranks=2, stage=1, names=("a.pt", "sub/b.pt")):
    place = folder / f"step{step}"
    for name in names:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(bytes([step]) * 50)
    files = {name: (50, sha256(place / name)) for name in names}
    whole = {"step": step, "world_size": ranks, "stage": stage, "trained": ["w"], "files": files}
    (place / "whole.json").write_text(json.dumps(whole))
    return place


def test_checkpoints_in_the_order_of_steps(tmp_path):
    for step in (9, 100, 20):
        write(tmp_path, step)
    assert checkpoints(tmp_path) == [9, 20, 100]
    assert checkpoints(tmp_path / "missing") == []


def test_checkpoints_that_are_not_whole_do_not_count(tmp_path):
    for step in range(1, 9):
        write(tmp_path, step)
    (tmp_path / "step2" / "whole.json").unlink()
    (tmp_path / "step3" / "a.pt").write_bytes(b"")
    (tmp_path / "step4" / "sub" / "b.pt").unlink()
    (tmp_path / "step5" / "whole.json").write_text('{"step": 5')
    (tmp_path / "step6").rename(tmp_path / "tmp-step6")
    (tmp_path / "step7" / "whole.json").write_text("[]")
    (tmp_path / "step8").rename(tmp_path / "step12")
    (tmp_path / "latest").write_text("step12")
    assert checkpoints(tmp_path) == [1]
    assert broken(tmp_path) == {
        12: "whole.json is missing or wrong",
        7: "whole.json is missing or wrong",
        5: "whole.json is missing or wrong",
        4: "sub/b.pt is missing",
        3: "a.pt has 0 bytes instead of 50",
        2: "whole.json is missing or wrong",
    }


def flip(file):
    found = bytearray(file.read_bytes())
    found[17] ^= 1
    file.write_bytes(found)


def test_a_flipped_byte_is_found(tmp_path):
    place = write(tmp_path, 9)
    check_bytes(place)
    flip(place / "sub" / "b.pt")
    with pytest.raises(ValueError, match=r"sub/b\.pt is not what was written"):
        check_bytes(place)
    check_bytes(place, 0, 2)  # the share of another rank
    with pytest.raises(ValueError, match=r"sub/b\.pt"):
        check_bytes(place, 1, 2)


@pytest.mark.parametrize("fault", ["cut", "flipped", "named wrongly", "left over", "latest gone"])
def test_the_newest_whole_one_is_found_and_the_others_are_told(fault, tmp_path, one_rank):
    for step in (3, 6, 9):
        write(tmp_path, step)
    (tmp_path / "latest").write_text("step9")
    newest, said = 9, {}
    if fault == "cut":
        (tmp_path / "step9" / "a.pt").write_bytes(b"")
        newest, said = 6, {9: "a.pt has 0 bytes instead of 50"}
    elif fault == "flipped":
        flip(tmp_path / "step9" / "a.pt")
        newest, said = 6, {9: "a.pt is not what was written"}
    elif fault == "named wrongly":
        (tmp_path / "latest").write_text("step12")
    elif fault == "left over":
        shutil.copytree(tmp_path / "step9", tmp_path / "tmp-step12")
    else:
        (tmp_path / "latest").unlink()
    found = find_checkpoint(tmp_path, Layout(2, 1))
    assert (found.step, found.skipped) == (newest, said)
    assert found.written == Layout(2, 1)
    assert (tmp_path / "step9").is_dir()  # nothing is deleted before a newer one is there


def test_none_whole_is_refused_with_the_list(tmp_path, one_rank):
    assert find_checkpoint(tmp_path / "missing", Layout(1, 0)) is None
    for step in (3, 6):
        flip(write(tmp_path, step) / "a.pt")
    (write(tmp_path, 9) / "a.pt").unlink()
    with pytest.raises(ConfigError) as error:
        find_checkpoint(tmp_path, Layout(2, 1))
    text = str(error.value)
    assert all(part in text for part in ("step9: a.pt is missing", "step6: a.pt is not", "step3: a.pt is not", "anew"))
    for step in (3, 6):
        shutil.rmtree(tmp_path / f"step{step}")
    with pytest.raises(ConfigError, match=r"no checkpoint is whole \(step9: a\.pt is missing\)"):
        engine.check_layout(tmp_path, 2, 1)  # before a rank starts


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("other", [0, 1, 2, 3])
def test_which_layout_reads_which(stage, other):
    assert Layout(2, stage).reads(Layout(2, stage)) == "plain"
    expected = {(0, 0): "plain", (1, 1): "universal", (1, 2): "universal", (2, 2): "universal", (3, 3): "universal"}
    assert Layout(1, stage).reads(Layout(2, other)) == expected.get(tuple(sorted((stage, other))))


def test_a_layout_without_a_way_is_refused(tmp_path):
    write(tmp_path, 5, ranks=1, stage=0)
    write(tmp_path, 10, ranks=2, stage=2)
    for ranks, stage in ((2, 2), (1, 2), (4, 1)):
        engine.check_layout(tmp_path, ranks, stage)
    engine.check_layout(tmp_path / "missing", 7, 1)
    for ranks, stage in ((2, 3), (1, 0)):
        with pytest.raises(ConfigError) as error:
            engine.check_layout(tmp_path, ranks, stage)
        text = str(error.value)
        asked = f"{ranks} rank{'s' if ranks > 1 else ''} at ZeRO stage {stage}"
        assert all(part in text for part in ("step10", "2 ranks at ZeRO stage 2", asked, "--zero 2 or 1", "--out"))
