import dataclasses
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, script, tiny_config, tiny_flags
from hypothesis import given, settings
from hypothesis import strategies as st

import data_pipeline
from config import Config, SourceConfig
from kindling.data import build, build_in_parts, distributed_build
from kindling.data.atomic_folder import atomic_folder
from kindling.data.build import fingerprint, prepare
from kindling.data.build_in_parts import cut, gather, make_plan, read_part, read_plan, run_part
from kindling.data.filters import Drop
from kindling.data.ledger import Ledger, read_documents
from kindling.data.process_document import ProcessedDocument
from kindling.data.shards import DataError
from kindling.data.sources import LocalFile, list_files
from kindling.data.workers import WorkerPool
from kindling.errors import KindlingError

pytestmark = pytest.mark.usefixtures("forked_workers")

PROMPT = "from typing import List\n\n\ndef has_close_elements(numbers: List[float], threshold: float) -> bool:\n"
PROMPT += (
    '    """ Check if in given list of numbers, are any two numbers closer to each other than given threshold. """\n'
)


@pytest.fixture(scope="module")
def repo(tmp_path_factory) -> Path:
    """A folder of Python files with copies, edited copies, a benchmark's problem, errors, and names and bytes of all kinds;
    and rows of JSON beside it."""
    folder, rng = tmp_path_factory.mktemp("source") / "repo", random.Random(0)
    folder.mkdir()
    words = [f"{rng.choice('abcdefgh')}{n}" for n in range(400)]
    for i in range(60):
        text = f"def f{i}(x):\n" + "".join(f"    {rng.choice(words)} = {rng.choice(words)}\n" for _ in range(40))
        (folder / f"{i}.py").write_text(text, encoding="utf-8")
        if i % 4 == 0:
            (folder / f"copy_{i}.py").write_text(text, encoding="utf-8")
        if i % 4 == 1:
            (folder / f"edited_{i}.py").write_text(text.replace("x):", "other):") + "# the end\n", encoding="utf-8")
        if i % 10 == 2:
            (folder / f"broken_{i}.py").write_text(text + "def (:\n", encoding="utf-8")
    (folder / "solution.py").write_text("import os\n\n" + PROMPT, encoding="utf-8")
    (folder / "latin.py").write_bytes(b"# caf\xe9\n")
    (folder / "crlf.py").write_bytes(b"x = 1\r\ny = 2\r\n" * 9)
    (folder / "empty.py").touch()
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.py")).write_text("named = 'in Latin-1'\n" * 3, encoding="utf-8")
    for n in range(3):
        rows = [{"content": f"row {n} {i} " * 9, "lang": ["text", "c"][i % 2]} for i in range(40)]
        lines = [*map(json.dumps, rows), "no JSON", '{"other": "\\ud800"}']
        (folder / f"rows{n}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def config(repo: Path) -> Config:
    """Files and rows three to one; the rows end at their 70th, in the middle of a file, and are repeated."""
    cfg = tiny_config(repo)
    rows = SourceConfig(kind="jsonl", path=str(repo), globs=("*.jsonl",), weight=0.33, max_documents=70)
    return replace(cfg, data=replace(cfg.data, sources=(*cfg.data.sources, rows), decontaminate=("humaneval",)))


@pytest.fixture
def in_tmp(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def single(repo, tmp_path_factory) -> dict[str, bytes]:
    """All files of the single build."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("single"))
    try:
        return contents(prepare(config(repo)))
    finally:
        os.chdir(before)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a data folder."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def pool(repo) -> Iterator[WorkerPool]:
    """The workers of `config(repo)`."""
    cfg = config(repo)
    with WorkerPool(cfg.data, cfg.tokenizer) as workers:
        yield workers


def plan_of(cfg: Config, n_parts: int, pool: WorkerPool) -> build_in_parts.Plan:
    files = list_files(cfg)
    return make_plan(cfg, files, f"{cfg.preset}-{fingerprint(cfg, files)}", n_parts, pool)


@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 12))
def test_parts_hold_every_file_once_in_order_and_share_the_bytes(sizes, n):
    files = [LocalFile(str(i), Path(str(i)), size, 0) for i, size in enumerate(sizes)]
    pieces = cut(files, n)
    assert len(pieces) == n and [f for piece in pieces for f in piece] == files
    share, largest = sum(sizes) / n, max(sizes, default=0)
    assert all(abs(sum(f.size for f in piece) - share) <= largest for piece in pieces)


@pytest.mark.parametrize("n", [1, 3, 8])
def test_the_union_of_parts_is_the_single_build_byte_for_byte(repo, single, pool, in_tmp, n):
    plan = plan_of(config(repo), n, pool)
    for number in reversed(range(n)):  # whichever comes first
        run_part(plan, number, pool)
    where = {e.key: k for k in range(n) for i in range(2) for e in read_part(plan.part(k), i, np.dtype("<u2"))}
    folder = gather(plan)
    found = contents(folder)
    assert found.keys() == single.keys() >= {"ledger.json", "documents.jsonl.gz", "manifest.json", "val-documents.npy"}
    assert [name for name in found if found[name] != single[name]] == []
    assert [p.name for p in Path("data").iterdir()] == [folder.name]  # and nothing else is left
    lines = list(read_documents(folder))
    rules = {rule for row in Ledger.read(folder).rows.values() for rule in row["dropped"]}
    assert rules >= {"duplicate", "near-duplicate", "benchmark", "syntax", "not UTF-8", "characters", "unreadable"}
    assert any("repeated" in x for x in lines)
    straddling = {x["dropped"] for x in lines if "of" in x and where[x["key"]] != where[lines[x["of"]]["key"]]}
    assert straddling == ({"duplicate", "near-duplicate"} if n > 1 else set())


def test_what_a_dead_process_left_is_cleared_away_but_not_what_another_machine_is_at(in_tmp):
    here, elsewhere = (Path("data", f".building-a@{host}@999999999") for host in (platform.node(), "elsewhere"))
    mine = Path("data", f".building-b@{platform.node()}@{os.getppid()}")
    for folder in (here, elsewhere, mine):
        folder.mkdir(parents=True)
    with atomic_folder(Path("data/c")):
        assert not here.exists() and elsewhere.exists() and mine.exists()
    assert Path("data/c").is_dir()


@settings(max_examples=30)
@given(
    st.builds(
        ProcessedDocument,
        key=st.text(st.characters(exclude_categories=())).filter(lambda s: json.loads(json.dumps(s)) == s),
        language=st.text(),
        size=st.integers(0, 2**50),
        drop=st.none() | st.builds(Drop, st.text(), st.text()),
        changes=st.lists(st.tuples(st.text(), st.integers(0, 99))).map(tuple),
        digest=st.binary(max_size=16),
        signature=st.binary(max_size=128),
    )
)
def test_what_a_part_keeps_of_a_document_is_all_that_was_found(processed):
    again = build_in_parts._from_line(json.loads(json.dumps(build_in_parts._to_line(processed))), None)
    assert dataclasses.asdict(again) == dataclasses.asdict(processed)


def test_a_killed_call_is_made_again_and_does_only_what_is_missing(repo, in_tmp, capsys):
    flags = [*tiny_flags(repo), "--parts", "4"]
    command = [sys.executable, "-m", "kindling.data.distributed_build", *flags]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, **quiet)
    while not list(Path("data").glob("parts-*/.building-part-00001*")):  # the second part is begun
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (folder,) = Path("data").glob("parts-*")
    done = {p.name: p.stat().st_mtime_ns for p in folder.glob("part-*")}
    assert "part-00000" in done and len(done) < 4 and not list(Path("data").glob("demo-*"))
    assert distributed_build.main(flags) == 0
    out = capsys.readouterr().out
    assert f"{len(done)} of 4 parts are done" in out
    assert [f"part {k} of 4" in out for k in range(4)] == [f"part-{k:05d}" not in done for k in range(4)]
    (built,) = Path("data").iterdir()
    found = contents(built)
    shutil.rmtree("data")
    assert data_pipeline.main(tiny_flags(repo)) == 0
    assert contents(built) == found
    assert distributed_build.main(flags) == 0  # which is built already
    assert [p.name for p in Path("data").iterdir()] == [built.name]


def test_a_source_that_changes_between_parts_is_refused_and_so_is_a_damaged_part(repo, pool, in_tmp, monkeypatch):
    shutil.copytree(repo, "repo")
    cfg = config(repo)
    cfg = replace(cfg, data=replace(cfg.data, sources=tiny_config(Path("repo")).data.sources))
    plan = plan_of(cfg, 3, pool)
    with pytest.raises(DataError, match="--parts must be 3, with which this build was begun, but is 4"):
        plan_of(cfg, 4, pool)
    with pytest.raises(DataError, match="all 3 parts must be done, but 3 are not"):
        gather(plan)
    last = Path("repo", cut(plan.files[0], 3)[2][-1].key)
    text, stat = last.read_bytes(), last.stat()
    run_part(plan, 0, pool)
    run_part(plan, 1, pool)
    done = (plan.part(1) / "done.json").stat().st_mtime_ns
    run_part(plan, 1, pool)  # which is not done again
    assert (plan.part(1) / "done.json").stat().st_mtime_ns == done
    last.write_bytes(text + b"# more\n")
    with pytest.raises(DataError, match="must stay as it was when the build was planned") as error:
        run_part(plan, 2, pool)
    assert "\n" not in str(error.value)
    last.unlink()
    with pytest.raises(DataError, match=r"has changed \(No such file"):
        run_part(plan, 2, pool)
    last.write_bytes(text)
    os.utime(last, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    def read_while_it_changes(source, files):
        os.utime(last)
        return iter(())

    with monkeypatch.context() as patch, pytest.raises(DataError, match="must stay as it was"):
        patch.setattr(build_in_parts, "documents", read_while_it_changes)
        run_part(plan, 2, pool)
    assert plan.missing() == [2] and not list(plan.folder.glob(".building-*"))
    os.utime(last, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    run_part(plan, 2, pool)
    ids = plan.part(1) / "0.ids"
    whole = ids.read_bytes()
    ids.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DataError, match=r"part-00001 must be as it was written, but is not \(0.ids\)"):
        gather(plan)
    ids.write_bytes(whole)
    Path("repo/new.py").write_text("new = 1\n", encoding="utf-8")
    with pytest.raises(DataError, match="the sources must stay as they were"):
        gather(plan)
    Path("repo/new.py").unlink()
    with monkeypatch.context() as patch, pytest.raises(DataError, match="every machine must have the Python"):
        patch.setattr(build, "RECIPE", 0)
        read_plan(plan.folder)
    plan.tokenizer_file.write_text(plan.tokenizer_file.read_text(encoding="utf-8") + " ", encoding="utf-8")
    with pytest.raises(DataError, match=r"must be a whole plan, but is not \(the tokenizer beside it is another"):
        read_plan(plan.folder)
    (plan.folder / "plan.json").write_text('{"format": 1}', encoding="ascii")
    with pytest.raises(DataError, match=r"must be a whole plan, but is not \('tokenizer_sha256'"):
        read_plan(plan.folder)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--preset", "code-50m"], ["streamed from the hub", "--data.sources.0.kind parquet"]),
        (["--preset", "docstrings"], ["instructions and answers", "sft_train.py"]),
        (["--parts", "0"], ["--parts must be at least 1, but is 0"]),
        (["--executor", "slurm"], ["--slurm.partition must be set"]),
        (["--executor", "local"], ["--executor local needs the library datatrove", "pip install datatrove", "inline"]),
        (["--executor", "ray"], ["--executor ray needs the library ray", "pip install datatrove ray"]),
    ],
)
def test_what_cannot_be_split_or_run_is_one_clear_line(flags, words, in_tmp, monkeypatch):
    for name in ("datatrove", "datatrove.executor.local", "ray"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(KindlingError) as error:
        distributed_build.main(flags)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
    assert not Path("data").exists()


# -- datatrove --------------------------------------------------------------------------------------------------------


def test_datatrove_runs_the_parts_side_by_side_and_none_twice(repo, in_tmp):
    pytest.importorskip("datatrove", reason="needs datatrove, which is optional")
    flags = [*tiny_flags(repo), "--parts", "3", "--executor", "local", "--at-once", "2"]
    result = script("kindling.data.distributed_build", *flags, cwd=in_tmp)
    assert result.returncode == 0, result.stderr
    (built,) = Path("data").glob("demo-*")
    found = contents(built)
    (logs,) = Path("data").glob("logs-*/parts")
    assert sorted(p.name for p in (logs / "completions").iterdir()) == ["00000", "00001", "00002"]
    shutil.rmtree(built)  # datatrove takes the parts for done, but they are gone
    assert distributed_build.main([*flags[:-1], "1"]) == 0
    assert contents(built) == found
    shutil.rmtree(built)
    assert data_pipeline.main(tiny_flags(repo)) == 0
    assert contents(built) == found


SBATCH = """#!/bin/bash
# a Slurm of one machine: it runs the jobs of an array at once, one after another
job="${@: -1}"
array=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$job")
for i in $(seq 0 "$array"); do
    SLURM_NODELIST=here SLURM_JOB_ID=7 SLURM_ARRAY_TASK_ID=$i bash "$job" >> sbatch.log 2>&1
done
echo "Submitted batch job 7"
"""


def test_slurm_jobs_make_the_parts_and_gather_them(repo, in_tmp):
    pytest.importorskip("datatrove", reason="needs datatrove, which is optional")
    commands = {"sbatch": SBATCH, "srun": '#!/bin/bash\nexec "${@:4}"\n', "scontrol": "#!/bin/bash\necho here\n"}
    Path("bin").mkdir()
    for name, text in commands.items():
        Path("bin", name).write_text(text, encoding="ascii")
        Path("bin", name).chmod(0o755)
    environment = os.environ | {"PATH": f"{Path('bin').absolute()}:{os.environ['PATH']}"}
    flags = [*tiny_flags(repo), "--parts", "2"]
    slurm = ["--executor", "slurm", "--slurm.partition", "cpu"]
    result = script("kindling.data.distributed_build", *flags, *slurm, cwd=in_tmp, env=environment)
    said = Path("sbatch.log").read_text(encoding="utf-8") if Path("sbatch.log").exists() else ""
    assert result.returncode == 0 and "submitted" in result.stdout, result.stderr + said
    (built,) = Path("data").glob("demo-*")
    found = contents(built)
    shutil.rmtree(built)
    assert data_pipeline.main(tiny_flags(repo)) == 0
    assert contents(built) == found
