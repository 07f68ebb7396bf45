import pytest

from kindling.cli import run_script


def ends_with(error: BaseException):
    def main() -> int:
        raise error

    return main


def test_a_lack_of_memory_is_one_line_with_the_way_out(capsys):
    said = "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 8 GiB"
    with pytest.raises(SystemExit) as ended:
        run_script(ends_with(RuntimeError(said)))
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1 and line.startswith("error: ") and "2.00 GiB" in line and "--device cpu" in line


def test_an_error_of_the_code_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes"):
        run_script(ends_with(RuntimeError("shapes do not match")))
