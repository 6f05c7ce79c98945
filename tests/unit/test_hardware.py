"""The table of hardware: its units, a user's own file, and which row a device belongs to."""

import json
from dataclasses import fields
from pathlib import Path

import pytest

from dlrscale.errors import ConfigError
from dlrscale.planner import hardware

GIB = 2**30
OWN = {"memory_bytes": 16 * GIB, "host_memory_bytes": 64e9, "devices_per_node": 2}


@pytest.fixture
def own(tmp_path):
    def write(content):
        file = tmp_path / "own.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return file

    return write


def faults_of(file):
    with pytest.raises(ConfigError) as caught:
        hardware.table(file)
    return caught.value.faults


# --- The built-in table -------------------------------------------------------------------------------------------


def test_every_class_of_memory_is_there():
    sizes = sorted({round(row.memory_bytes / GIB) for row in hardware.table().values()})
    for low, high in ((21, 24), (39, 40), (44, 48), (79, 80), (139, 141), (178, 192)):
        assert any(low <= size <= high for size in sizes), (low, high)


@pytest.mark.parametrize("row", hardware.table().values(), ids=hardware.table())
def test_units_are_bytes_and_flops_in_a_second(row):
    assert 20 * GIB < row.memory_bytes < 200 * GIB
    stated = int(row.memory_stated.split()[0])  # vendors' GB of device memory are GiB, and the driver keeps some
    assert 0.9 * stated * GIB < row.memory_bytes < stated * GIB
    assert 0.5e12 < row.bandwidth_bytes_per_s < 10e12
    assert 100e12 < row.bf16_flops_per_s < 3e15
    assert 100 < row.bf16_flops_per_s / row.bandwidth_bytes_per_s < 500  # FLOPs for each byte: no slipped power of 1000
    assert row.memory_bytes < row.host_memory_bytes < 5e12
    assert row.host_link_bytes_per_s in (32e9, 64e9)  # PCIe 4.0 and 5.0, 16 lanes
    assert row.host_link_bytes_per_s <= row.link_bytes_per_s < row.bandwidth_bytes_per_s
    assert row.node_link_bytes_per_s in (None, 25e9, 50e9)  # 200 and 400 Gb/s
    assert 1 <= row.devices_per_node <= 8
    assert row.cost_per_hour is None
    assert row.note
    assert row.source
    assert all(text.startswith("https://") for text in row.source)


def test_peaks_are_dense_and_of_the_right_form():
    peak = {name: row.bf16_flops_per_s for name, row in hardware.table().items()}
    assert peak["h100-80"] == peak["h200-141"] == 989.4e12  # not 1,978.9e12, the figure with 2:4 sparsity
    assert (peak["h100-pcie-80"], peak["h100-nvl-94"]) == (756e12, 835e12)
    assert peak["a100-40"] == peak["a100-80"] == peak["a100-pcie-80"] == 312e12
    assert (peak["b200-180"], peak["mi300x-192"]) == (2250e12, 1307.4e12)
    assert (peak["l40s-48"], peak["rtx-4090"], peak["a10-24"]) == (362.05e12, 165.2e12, 125e12)


def test_rows_stand_in_the_order_of_their_memory():
    stated = [int(row.memory_stated.split()[0]) for row in hardware.table().values()]
    assert stated == sorted(stated)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80"),
        ("NVIDIA H100 PCIe", "h100-pcie-80"),
        ("NVIDIA H100 NVL", "h100-nvl-94"),
        ("NVIDIA H200", "h200-141"),
        ("NVIDIA B200", "b200-180"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80"),
        ("NVIDIA L40S", "l40s-48"),
        ("NVIDIA A10", "a10-24"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("AMD Instinct MI300X", "mi300x-192"),
        # Other peaks, so no row: a slice of a device, a laptop's, relatives.
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A10G", None),
        ("NVIDIA L40", None),
        ("NVIDIA H200 NVL", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_a_device_belongs_to_the_row_of_its_form(device, name):
    row = hardware.of_device(device)
    assert (row.name if row else None) == name


def test_a_wrong_name_offers_near_ones():
    assert hardware.find("H100-80") is hardware.find("h100-80")
    with pytest.raises(ConfigError, match=r"--hardware h100-8: unknown\. Did you mean h100-80.*There are: rtx-4090, "):
        hardware.find("h100-8")
    with pytest.raises(ConfigError, match=r"--hardware xyzzy: unknown\. There are: "):
        hardware.find("xyzzy")


# --- A user's own file --------------------------------------------------------------------------------------------


def test_a_users_file_adds_rows_and_wins(own):
    prices = {"h100-80": OWN | {"cost_per_hour": 2.5, "device_names": ["NVIDIA H100 80GB*"]}, "Box": OWN}
    file = own(prices)
    rows = hardware.table(file)
    assert set(rows) == set(hardware.table()) | {"Box"}
    assert rows["Box"] == hardware.Hardware(
        name="Box", memory_bytes=16 * GIB, host_memory_bytes=64 * 10**9, devices_per_node=2
    )
    assert isinstance(rows["Box"].host_memory_bytes, int)
    assert hardware.find("h100-80", file).cost_per_hour == 2.5
    assert hardware.find("h100-80", file).bf16_flops_per_s is None  # the entry as a whole, not key by key
    assert hardware.find("Box", file).name == "Box"
    assert hardware.of_device("NVIDIA H100 80GB HBM3", file).cost_per_hour == 2.5
    assert hardware.find("h100-80").cost_per_hour is None


def test_a_users_pattern_is_tried_before_the_built_in_ones(own):
    file = own({"rtx-4090": OWN | {"device_names": ["NVIDIA H100*"]}, "mine": OWN | {"device_names": ["NVIDIA*"]}})
    assert hardware.of_device("NVIDIA H100 80GB HBM3", file).name == "rtx-4090"
    assert hardware.of_device("NVIDIA H200", file).name == "mine"
    assert hardware.of_device("AMD Instinct MI300X", file).name == "mi300x-192"


def test_all_faults_at_once_with_file_entry_key_and_mend(own):
    file = own(
        {
            "a": {"memory_bytes": 80, "host_memory_bytes": True, "devices_per_node": 1.5, "bandwith_bytes_per_s": 1e12},
            "b": OWN | {"bf16_flops_per_s": "312e12", "link_bytes_per_s": -1, "device_names": "NVIDIA X", "note": 3},
            "c": 7,
            "d": {"source": [1]},
            "e": OWN | {"devices_per_node": True},
        }
    )
    faults = faults_of(file)
    for entry, key, mend in (
        ("a", "memory_bytes: 80 ", "85899345920 for 80 GiB"),
        ("a", "host_memory_bytes: true ", "bytes, such as"),
        ("a", "devices_per_node: 1.5 ", "a whole number from 1"),
        ("a", "bandwith_bytes_per_s: no such key", "Did you mean bandwidth_bytes_per_s"),
        ("b", 'bf16_flops_per_s: "312e12" ', "dense, such as 312e12"),
        ("b", "link_bytes_per_s: -1 ", "one direction"),
        ("b", 'device_names: "NVIDIA X" is no list', "in brackets"),
        ("b", "note: 3 is no text", "in quotes"),
        ("d", "memory_bytes is missing", "Give bytes"),
        ("d", "host_memory_bytes is missing", "Give bytes"),
        ("d", "devices_per_node is missing", "Give a whole number"),
        ("d", "source: [1] is no list", "in brackets"),
        ("e", "devices_per_node: true ", "a whole number from 1"),
    ):
        fitting = [f for f in faults if f.startswith(f"{file}: {entry}: {key}")]
        assert len(fitting) == 1, (entry, key, faults)
        assert mend in fitting[0]
    assert f"{file}: c is no JSON object. Write its keys in braces, as docs/hardware.md shows." in faults
    assert len(faults) == 14


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e400", "1" + "0" * 400, "false", "[]"])
def test_numbers_that_are_none_are_refused(own, value):
    text = json.dumps({"a": OWN | {"bf16_flops_per_s": "X"}}).replace('"X"', value)
    (fault,) = faults_of(own(text))
    assert "bf16_flops_per_s" in fault


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "holds no JSON object"),
        (
            '{"a": {"memory_bytes": 1e12, "memory_bytes": 2e12, "host_memory_bytes": 1e12, "devices_per_node": 1}}',
            "twi",
        ),
    ],
)
def test_a_file_of_another_form_is_one_message(own, text, words):
    file = own(text)
    (fault,) = faults_of(file)
    assert fault.startswith(f"{file}: ")
    assert words in fault


def test_a_file_that_cannot_be_read_is_one_message(tmp_path):
    (fault,) = faults_of(tmp_path / "none.json")
    assert fault.startswith(f"{tmp_path / 'none.json'}: cannot be read (No such file")
    (fault,) = faults_of(tmp_path)
    assert "cannot be read" in fault
    (tmp_path / "bom.json").write_text("{}", encoding="utf-8-sig")
    assert hardware.table(tmp_path / "bom.json") == hardware.table()
    (tmp_path / "latin.json").write_bytes(b'{"a\xe4": 1}')
    (fault,) = faults_of(tmp_path / "latin.json")
    assert "is no JSON" in fault


def test_every_field_can_be_written_in_a_file():
    keys = {*hardware._NUMBERS, *hardware._LISTS, *hardware._TEXTS}
    assert {f.name for f in fields(hardware.Hardware)} == keys | {"name"}


# --- Its page -----------------------------------------------------------------------------------------------------

PAGE = Path(__file__).resolve().parents[2] / "docs" / "hardware.md"


@pytest.mark.parametrize("row", hardware.table().values(), ids=hardware.table())
def test_the_page_tells_what_the_table_holds(row):
    page = PAGE.read_text(encoding="utf-8")
    (line,) = [text for text in page.splitlines() if text.startswith(f"| `{row.name}` |")]
    links = (row.link_bytes_per_s, row.node_link_bytes_per_s, row.host_link_bytes_per_s)
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        f"`{row.name}`",
        row.memory_stated,
        f"{row.memory_bytes / GIB:.2f}",
        f"{row.bandwidth_bytes_per_s / 1e12:g}",
        f"{row.bf16_flops_per_s / 1e12:g}",
        str(row.host_memory_bytes // GIB),
        str(row.devices_per_node),
        *("-" if link is None else f"{link / 1e9:g}" for link in links),
    ]
    assert f"- `{row.name}`: {row.note}\n" in page
    assert all(f"<{source.split()[0]}>" in page for source in row.source)


def test_the_pages_example_is_a_file_that_is_taken(own):
    example = PAGE.read_text(encoding="utf-8").split("```json\n")[1].split("```")[0]
    row = hardware.find("our-h100", own(example))
    assert row.cost_per_hour == 2.5
    assert set(json.loads(example)["our-h100"]) == {f.name for f in fields(row)} - {"name", "memory_stated", "note"}
