"""Table files: round trip, every kind of damage is one clear error, resuming after a kill."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.latency import LatencyTable, Workload, profile
from jointnas_kernels.latency import backends as registry
from jointnas_kernels.latency.schema import Device, Writer, read
from jointnas_kernels.space import SearchSpace
from tests.latency.tables import CONFIG, SPACE, calm, synthetic

MUTATIONS = 2000


@pytest.fixture
def path(tmp_path: Path, table: LatencyTable) -> Path:
    table.save(tmp_path / "table.jsonl")
    return tmp_path / "table.jsonl"


def edit(path: Path, change: dict[str, object], line: int = 3, checksum: bool = False) -> None:
    """Changes fields of one line; without the checksum the end line carries none, as in a hand-made table."""
    lines = path.read_text().splitlines()
    lines[line] = json.dumps({**json.loads(lines[line]), **change})
    if not checksum:
        lines[-1] = json.dumps({"kind": "end", "rows": len(lines) - 2})
    path.write_text("\n".join(lines) + "\n")


def test_round_trip(path: Path, table: LatencyTable) -> None:
    again = LatencyTable.load(path, table.header.device)
    assert again.rows == table.rows
    assert again.header == table.header


def test_hand_made_table_without_checksum(path: Path) -> None:
    edit(path, {"median": 1.0, "p10": 0.5, "p90": 2.0})
    assert LatencyTable.load(path, None).rows[2].median == 1.0


@pytest.mark.parametrize(
    ("change", "line", "message"),
    [
        ({"median": -1.0}, 3, "line 4: row median must be a positive finite number, got -1.0"),
        ({"median": 0}, 3, "must be a positive finite number"),
        ({"median": None}, 3, "required when status is 'ok'"),
        ({"p10": 9.0}, 3, "p10 <= median <= p90"),
        ({"median": "fast"}, 3, "row median: Input should be a valid number"),
        ({"wbits": 17}, 3, "row wbits"),
        ({"op": "conv"}, 3, "row op"),
        ({"colour": 1}, 3, "row colour: Extra inputs are not permitted"),
        ({"status": "infeasible"}, 3, "must not carry numbers"),
        ({"kind": "raw"}, 3, "'kind' must be one of header, row, calibration, end, got 'raw'"),
        ({"version": 2}, 0, "version 2 is not supported"),
        ({"format": "csv"}, 0, "format must be 'jointnas-latency'"),
        ({"kind": "row"}, 0, "line 1"),
    ],
    ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else None,
)
def test_bad_values(path: Path, change: dict[str, object], line: int, message: str) -> None:
    edit(path, change, line)
    with pytest.raises(JointNASError, match=message.replace("(", r"\(")) as error:
        LatencyTable.load(path, None)
    assert str(path) in str(error.value)


def test_edited_values_do_not_match_the_checksum(path: Path) -> None:
    edit(path, {"median": 1.0, "p10": 0.5, "p90": 2.0}, checksum=True)
    with pytest.raises(JointNASError, match="checksum does not match"):
        LatencyTable.load(path, None)


def test_truncated(path: Path) -> None:
    blob = path.read_bytes()
    path.write_bytes(blob[: len(blob) // 2])
    with pytest.raises(JointNASError, match=r"is truncated .* --resume"):
        LatencyTable.load(path, None)


def test_missing_empty_and_headless(tmp_path: Path, path: Path) -> None:
    with pytest.raises(JointNASError, match="does not exist"):
        LatencyTable.load(tmp_path / "none.jsonl", None)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(JointNASError, match="is empty"):
        LatencyTable.load(tmp_path / "empty.jsonl", None)
    (tmp_path / "headless.jsonl").write_text("\n".join(path.read_text().splitlines()[1:]) + "\n")
    with pytest.raises(JointNASError, match="first line must be the header"):
        LatencyTable.load(tmp_path / "headless.jsonl", None)


def test_second_row_for_the_same_operation(path: Path) -> None:
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:4], lines[3], *lines[4:]]) + "\n")
    with pytest.raises(JointNASError, match="line 5: second row"):
        LatencyTable.load(path, None)


def test_wrong_device(path: Path) -> None:
    other = Device(type="cuda", name="NVIDIA H200", arch="sm_90", threads=0)
    with pytest.raises(JointNASError, match=r"was measured on cpu .*, this device is cuda 'NVIDIA H200' sm_90"):
        LatencyTable.load(path, other)
    assert LatencyTable.load(path, other, force=True).rows


def test_tables_of_a_gpu_say_what_ran_whole_models(path: Path, table: LatencyTable) -> None:
    there = Device(type="cuda", name="NVIDIA H200", arch="sm_90", threads=0)
    headers = {
        kind: table.header.model_copy(update={"device": there, "runtime": kind})
        for kind in (None, "torch", "graph", "transformers")
    }
    for kind, header in headers.items():
        LatencyTable(header, table.rows).save(path)
        if kind in ("graph", "transformers"):
            assert LatencyTable.load(path, there).header.stepped == (kind == "graph")
        else:
            with pytest.raises(JointNASError, match="measured before models ran through the step on a GPU"):
                LatencyTable.load(path, there)
    assert headers["graph"].differs_from(headers["torch"]).startswith("runtime (graph, not torch)")
    assert not headers["torch"].differs_from(headers["transformers"])


def test_merge(table: LatencyTable) -> None:
    half = len(table.rows) // 2
    merged = LatencyTable(table.header, table.rows[:half]).merge(LatencyTable(table.header, table.rows[half:]))
    assert {r.spec for r in merged.rows} == {r.spec for r in table.rows}
    with pytest.raises(JointNASError, match="cannot be merged: different workload"):
        table.merge(synthetic(workload=Workload(seq=17)))


def test_fuzzed_files_are_an_error_or_a_valid_table(path: Path, tmp_path: Path) -> None:
    """Random byte edits, cuts, repeats and line shuffles. Nothing but one line of JointNASError may come out; what
    loads can be described, and a resumed profile reads no more than what was whole."""
    chance = random.Random(0)
    original = path.read_bytes()
    for checksum in (True, False):
        blob = original
        if not checksum:
            lines = original.splitlines()
            lines[-1] = json.dumps({"kind": "end", "rows": len(lines) - 2}).encode()
            blob = b"\n".join(lines[:6] + lines[-1:]) + b"\n"
            blob = blob.replace(str(len(lines) - 2).encode() + b"}\n", b"5}\n")
        fuzzed = tmp_path / "fuzzed.jsonl"
        valid, messages = 0, []
        for number in range(MUTATIONS // 2):
            data = bytearray(blob if chance.random() < 0.5 else blob[: chance.randrange(len(blob))])
            for _ in range(chance.randrange(1, 4)):
                at = chance.randrange(len(data)) if data else 0
                kind = chance.randrange(5)
                if kind == 0 and data:
                    data[at] = chance.randrange(256)
                elif kind == 1:
                    del data[at : at + chance.randrange(1, 30)]
                elif kind == 2:
                    data[at:at] = bytes(chance.choices(b'0123456789-+.eE"{}[],:nul\n', k=chance.randrange(1, 8)))
                elif kind == 3:
                    data[at:at] = data[at : at + 200]
                else:
                    lines = data.split(b"\n")
                    chance.shuffle(lines)
                    data = bytearray(b"\n".join(lines))
            fuzzed.write_bytes(data)
            if number % 4 == 0:
                with contextlib.suppress(JointNASError):
                    assert read(fuzzed, recover=True).valid_bytes <= len(data)
            try:
                loaded = LatencyTable.load(fuzzed, None)
            except JointNASError as error:
                messages.append(str(error))
                continue
            valid += 1
            assert all(r.median is None or r.median > 0 for r in loaded.rows)
            assert "operations measured" in loaded.summary()
            assert loaded.coverage(SPACE, CONFIG).needed
        assert valid < MUTATIONS / 20
        assert all(str(fuzzed) in message and len(message.splitlines()) == 1 for message in messages)


# ---- resuming -------------------------------------------------------------------------------------------------------

SMALL = SearchSpace((64,), (2, 4), (16,), (64,), (1, 2, 3), (8,), (8, 16), group_size=64)


def run_profile(path: Path, **options: object) -> LatencyTable:
    settings = {
        "workload": Workload(seq=8), "threads": 1, "progress": False, "seconds_per_operation": 1e-4, "watch": calm(),
    }  # fmt: skip
    return profile(SMALL, CONFIG, path, **{**settings, **options})  # type: ignore[arg-type]


def test_profile_resumes_a_cut_file(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    whole = run_profile(path)
    blob = path.read_bytes()
    lines = blob.splitlines(keepends=True)
    for keep, extra in ((1, b""), (4, b'{"kind":"row","op":"lin'), (len(lines) - 1, b"")):
        path.write_bytes(b"".join(lines[:keep]) + extra)
        again = run_profile(path)
        assert [r.spec for r in again.rows] == [r.spec for r in whole.rows]
        kept = whole.rows[: keep - 1]  # of the operation before the cut a backend may be missing: measured again
        for old, new in zip(kept, again.rows, strict=False):
            assert old == new or old.spec == kept[-1].spec
    path.write_bytes(blob)
    assert run_profile(path).rows == whole.rows  # nothing left to do


def test_profile_resumes_after_a_kill(tmp_path: Path) -> None:
    """SIGKILL in the middle of a profile: every operation before the last one on disk is kept as it was measured."""
    path, root = tmp_path / "table.jsonl", Path(__file__).resolve().parents[2]
    code = (
        "import sys; from pathlib import Path; from tests.latency.test_table_files import run_profile; "
        "run_profile(Path(sys.argv[1]), seconds_per_operation=0.1)"
    )
    paths = os.pathsep.join(map(str, (root, root / "python")))
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], env={**os.environ, "PYTHONPATH": paths})
    while process.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") > 12):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    killed = read(path, recover=True)
    assert not killed.complete
    kept = [row for row in killed.rows if row.spec != killed.rows[-1].spec]
    table = run_profile(path)
    assert table.rows[: len(kept)] == kept
    assert len(kept) > 6
    assert LatencyTable.load(path).rows == table.rows
    assert not table.coverage(SMALL, CONFIG).missing


def test_profile_refuses_a_corrupted_middle(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    run_profile(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + b"garbage\n" + b"".join(lines[3:5]))
    with pytest.raises(JointNASError, match="line 4: not valid JSON"):
        run_profile(path)


def test_profile_refuses_to_mix_and_to_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    run_profile(path)
    with pytest.raises(JointNASError, match="cannot be continued: it was measured for another workload"):
        profile(SMALL, CONFIG, path, workload=Workload(seq=9), threads=1, progress=False)
    with pytest.raises(JointNASError, match="exists; pass resume"):
        run_profile(path, resume=False)


def test_profile_extends_a_table_to_a_larger_space(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    before = run_profile(path)
    larger = SearchSpace((64, 128), (2, 4), (16,), (64,), (1, 2, 3), (8,), (8, 16), group_size=64)
    after = profile(
        larger, CONFIG, path, workload=Workload(seq=8), threads=1, progress=False, seconds_per_operation=1e-4,
        watch=calm(),
    )  # fmt: skip
    assert after.rows[: len(before.rows)] == before.rows
    assert not after.coverage(larger, CONFIG).missing


def test_writer_flushes_every_line(tmp_path: Path, table: LatencyTable) -> None:
    path = tmp_path / "table.jsonl"
    writer = Writer(path, table.header)
    for i, row in enumerate(table.rows[:3]):
        writer.write(row)
        assert len(read(path, recover=True).rows) == i + 1
    writer.close()


def test_space_key_order_does_not_matter(table: LatencyTable) -> None:
    assert registry.names()[0] == "torch"
    assert table.bind(SPACE) is table.bind(SearchSpace.from_dict(SPACE.to_dict()))


@pytest.mark.parametrize("seconds", [0.0, -1.0, 60.0, float("nan")])
def test_time_per_operation_is_bounded(seconds: float, tmp_path: Path) -> None:
    with pytest.raises(JointNASError, match=r"seconds_per_operation is .*allowed: above 0, to 5"):
        run_profile(tmp_path / "table.jsonl", seconds_per_operation=seconds)
    assert not list(tmp_path.iterdir())


def test_profile_says_how_long_it_takes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The number of measurements is what is still to be done, each at its time."""
    caplog.set_level("INFO")
    table = run_profile(tmp_path / "table.jsonl", progress=True)
    count = sum(row.status != "infeasible" for row in table.rows)
    operations = len({row.spec for row in table.rows})
    said = f"profile: {operations} operations, {count} measurements of 0.0001 s or more: at least 0:00:01"
    assert said in caplog.text
    caplog.clear()
    run_profile(tmp_path / "table.jsonl", progress=True)
    assert "profile:" not in caplog.text, "nothing left to do"


def test_profile_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(JointNASError, match="is a file, not a folder"):
        run_profile(tmp_path / "file" / "table.jsonl")
