"""An out dir belongs to one run, and nothing foreign in it is ever removed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastchargpt.errors import OutDirError
from fastchargpt.outdir import claim_out_dir


def test_new_resume_and_overwrite(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with pytest.raises(OutDirError, match="holds no run to resume"), claim_out_dir(out, "resume"):
        pass
    with claim_out_dir(out, "new"):
        (out / "metrics.jsonl").write_text("x")
        (out / "best").mkdir()
    with pytest.raises(OutDirError, match="is not empty: go on with --resume"), claim_out_dir(out, "new"):
        pass
    with claim_out_dir(out, "resume"):
        assert (out / "metrics.jsonl").exists()
    with claim_out_dir(out, "overwrite"):
        assert sorted(path.name for path in out.iterdir()) == [".lock"]


def test_overwrite_leaves_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("x")
    (tmp_path / "thesis.tex").write_text("x")
    with (
        pytest.raises(OutDirError, match=r"holds 'thesis.tex', which no run wrote"),
        claim_out_dir(tmp_path, "overwrite"),
    ):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "metrics.jsonl", "thesis.tex"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(OutDirError, match="is a file"), claim_out_dir(tmp_path / "out", "new"):
        pass


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root and Windows may write anywhere")
def test_read_only(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutDirError, match="cannot be written"), claim_out_dir(tmp_path / "out", "new"):
        pass


def test_unwritable_parent(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutDirError, match="cannot be written"), claim_out_dir(tmp_path / "file" / "out", "new"):
        pass


def test_a_second_run_is_refused_and_a_dead_one_is_not(tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from fastchargpt.outdir import claim_out_dir
with claim_out_dir(Path({str(tmp_path)!r}), "new"):
    print("held", flush=True)
    sys.stdin.read()
"""
    holder = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OutDirError, match="is in use by another run"), claim_out_dir(tmp_path, "new"):
            pass
    finally:
        holder.kill()
        holder.wait()
    with claim_out_dir(tmp_path, "new"):
        pass
