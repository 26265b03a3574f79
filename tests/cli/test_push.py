"""`rung push`: what is sent to a hub, what its card says, and what the hub or Rung refuses.

The hub is a server on this machine that speaks its protocol: repositories, commits, and files of any size through LFS.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants

import rung
from processes import inside
from rung.commands import push
from rung.exporting import model_card

# huggingface_hub's own upload
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@dataclass
class Hub:
    """What a hub holds, and how it answers."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    is_private: bool | None = None
    token: str | None = None
    refuses: int | None = None


class HubHandler(BaseHTTPRequestHandler):
    """The routes of a hub."""

    @property
    def hub(self) -> Hub:
        found: Any = self.server
        assert isinstance(found.hub, Hub)
        return found.hub

    def log_message(self, *_: object) -> None:
        pass

    def read(self) -> bytes:
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def reply(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.hub.refuses is not None:
            self.reply({"error": "not with this token"}, self.hub.refuses)
            return
        files = self.hub.files.items()
        self.reply([{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in files])

    def do_PUT(self) -> None:
        self.hub.uploads[self.path.rpartition("/")[2]] = self.read()
        self.reply({})

    def do_POST(self) -> None:
        body = self.read()
        self.hub.token = self.headers.get("authorization")
        answers = {
            "/api/repos/create": self.create,
            "/api/validate-yaml": lambda _: {"errors": [], "warnings": []},
            "/api/models/owner/name/preupload/main": self.choose_way,
            "/owner/name.git/info/lfs/objects/batch": self.allow_uploads,
            "/api/models/owner/name/commit/main": self.commit,
        }
        if self.hub.refuses is not None:
            self.reply({"error": "not with this token"}, self.hub.refuses)
        else:
            self.reply(answers[self.path](body))

    def create(self, body: bytes) -> Any:
        asked = json.loads(body)
        self.hub.is_private = asked.get("private", asked.get("visibility") == "private")
        return {"url": f"{self.hub.url}/owner/name"}

    def choose_way(self, body: bytes) -> Any:
        files = json.loads(body)["files"]
        modes = ["lfs" if file["size"] > 10_000 else "regular" for file in files]
        ways = zip(files, modes, strict=True)
        return {"files": [{"path": f["path"], "uploadMode": mode, "shouldIgnore": False} for f, mode in ways]}

    def allow_uploads(self, body: bytes) -> Any:
        objects = json.loads(body)["objects"]
        actions = [{"upload": {"href": f"{self.hub.url}/put/{o['oid']}"}} for o in objects]
        return {"objects": [{**o, "actions": action} for o, action in zip(objects, actions, strict=True)]}

    def commit(self, body: bytes) -> Any:
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.hub.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            if entry["key"] == "lfsFile":
                self.hub.files[entry["value"]["path"]] = self.hub.uploads[entry["value"]["oid"]]
        return {"commitOid": "a" * 40, "commitUrl": f"{self.hub.url}/owner/name/commit/{'a' * 40}"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.hub = state = Hub(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    original = huggingface_hub.HfApi.__init__

    def here(self: Any, **options: Any) -> None:
        original(self, **{**options, "endpoint": state.url})

    monkeypatch.setattr(huggingface_hub.HfApi, "__init__", here)
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(config: Path, tmp_path: Path, capsys: Any) -> Path:
    assert inside(capsys, "train", config)[0] == 0
    assert inside(capsys, "eval", tmp_path / "run")[0] == 0
    return tmp_path / "run"


def front_of(card: str) -> dict[str, Any]:
    front = yaml.safe_load(card.split("---")[1])
    assert isinstance(front, dict)
    return front


def test_a_run_goes_to_the_hub(run: Path, tmp_path: Path, hub: Hub, capsys: Any) -> None:
    """The adapter and its card, byte for byte; no data, no log and no path of this machine."""
    code, out, err = inside(capsys, "push", run, "owner/name", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert (
        set(hub.files)
        == {file["name"] for file in result["files"]}
        == {
            *("README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"),
            *("generation_config.json", "rung.json", "rung_prompt.json", "tokenizer.json", "tokenizer_config.json"),
        }
    )
    weights = (run / "adapter/adapter_model.safetensors").read_bytes()
    assert hub.files["adapter_model.safetensors"] == weights and hub.uploads[hashlib.sha256(weights).hexdigest()]
    assert hub.is_private is True and hub.token == "Bearer hf_secret"
    assert not [name for name, content in hub.files.items() if str(tmp_path).encode() in content]
    card = hub.files["README.md"].decode()
    assert card == result["card"] and front_of(card)["model-index"][0]["results"] and "# name\n" in card
    assert "is no repository of the hub" in result["notes"][0] and "is no repository of the hub" in card
    assert "from_pretrained('\"'\"'path/to/tiny-llama'\"'\"')" in card
    assert result["commit"] == "a" * 40 and result["url"].endswith("owner/name")
    # a second push leaves what others put there, and says so
    hub.files["picture.png"] = b"x"
    code, out, err = inside(capsys, "push", run, "owner/name", "--public")
    assert code == 0 and "picture.png" in out and "sent to http" in out and hub.files["picture.png"] == b"x"
    assert hub.is_private is False


def test_a_dry_run_sends_nothing(run: Path, hub: Hub, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.delenv("HF_TOKEN")
    code, out, err = inside(capsys, "push", run, "owner/name", "--dry-run")
    assert code == 0 and not hub.files and hub.token is None, err
    assert "adapter_model.safetensors" in out and "## Scores" in out and "nothing was sent to owner/name" in out


def test_the_base_by_its_name_on_the_hub(run: Path, hub: Hub, monkeypatch: Any) -> None:
    """A base of the hub is named as everybody knows it, in the card and where peft reads it."""
    for module in (push, model_card):
        monkeypatch.setattr(module, "public_name", lambda _: "someone/tiny")
    result = rung.push(run, "owner/name")
    assert front_of(result.card)["base_model"] == "someone/tiny" and not result.notes
    assert "vllm serve someone/tiny --enable-lora --lora-modules name=owner/name" in result.card
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "someone/tiny"
    assert json.loads(hub.files["rung.json"])["base"] == "someone/tiny"


def test_a_card_that_its_author_edited(run: Path, tmp_path: Path, hub: Hub, capsys: Any) -> None:
    assert inside(capsys, "export", run, tmp_path / "out", "--as", "merged")[0] == 0
    card = tmp_path / "out/README.md"
    text = card.read_text().replace("## Use\n", "## Limits\n\nFruit alone.\n\n## Use\n\nWith care:\n")
    card.write_text(text.replace("## License", "## Thanks\n\nTo all.\n\n## License"))
    code, _, err = inside(capsys, "push", tmp_path / "out", "owner/name")
    sent = hub.files["README.md"].decode()
    assert code == 0 and "Fruit alone." in sent and "With care:" in sent and "To all." in sent, err
    assert "vllm serve owner/name" in sent and str(tmp_path) not in sent and sent.count("## License") == 1
    (tmp_path / "out/model.safetensors").write_bytes(b"x")
    code, _, err = inside(capsys, "push", tmp_path / "out", "owner/name")
    assert code == 3 and "export it again" in err


@pytest.mark.parametrize("kind", ["gguf", "vllm", "merged"])
def test_an_export_goes_to_the_hub(kind: str, run: Path, tmp_path: Path, hub: Hub, capsys: Any) -> None:
    """Its files as they are, with the commands that load them from there."""
    code, _, err = inside(capsys, "export", run, tmp_path / "out", "--as", kind)
    assert code == 0, err
    code, _, err = inside(capsys, "push", tmp_path / "out", "owner/name")
    assert code == 0, err
    card = hub.files["README.md"].decode()
    command = {
        "gguf": "llama-server --hf-repo owner/name --hf-file out-q8_0.gguf",
        "vllm": "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(",
        "merged": "vllm serve owner/name",
    }
    assert command[kind] in card and card.count("## Use") == 1 and "\n# name\n" in card and "## License" in card
    assert not [name for name, content in hub.files.items() if str(tmp_path).encode() in content]
    assert not [name for name, content in hub.files.items() if str(run).encode() in content]
    sent = {p.name for p in (tmp_path / "out").iterdir()} - {"manifest.json"}
    assert set(hub.files) == sent


def test_a_full_run_and_an_adapter_that_only_rung_registers(config: Path, tmp_path: Path, capsys: Any) -> None:
    expected = {
        "{kind: full}": ("AutoModelForCausalLM.from_pretrained('owner/name')", "model.safetensors"),
        "{kind: bottleneck, width: 4}": ("import rung.peft", "adapter_model.safetensors"),
        "{kind: prompt}": ("from peft import PeftModel", "adapter_model.safetensors"),
    }
    for method, (command, file) in expected.items():
        assert inside(capsys, "train", config, f"method={method}", "--overwrite")[0] == 0
        result = rung.push(tmp_path / "run", "owner/name", rung.PushRequest(is_dry_run=True))
        # quoted for a shell
        assert command.replace("'", "'\"'\"'") in result.card and file in {f.name for f in result.files}
        assert "rung eval" in result.notes[-1]


def test_what_is_refused(run: Path, tmp_path: Path, config: Path, hub: Hub, capsys: Any, monkeypatch: Any) -> None:
    for name in ("name", "a/b/c", "owner/na me", "../x", "owner/x--y", "me/x-", "me/x.git", "a/x.", f"a/{'x' * 120}"):
        code, _, err = inside(capsys, "push", run, name)
        assert code == 2 and "no name of a repository" in err
    for target in (tmp_path, tmp_path / "nowhere", "smollm2-135m", "http://localhost:1/v1"):
        code, _, err = inside(capsys, "push", target, "owner/name")
        assert code == 2 and "neither a run nor an export" in err
    for status, word in ((401, "hf auth login"), (403, "HF_TOKEN"), (500, "500")):
        hub.refuses = status
        code, _, err = inside(capsys, "push", run, "owner/name")
        assert code == 3 and word in err and "Traceback" not in err and "hf_secret" not in err, err
    hub.refuses = None
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        code, _, err = inside(capsys, "push", run, "owner/name")
        assert code == 3 and "HF_HUB_OFFLINE" in err
    with monkeypatch.context() as patch:
        patch.setattr(hub, "url", "http://127.0.0.1:9")
        code, _, err = inside(capsys, "push", run, "owner/name")
        assert code == 3 and "--dry-run" in err, err
    # a run on a run: its adapter fits no model that others have
    second = (f"model.name={run}", f"output={tmp_path / 'second'}")
    assert inside(capsys, "train", config, *second)[0] == 0
    code, _, err = inside(capsys, "push", tmp_path / "second", "owner/name")
    assert code == 3 and "--as merged" in err
    settings = json.loads((tmp_path / "second/adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(run)  # and not the files that the first run stands on
    (run / "adapter/adapter_model.safetensors").write_bytes(b"x")
    code, _, err = inside(capsys, "push", run, "owner/name")
    assert code == 3 and not hub.files
