import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from config import TrainConfig
from kindling import device

CPU = device.resolve(TrainConfig(device="cpu"))
MB = 2**20


def test_a_device_that_is_not_there_is_named_with_the_flag_that_asks_for_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for flag, given in (("--train.device", {}), ("--device", {"flag": "--device"})):
        with pytest.raises(
            device.DeviceError, match=f"^{flag} must be a device of this machine .* 'cuda'; .*, or {flag} auto$"
        ):
            device.resolve(TrainConfig(device="cuda"), **given)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process can be reset on Linux only")
def test_the_peak_of_memory_can_be_counted_anew():
    assert device.reset_peak_memory(CPU)
    before = device.peak_memory_bytes(CPU)
    held = np.ones(200 * MB, dtype=np.uint8)
    assert device.peak_memory_bytes(CPU) > before + 150 * MB
    del held
    assert device.peak_memory_bytes(CPU) > before + 150 * MB
    assert device.reset_peak_memory(CPU)
    assert device.peak_memory_bytes(CPU) < before + 50 * MB


def group(folder, files: dict[str, str]) -> None:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="ascii")


def test_a_control_group_leaves_what_is_below_its_limit_or_cached(tmp_path):
    (tmp_path / "cgroup").write_text("0::/slice/job\n", encoding="ascii")
    stat = "anon 60\ninactive_file 30\nactive_file 10\n"
    group(tmp_path / "fs/slice", {"memory.max": "1000\n", "memory.current": "400\n", "memory.stat": stat})
    group(tmp_path / "fs/slice/job", {"memory.max": "max\n", "memory.current": "100\n", "memory.stat": stat})
    assert min(device.cgroup_rooms(tmp_path / "cgroup", tmp_path / "fs")) == 630


def test_a_control_group_of_the_first_version_counts_too(tmp_path):
    (tmp_path / "cgroup").write_text("9:name=systemd:/\n4:memory:/docker/1\n3:cpuset:/\n", encoding="ascii")
    files = {
        "memory.limit_in_bytes": "1000\n",
        "memory.usage_in_bytes": "400\n",
        "memory.stat": "total_inactive_file 5\n",
    }
    group(tmp_path / "fs/memory", files)  # a container sees its own group as the root, whatever it is called outside
    assert min(device.cgroup_rooms(tmp_path / "cgroup", tmp_path / "fs")) == 605


def test_without_control_groups_memory_is_what_the_machine_has_left(tmp_path):
    assert device.cgroup_rooms(tmp_path / "cgroup") == [float("inf")]
    assert device.available_memory_bytes(CPU) is None or device.available_memory_bytes(CPU) > MB


@pytest.mark.parametrize("given", [None, False])  # by TORCHINDUCTOR_VEC_ISA_OK
@pytest.mark.parametrize(("version", "trusted"), [("12.2.0", True), ("11.4.0", None), ("", None)])
def test_a_compiler_that_knows_all_vector_instructions_is_not_tried_out(monkeypatch, version, trusted, given):
    import torch._inductor.config as inductor

    answer = subprocess.CompletedProcess([], 0, stdout=f"{version}\n")
    monkeypatch.setattr(subprocess, "run", lambda *given, **named: answer)
    with inductor.patch({"cpp.vec_isa_ok": given}):
        device.skip_vector_isa_test()
        assert inductor.cpp.vec_isa_ok is (trusted if given is None else given)


def test_rows_at_once_fill_a_32nd_of_a_gpu_and_are_fixed_elsewhere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda which: SimpleNamespace(total_memory=memory))
    gpu, row = torch.device("cuda"), 4 * 49_152
    for gigabytes, expected in ((80, 8192), (16, 2048), (4, 1024)):
        memory = gigabytes * 2**30
        assert device.rows_at_once(gpu, row, 1024) == expected
    assert device.rows_at_once(torch.device("cpu"), row, 1024) == 1024


@pytest.fixture
def full_gpu(monkeypatch):
    """A GPU of 85 GB: sets what is free of it, and what this process holds."""

    def fill(free_gb: float, own_gb: float) -> None:
        total = int(85e9)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda which: SimpleNamespace(total_memory=total))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda which: (int(free_gb * 1e9), total))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda which: int(own_gb * 1e9))

    return fill


def test_memory_that_other_programs_hold_is_said(full_gpu, monkeypatch):
    gpu = torch.device("cuda")
    full_gpu(free_gb=0.3, own_gb=6.5)
    assert device.describe_memory(gpu) == "the GPU's 85.0 GB, of which other programs hold 78.2 GB"
    full_gpu(free_gb=0.3, own_gb=84)  # the rest is CUDA's own
    assert device.describe_memory(gpu) == "the GPU's 85.0 GB"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda which: 1 / 0)
    assert device.describe_memory(torch.device("cpu")) == "this machine's memory"

    def broken(which):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "mem_get_info", broken)
    assert device.describe_memory(gpu) == "the GPU's 85.0 GB"


def test_a_lack_of_memory_names_the_memory_and_what_helps(full_gpu):
    said = (
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.18 GiB of which 12.56 MiB is "
        "free. Process 10196 has 11.74 GiB memory in use."
    )
    full_gpu(free_gb=0.3, own_gb=6.5)
    assert device.describe_out_of_memory(torch.OutOfMemoryError(said)) == (
        "the model and what it works on must fit into the GPU's 85.0 GB, of which other programs hold 78.2 GB, but do not "
        "(CUDA out of memory. Tried to allocate 20.00 MiB); end the other programs, or use a smaller batch, "
        "--train.precision bf16, or --device cpu"
    )
    full_gpu(free_gb=0.3, own_gb=84)
    short = device.describe_out_of_memory(RuntimeError("CUDA error: out of memory\nSearch for `cudaError' in https"))
    assert "GPU's 85.0 GB, but do not (CUDA error: out of memory); use a smaller batch" in short
    cpu = device.describe_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 8 bytes."))
    assert "into this machine's memory, but do not (DefaultCPUAllocator: can't allocate" in cpu


def test_cudnns_attention_is_on_in_its_passes_only(monkeypatch):
    switched = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", switched.append)
    with device.attention_of_fixed_shapes(device.Runtime(torch.device("cpu"), "fp32")):
        assert not switched
    with pytest.raises(ValueError), device.attention_of_fixed_shapes(device.Runtime(torch.device("cuda"), "bf16")):
        assert switched == [True]
        raise ValueError
    assert switched == [True, False]


@pytest.mark.parametrize(
    ("kind", "wanted", "expected"), [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)]
)
def test_deterministic_kernels_are_used_on_a_gpu_where_they_are_wanted_and_only_there(kind, wanted, expected):
    with device.deterministic_kernels(wanted, device.Runtime(torch.device(kind), "bf16")):
        assert torch.are_deterministic_algorithms_enabled() == expected
    assert not torch.are_deterministic_algorithms_enabled()
