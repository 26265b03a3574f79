"""Which routine multiplies float32 matrices: measured once a machine, and as the user says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch

from rung.errors import ConfigError
from rung.models import matmul, matmul_routine
from rung.models.matmul_routine import fastest_routine, resolve_routine, settle_routine, settle_routine_once


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own; the routine of this process is restored."""
    monkeypatch.setenv("RUNG_CACHE", str(tmp_path))
    monkeypatch.setattr(matmul, "_routine", "onednn")
    monkeypatch.setattr(matmul_routine, "_settled", False)
    return tmp_path


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    """Seconds that a call of each routine takes by the clock."""
    seconds, clock = {"onednn": 1.0, "blas": 1.0}, [0.0]

    def onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        clock[0] += seconds["onednn"]
        return x

    class Operand(torch.Tensor):
        def __matmul__(self, other: object) -> torch.Tensor:
            clock[0] += seconds["blas"]
            return self

    monkeypatch.setattr(matmul_routine, "onednn_linear", onednn)
    monkeypatch.setattr(matmul_routine.torch, "randn", lambda *shape, generator: torch.zeros(1, 1).as_subclass(Operand))
    monkeypatch.setattr(matmul_routine.time, "perf_counter", lambda: clock[0])
    yield seconds


@pytest.mark.parametrize(
    ("blas_seconds", "faster"), [(0.5, "blas"), (0.94, "blas"), (0.96, "onednn"), (1.0, "onednn"), (2.0, "onednn")]
)
def test_the_faster_one_is_taken(slow: dict[str, float], blas_seconds: float, faster: str) -> None:
    slow["blas"] = blas_seconds
    assert fastest_routine() == faster


def test_it_is_measured_once_a_machine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count()
    monkeypatch.setattr(matmul_routine, "_measure", lambda: next(calls) and "onednn" or "blas")
    assert [fastest_routine() for _ in range(3)] == ["blas"] * 3 and next(calls) == 1
    # a number of threads, a version of torch and limits of instruction sets are machines of their own
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert fastest_routine() == "onednn"
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    assert fastest_routine() == "blas"
    stored = json.loads((cache / "matmul.json").read_text())
    assert len(stored) == 2 and all(torch.__version__ in key for key in stored)


@pytest.mark.parametrize("content", ["{", "[1]", "7", '{"x": 1}', "\x00"])
def test_a_damaged_cache_is_measured_again(content: str, cache: Path) -> None:
    (cache / "matmul.json").write_text(content)
    assert fastest_routine() in ("onednn", "blas")
    assert set(json.loads((cache / "matmul.json").read_text()).values()) <= {"onednn", "blas", 1}


def test_a_cache_that_cannot_be_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ended every command: the error of a failed write is one of Rung's own."""
    (cache / "matmul.json").mkdir()
    assert fastest_routine() in ("onednn", "blas")
    (cache / "file").write_text("")
    monkeypatch.setenv("RUNG_CACHE", str(cache / "file" / "below"))
    assert fastest_routine() in ("onednn", "blas")


def test_a_command_keeps_its_routine_for_all_models(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A teacher, a judge or a reward model has a config of its own, and the last one loaded decided."""
    monkeypatch.setattr(matmul_routine, "_measure", lambda: "onednn")
    settle_routine("blas")
    settle_routine_once("auto")
    settle_routine_once("blas")
    assert capsys.readouterr().err == ""
    settle_routine_once("onednn")
    assert matmul.routine_in_use() == "blas"
    assert "model.matmul: onednn is not followed" in capsys.readouterr().err
    settle_routine(resolve_routine("auto"))  # the next command of this process
    assert matmul.routine_in_use() == "onednn"


@pytest.mark.parametrize("routine", ["onednn", "blas"])
def test_the_users_choice_is_not_measured(
    routine: matmul.Routine, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it decides which routine multiplies."""
    used: list[str] = []
    whole = matmul.onednn_linear
    monkeypatch.setattr(matmul, "onednn_linear", lambda *a: used.append("onednn") or whole(*a))
    settle_routine_once(routine)
    x, weight = torch.randn(5, 8), torch.randn(6, 8)
    assert torch.allclose(matmul.linear(x, weight), x @ weight.T, atol=1e-6)
    assert used == (["onednn"] if routine == "onednn" else []) and matmul.routine_in_use() == routine
    assert not (cache / "matmul.json").exists()


def test_without_onednn_there_is_the_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul.torch.backends.mkldnn, "is_available", lambda: False)
    assert fastest_routine() == "blas" == matmul.routine_in_use()
    with pytest.raises(ConfigError, match="no oneDNN"):
        resolve_routine("onednn")
