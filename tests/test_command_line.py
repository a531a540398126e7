"""What was typed is taken as it was typed; slips in files, values and sweeps are named."""

import shlex
import shutil
import sys

import hydra
import pytest

import evaluate
from contextual_cnn import exits
from contextual_cnn.command_line import check_sweep
from tests.helpers.commands import CONF, read, refused
from tests.helpers.commands import fresh_hydra as _fresh_hydra  # noqa: F401 - a fixture
from tests.helpers.facts import tells

# torchrun's error file wants the real stderr, which pytest holds
pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")


@pytest.fixture
def own_conf(tmp_path):
    """A copy of conf/ to put something into: folder, and the arguments that use it."""
    shutil.copytree(CONF, tmp_path / "conf", ignore=shutil.ignore_patterns("local"))
    (tmp_path / "conf" / "local").mkdir()
    return tmp_path / "conf", ["data.root=x", f"output_dir={tmp_path}/out", "--config-path", str(tmp_path / "conf")]


SPELLINGS = ["123456", "001", "1e5", "0x10", "1_000", "true", "False", "-1.50", "+1", "inf", "12:30:00", "1.", "a/b"]


@pytest.mark.parametrize("before", [[], ["--multirun", "seed=1,2"]], ids=["one run", "a sweep"])
def test_a_text_is_what_was_typed(before, monkeypatch, tmp_path):
    """As a shell makes it of run_name=$SLURM_JOB_ID."""
    keys = ["run_name", "output_dir", "data.root", "logger.project", "logger.entity", "data.exclude"]
    for first in range(0, len(SPELLINGS), len(keys)):
        typed = SPELLINGS[first : first + len(keys)]
        arguments = [*before, *map("=".join, zip(keys, typed, strict=False)), f"hydra.sweep.dir={tmp_path}"]
        for config in read([*arguments, *(["data.root=x"] if len(typed) < 3 else [])], monkeypatch):
            found = [config["run_name"], config["output_dir"], config["data"]["root"]]
            found += [config["logger"]["project"], config["logger"]["entity"], config["data"]["exclude"]]
            assert found[: len(typed)] == typed


def test_null_is_a_name_where_nothing_is_not_allowed(monkeypatch):
    (config,) = read(["run_name=null", "data.root=NULL", "data.exclude=null", "logger.entity=null"], monkeypatch)
    assert (config["run_name"], config["data"]["root"]) == ("null", "NULL")
    assert config["data"]["exclude"] is config["logger"]["entity"] is None
    (config,) = read(["checkpoint=0123", "per_class=1e5", "predictions=null"], monkeypatch, evaluate)
    assert (config["checkpoint"], config["per_class"], config["predictions"]) == ("0123", "1e5", None)


def test_every_run_of_a_sweep_has_the_text_that_was_typed(monkeypatch, tmp_path):
    arguments = ["--multirun", "run_name=001,1e5,1_0,x", "data.root=1_000", f"hydra.sweep.dir={tmp_path}"]
    configs = read(arguments, monkeypatch)
    assert [config["run_name"] for config in configs] == ["001", "1e5", "1_0", "x"]
    assert {config["data"]["root"] for config in configs} == {"1_000"}


def test_texts_refer_to_each_other_as_typed(monkeypatch):
    (config,) = read(["run_name=1_000", "logger.project=${run_name}", "data.root='${output_dir}/x'"], monkeypatch)
    assert (config["logger"]["project"], config["data"]["root"]) == ("1_000", "outputs/x")


def test_a_number_in_a_file_is_no_text_and_the_fix_has_its_quotes(own_conf, monkeypatch, capsys):
    """The file has been read by then: 0012 has become 10."""
    folder, arguments = own_conf
    (folder / "experiment" / "mine.yaml").write_text("# @package _global_\nrun_name: 0012\n")
    cause, fix = refused(["experiment=mine", *arguments], monkeypatch, capsys)
    assert tells(cause, "run_name=10")
    assert 'run_name: "10"' in fix


@pytest.mark.parametrize(
    ("choices", "fix"),
    [
        (["local@data=imagnet"], "local=imagenet"),
        (["experiment=digit"], "experiment=digits"),
        (["--multirun", "experiment=digits,table1_q"], "experiment=table1_"),
    ],
)
def test_a_choice_that_was_typed_must_be_there(choices, fix, own_conf, monkeypatch, capsys):
    folder, arguments = own_conf
    (folder / "local" / "imagenet.yaml").write_text("threads: 1\n")
    cause, found = refused([*choices, *arguments], monkeypatch, capsys)
    assert "there is no" in cause
    assert fix in found
    assert not (folder.parent / "out" / "digits_contextual_convnext_atto").exists()


@pytest.mark.parametrize(
    ("file", "text", "line"),
    [
        ("local/imagenet.yaml", "threads: 2\nroot: [/x\n", 3),
        ("local/imagenet.yaml", "root: /x\n\tthreads: 2\n", 2),
        ("local/imagenet.yaml", "threads: 2\nthreads: 3\n", 2),
        ("model/mine.yaml", "name: resnet18\nnum_classes: null: 2\n", 2),
        ("experiment/mine.yaml", "# @package _global_\nrun_name: 'x\n", 3),
    ],
)
def test_a_slip_in_a_file_is_named_with_its_line(file, text, line, own_conf, monkeypatch, capsys):
    folder, arguments = own_conf
    (folder / file).write_text(text)
    group, _, name = file.removesuffix(".yaml").partition("/")
    cause, _ = refused([*([f"{group}={name}"] if name == "mine" else []), *arguments], monkeypatch, capsys)
    assert tells(cause, f"{folder / file}", f"{line}")


@pytest.mark.parametrize(
    "argument",
    [
        "data.root=/my photos (1)",
        "data.root=/x/[old], new",
        "run_name=my run (1)",
        "data.root=/it's {here}",
        "data.root=a,b",
    ],
)
def test_a_value_that_needs_quotes_is_shown_in_them(argument, monkeypatch, capsys):
    _, fix = refused([argument, "resume=x"], monkeypatch, capsys)
    typed = shlex.split(fix.partition(": ")[2].partition("; ")[0])
    (config,) = read([*(["data.root=x"] if "root" not in argument else []), *typed], monkeypatch)
    assert argument.partition("=")[2] in (config["run_name"], config["data"]["root"])


@pytest.mark.parametrize("argument", ["/data/imagenet", "my photo", "data root=/x", "{a: 1}"])
def test_an_argument_that_is_no_key_and_value_is_named(argument, monkeypatch, capsys):
    cause, fix = refused([argument], monkeypatch, capsys)
    assert repr(argument) in cause
    assert "=" in fix or "GROUP" in fix


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        (["seed=1,2", "run_name=mr"], ["run_name=mr_${seed}"]),
        (["optimizer.lr=1e-3,2e-3"], ["run_name=${model.name}_${optimizer.lr}"]),
        (["seed=1,2", "optimizer.lr=1,2", "run_name='x_${seed}'"], ["run_name=x_${seed}_${optimizer.lr}"]),
        (["run_name=a,b", "seed=1,2"], None),
        (["experiment=digits,glyphs", "run_name=x"], None),
        (["augment=none,convnext"], None),
    ],
)
def test_runs_of_a_sweep_need_names_of_their_own(arguments, fix, monkeypatch, capsys, tmp_path):
    """Or the second would wait for the first to end, which is itself."""
    found = refused(["--multirun", "data.root=x", f"output_dir={tmp_path}", *arguments], monkeypatch, capsys)
    assert "run_name=" in found[0]
    if fix is not None:
        assert shlex.split(found[1]) == fix
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["seed=1,2", "run_name='x_${seed}'"],
        ["model=convnext_t,convnext_s"],
        ["experiment=digits,glyphs"],
        ["run_name=a,b"],
        ["experiment=digits,table1_t", "run_name='x_${model.name}'"],
    ],
)
def test_sweeps_with_names_of_their_own_start(arguments, monkeypatch, tmp_path):
    started = []

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
    @exits.job
    def main(config):
        check_sweep(config, "run_name")
        started.append(config.run_name)

    monkeypatch.setattr(sys, "argv", ["train.py", "--multirun", f"output_dir={tmp_path}", *arguments])
    exits.run(main)
    assert len(set(started)) == 2


def test_a_missing_key_of_an_own_group_is_named(own_conf, monkeypatch, capsys):
    folder, arguments = own_conf
    (folder / "model" / "mine.yaml").write_text("num_classes: null\n")
    cause, fix = refused(["model=mine", "run_name=x", *arguments], monkeypatch, capsys)
    assert tells(cause, "model.name")
    assert "model.name=VALUE" in fix
