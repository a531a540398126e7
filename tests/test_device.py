"""A GPU is used, or refused with what to do; a CPU never takes its place unasked."""

from types import SimpleNamespace

import pytest
import torch

from contextual_cnn import device
from contextual_cnn.device import choose_device
from contextual_cnn.engine.precision import autocast
from contextual_cnn.errors import UserError


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Sets what torch says of its GPUs: SimpleNamespace of driver, built, available, count, capability."""

    def with_gpus(**said):
        m = SimpleNamespace(**dict(driver=True, built="13.0", available=True, count=1, capability=(9, 0)) | said)
        driver = tmp_path / "nvidiactl"
        driver.touch() if m.driver else None
        monkeypatch.setattr(device, "_DRIVER", driver)
        monkeypatch.setattr(torch.version, "cuda", m.built)
        for name, answer in {
            "is_available": m.available,
            "device_count": m.count,
            "get_device_capability": m.capability,
            "get_device_name": "NVIDIA Something",
            "get_arch_list": ["sm_75", "sm_90", "sm_120", "compute_120"],
            "set_device": None,
            "init": None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
        return m

    return with_gpus


@pytest.mark.parametrize(
    "said", [dict(driver=False), dict(driver=True, built=None)], ids=["no driver", "a CPU's torch"]
)
def test_auto_is_the_cpu_where_there_is_no_gpu_to_be_used(machine, said):
    machine(available=False, **said)
    assert choose_device("auto", 0) == torch.device("cpu")


def test_auto_never_takes_the_cpu_where_a_driver_is_loaded(machine, monkeypatch):
    machine(available=False)

    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020)")

    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(UserError, match=r"driver on your system is too old \(found version 12020\)") as refused:
        choose_device("auto", 0)
    assert "13.0" in refused.value.cause
    assert "trainer.device=cpu" in refused.value.fix
    assert choose_device("cpu", 0) == torch.device("cpu")


def test_a_gpu_is_a_gpu(machine):
    machine(count=8)
    assert choose_device("auto", 5) == torch.device("cuda", 5)
    assert choose_device("cuda", 0) == torch.device("cuda", 0)


def test_a_local_rank_without_a_gpu_is_refused(machine):
    machine(count=2)
    with pytest.raises(UserError, match="torch sees 2") as refused:
        choose_device("auto", 2)
    assert "--nproc-per-node 2" in refused.value.fix


@pytest.mark.parametrize(
    ("capability", "is_refused"), [((7, 0), True), ((7, 5), False), ((8, 9), False), ((12, 1), False)]
)
def test_a_gpu_that_torch_has_no_code_for_is_refused(machine, capability, is_refused):
    machine(capability=capability)
    if not is_refused:
        assert choose_device("auto", 0).type == "cuda"
        return
    with pytest.raises(UserError, match=r"7\.0.*7\.5"):
        choose_device("auto", 0)


def test_emulated_bf16_is_refused_unless_it_is_not_wanted(machine):
    machine(capability=(7, 5))
    gpu = torch.device("cuda", 0)
    for precision in ("auto", "bf16"):
        with pytest.raises(UserError, match="bfloat16") as refused:
            autocast(precision, gpu)
        assert "precision=fp32" in refused.value.fix
    assert autocast("bf16", torch.device("cpu")).fast_dtype == torch.bfloat16
