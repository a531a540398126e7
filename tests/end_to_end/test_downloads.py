"""A config asks for no file and no address: not one in a stranger's checkpoint, and not one on the command line.

timm's loader is the target: with pretrained=True and a URL it downloads (http:, data: and file:) into cache_dir before
it looks at the content, so a checkpoint could put a file wherever Python runs it later.
"""

import inspect
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    load_custom_pretrained,
    load_pretrained,
    resolve_pretrained_cfg,
)

import train
from contextual_cnn import exits
from contextual_cnn.errors import UserError
from contextual_cnn.models import build_model
from contextual_cnn.settings.model import ModelSettings
from contextual_cnn.trained import load_model
from tests.conftest import small_run
from tests.helpers.hostile import write_whole
from tests.helpers.quick_start import run
from tests.helpers.run_folders import write_run

pytestmark = pytest.mark.run

LOADERS = (
    timm.create_model,
    build_model_with_cfg,
    load_pretrained,
    load_custom_pretrained,
    resolve_pretrained_cfg,
    torch.hub.load_state_dict_from_url,
    PretrainedCfg,
)
KEYS = sorted({name for loader in LOADERS for name in inspect.signature(loader).parameters})
KEYS += ["features_only", "out_indices", "feature_cls", "pruned", "use_naflex", "device", "cfg"]
SIZE = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}


class Watch:
    """A machine of its own: a server that counts, and a home where every new file is seen."""

    def __init__(self, folder: Path) -> None:
        self.requests: list[str] = []
        watch = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                watch.requests.append(self.path)
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"import os")

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.folder, self.secret = folder, folder / "secret.pth"
        self.secret.write_bytes(b"secret")
        self.urls = {
            "http": f"http://127.0.0.1:{self.server.server_port}/x.pth",
            "data": "data:,import os;os.system('id') #/x.pth",
            "file": f"file://{self.secret}",
        }
        names = ("HOME", "TORCH_HOME", "HF_HOME", "XDG_CACHE_HOME", "cwd", "cache")
        self.folders = {name: folder / "machine" / name for name in names}
        for name in names[:-1]:
            self.folders[name].mkdir(parents=True)
        self.environment = {name: str(self.folders[name]) for name in names[:4]}
        self.environment["MPLCONFIGDIR"] = str(folder)  # its list of fonts is not what is looked for
        self.before = self.files()

    def files(self) -> set[str]:
        return {str(path) for path in (self.folder / "machine").rglob("*")}

    def attack(self, kind: str) -> dict:
        """Everything that timm's loader needs."""
        source = {"url": self.urls[kind]}
        return {"pretrained": True, "pretrained_cfg": source, "cache_dir": str(self.folders["cache"])}

    def value_of(self, key: str, kind: str):
        """The worst value of a loader's key."""
        source = {"url": self.urls[kind], "file": str(self.secret), "source": "", "custom_load": True}
        values = {
            "pretrained": True, "pretrained_cfg": source, "pretrained_cfg_overlay": source, "features_only": True,
            "cache_dir": str(self.folders["cache"]), "model_dir": str(self.folders["cache"]), "pruned": True,
            "checkpoint_path": str(self.secret), "file": str(self.secret), "pretrained_strict": False,
            "model_name": f"local-dir:{self.folder}", "state_dict": {"x": 1}, "cfg": source,
        }  # fmt: skip
        return values.get(key, self.urls[kind])

    def assert_untouched(self) -> None:
        assert self.requests == []
        assert self.files() == self.before


@pytest.fixture
def watch(tmp_path, monkeypatch):
    watch = Watch(tmp_path)
    for name, value in watch.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(watch.folders["cwd"])
    yield watch
    watch.server.shutdown()
    watch.server.server_close()


@pytest.fixture
def checkpoint(tmp_path):
    """Writes a checkpoint whose config has been changed; all else in it is right."""
    folder = tmp_path / "made"
    write_run(folder, timm_options=SIZE)
    state = torch.load(folder / "checkpoints" / "best.pt", weights_only=True)
    model = dict(state["config"]["model"])

    def write(few_tensors: bool = True, **changes) -> Path:
        state["config"]["model"] = model | changes
        tensors = {"w": torch.ones(1)} if few_tensors else state["model"]  # a model is built before they are looked at
        return write_whole(state | {"model": tensors}, tmp_path / "x.pt")

    return write


@pytest.mark.parametrize("kind", ["http", "data", "file"])
def test_the_watch_sees_what_timm_itself_does(kind, watch):
    with pytest.raises(Exception, match=r".*"):  # whatever comes after the download
        timm.create_model("convnext_atto", **watch.attack(kind))
    with pytest.raises(AssertionError):
        watch.assert_untouched()
    assert len(list(watch.folders["cache"].iterdir())) == 1


@pytest.mark.parametrize("kind", ["http", "data", "file"])
def test_no_key_of_the_loader_comes_from_a_checkpoint(kind, watch, checkpoint):
    assert {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "checkpoint_path"} < set(KEYS)
    for key in KEYS:
        value = watch.value_of(key, kind)
        in_place = [{"timm_options": {key: value}}, {"timm_options": SIZE | watch.attack(kind) | {key: value}}]
        for changes in (
            *in_place,
            in_place[1] | {"name": "convnext_atto"},
            {key: value},
        ):  # the last: a key of the group
            with pytest.raises(UserError):
                load_model(checkpoint(**changes))
    watch.assert_untouched()


@pytest.mark.parametrize("kind", ["http", "data", "file"])
@pytest.mark.parametrize("command", ["evaluate.py", "scripts/model/export.py"])
def test_no_command_fetches_for_a_checkpoint(command, kind, watch, checkpoint, tmp_path):
    path = checkpoint(timm_options=watch.attack(kind))
    arguments = [f"checkpoint={path}"] if command == "evaluate.py" else ["--checkpoint", str(path), "--format", "timm"]
    status, printed = run(
        command, *arguments, output=tmp_path / "output", folder=watch.folders["cwd"], **watch.environment
    )
    assert status == 2, printed
    assert "pretrained" in printed.splitlines()[0]
    watch.assert_untouched()


def variations(watch) -> dict[str, dict]:
    """The model group of a checkpoint, by what is tried."""
    url, folder = watch.urls["http"], str(watch.folder)
    full = watch.attack("http")
    return {
        "a name of the hub": dict(name="hf-hub:timm/resnet18.a1_in1k"),
        "its older spelling": dict(name="hf_hub:timm/resnet18.a1_in1k"),
        "in capitals": dict(name="HF-HUB:timm/resnet18"),
        "a local folder": dict(name=f"local-dir:{folder}"),
        "an owner and a name": dict(name="timm/resnet18"),
        "a tag": dict(name="resnet18.a1_in1k"),
        "an empty tag": dict(name="resnet18."),
        "a tag that is an address": dict(name=f"convnext_atto.{url}"),
        "a name of other letters": dict(name="соnvnext_atto"),  # noqa: RUF001 - Cyrillic
        "capitals in a key": dict(timm_options={key.upper(): value for key, value in full.items()}),
        "a blank behind a key": dict(timm_options={f"{key} ": value for key, value in full.items()}),
        "wide letters in a key": dict(timm_options={"ｐretrained": True, "ｃache_dir": folder}),  # noqa: RUF001
        "overlay in an overlay": dict(timm_options={"pretrained_cfg_overlay": {"pretrained_cfg_overlay": full}}),
        "loader's keys in a size": dict(timm_options={"dims": full}),
        "in a list of a size": dict(timm_options={"dims": [8, 16, 24, full]}),
        "an address as a layer": dict(timm_options={"act_layer": url}),
        "a path as a layer": dict(timm_options={"norm_layer": str(watch.secret)}),
        "a folder of weights": dict(timm_options={"stem_type": folder}),
        "a list instead of keys": dict(timm_options=[["pretrained", True]]),
        "class counts that are keys": dict(class_counts=full),
        "an embedding that is keys": dict(embedding_dim={"url": url}),
        "through another key of the group": dict(projection_norm=full),
        "a convolution": dict(convolution=url),
    }


def test_variations_of_the_attack(watch, checkpoint):
    for what, changes in variations(watch).items():
        path = checkpoint(**changes)
        with pytest.raises(UserError):
            print(what, load_model(path))
    watch.assert_untouched()


def test_weights_that_a_checkpoint_names_are_not_opened(watch, checkpoint, tmp_path):
    """Neither a stranger's pickle, nor an address, nor a pipe that would be waited for."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for weights in (str(pipe), watch.urls["http"], str(watch.secret), "hf-hub:timm/resnet18"):
        load_model(checkpoint(few_tensors=False, weights=weights))
    watch.assert_untouched()


@pytest.mark.parametrize("kind", ["http", "data", "file"])
def test_no_key_of_the_loader_reaches_a_model_in_training(kind, watch):
    for key in KEYS:
        for name in ("contextual_convnext_atto", "convnext_atto", "resnet18"):
            with pytest.raises(UserError, match=rf"timm_options.*\b{key}\b"):
                build_model(ModelSettings(name=name, num_classes=6, timm_options={key: watch.value_of(key, kind)}))
    watch.assert_untouched()


@pytest.mark.parametrize(
    "options",
    [
        "{pretrained:true}",
        "{pretrained:true,pretrained_cfg:{url:'URL'},cache_dir:'CACHE'}",
        "{pretrained:true,pretrained_cfg_overlay:{url:'URL'}}",
        "{checkpoint_path:'SECRET'}",
    ],
)
def test_the_command_line_fetches_nothing(options, watch, image_root, tmp_path, monkeypatch, capsys):
    for name, value in (("URL", watch.urls["http"]), ("CACHE", watch.folders["cache"]), ("SECRET", watch.secret)):
        options = options.replace(name, str(value))
    monkeypatch.setattr(sys, "argv", small_run(image_root, tmp_path / "out", f"model.timm_options={options}"))
    with pytest.raises(SystemExit) as stopped:
        exits.run(train.main)
    assert stopped.value.code == 2
    assert "timm_options" in capsys.readouterr().err.splitlines()[0]
    watch.assert_untouched()
    assert not (tmp_path / "out").exists()
