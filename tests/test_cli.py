import resource
import subprocess
import sys

import pytest
import typer
from command_line import run_command
from fresh_python import run_fresh
from typer.testing import CliRunner

from biomedclip import __version__, cli
from biomedclip.errors import ConfigError

COMMANDS = typer.main.get_command(cli.app).commands
OPTIONS = {
    "demo": {"--out", "--set"},
    "build": {"config", "--out", "--set", "--print-config"},
    "train": {
        "config",
        "--out",
        "--set",
        "--resume",
        "--allow-plan-change",
        "--dry-run",
        "--json",
        "--samples-s",
        "--print-config",
    },
    "evaluate": {"config", "--out", "--set", "--print-config"},
    "wise": {"run", "--out", "--alpha", "--start"},
    "forgetting": {"runs"},
    "teach": {"config", "--teacher", "--name", "--views", "--out", "--set"},
    "classify": {
        "images",
        "--labels",
        "--task",
        "--prompts",
        "--template",
        "--window",
        "--model",
        "--top",
        "--json",
        "--csv",
        "--fast",
        "--overwrite",
    },
    "search": {
        "dataset",
        "query",
        "--image",
        "--window",
        "--model",
        "--top",
        "--json",
        "--html",
        "--overwrite",
    },
    "explain": {
        "image",
        "--label",
        "--against",
        "--out",
        "--window",
        "--frame",
        "--model",
        "--json",
        "--overwrite",
    },
    "app": {"--dataset", "--results", "--model", "--host", "--port", "--max-upload-mb"},
    "models": set(),
    "doctor": set(),
}
EVAL_OPTIONS = {
    "run": {
        "--model",
        "--out",
        "--suite",
        "--task",
        "--data-root",
        "--images",
        "--template",
        "--scores",
        "--given",
        "--report",
        "--set",
    },
    "tasks": {"--suite"},
    "check": {"task", "--data-root"},
    "compare": {"first", "second", "--resamples"},
    "report": {"results", "--out"},
}


def run(*arguments, **kw):
    return subprocess.run([sys.executable, "-m", "biomedclip", *arguments], capture_output=True, text=True, **kw)


DATA_OPTIONS = {
    "harvest": {"plan", "--source", "--out", "--set", "--workers", "--engine", "--unit-slice", "--retry-failed"},
    "select": {"raws", "--out", "--config", "--set"},
    "pack": {"selection", "--out", "--set", "--workers", "--engine"},
    "hashes": {"source", "--out", "--layout", "--set", "--name"},
    "purge": {"folder", "--diff", "--articles", "--reason", "--stated"},
    "diff": {"old", "new", "--out"},
    "export": {"folder", "--schema", "--out", "--csv-separator", "--set"},
    "repair": {"folder", "--selection", "--workers"},
    "mesh": {"files", "--out"},
    "plan": {"source", "--out", "--set", "--only"},
    "estimate": {"plan", "--set"},
    "report": {"folder", "--out", "--seed"},
    "annotate": set(),
    "augmentations": {"source", "--out", "--preset", "--samples", "--views", "--size", "--seed"},
    "entries": {"folders", "--terms", "--out", "--tail", "--split", "--case"},
    "inspect": {"article", "--source", "--html", "--set"},
    "verify": {"folder"},
    "compile": {"recipe", "--root", "--out", "--set", "--workers", "--names"},
    "lint": {"recipe", "--context"},
    "recipes": set(),
    "sentences": {"articles", "--out", "--recipes"},
}


MODEL_OPTIONS = {
    "list": {"--domain"},
    "info": {"name"},
    "pull": {"name", "--out", "--revision"},
    "verify": {"target", "--model", "--offline", "--trust-pickle"},
    "convert": {"name", "checkpoint", "--out", "--trust-pickle"},
    "export": {"source", "--out", "--format", "--checkpoint", "--push", "--private", "--half", "--trust-pickle"},
    "calibrate": {"model", "--task", "--data", "--out", "--accuracy", "--quantile"},
    "card": {"target", "--out", "--notes", "--results", "--before", "--model"},
}


def test_the_commands_about_runs_and_their_options_are_frozen():
    found = COMMANDS["runs"].commands
    options = {n: {p.opts[0] for p in c.params if p.opts[0] != "--help"} for n, c in found.items()}
    assert options == {"seen": {"run", "--step", "--article", "--key", "--json"}}


def test_the_commands_about_models_and_their_options_are_frozen():
    found = COMMANDS["models"].commands
    assert {n: {p.opts[0] for p in c.params if p.opts[0] != "--help"} for n, c in found.items()} == MODEL_OPTIONS


VQA_OPTIONS = {
    "check": {"data", "--layout", "--language"},
    "score": {"data", "answers", "--layout", "--language", "--split", "--phrase-type", "--resamples"},
    "rank": {"data", "--model", "--out", "--layout", "--language", "--split", "--phrase-type", "--resamples"},
}


def test_the_commands_about_questions_and_their_options_are_frozen():
    found = COMMANDS["vqa"].commands
    assert {n: {p.opts[0] for p in c.params if p.opts[0] != "--help"} for n, c in found.items()} == VQA_OPTIONS


def test_the_commands_of_evaluation_and_their_options_are_frozen():
    found = COMMANDS["eval"].commands
    assert {n: {p.opts[0] for p in c.params if p.opts[0] != "--help"} for n, c in found.items()} == EVAL_OPTIONS


def test_the_commands_and_their_options_are_frozen():
    data = COMMANDS["data"].commands
    assert {n: {p.opts[0] for p in c.params if p.opts[0] != "--help"} for n, c in data.items()} == DATA_OPTIONS
    found = {
        name: {p.opts[0] for p in command.params if p.opts[0] != "--help"}
        for name, command in COMMANDS.items()
        if name not in ("data", "runs", "eval", "vqa")
    }
    assert found == OPTIONS


@pytest.mark.parametrize(
    "name",
    [
        *OPTIONS,
        *(f"data {name}" for name in DATA_OPTIONS),
        *(f"models {name}" for name in MODEL_OPTIONS),
        *(f"eval {name}" for name in EVAL_OPTIONS),
        *(f"vqa {name}" for name in VQA_OPTIONS),
    ],
)
def test_every_command_has_help_and_an_example(name):
    done = CliRunner().invoke(cli.app, [*name.split(), "--help"])
    assert done.exit_code == 0
    assert f"Example: biomedclip {name}" in " ".join(done.output.split())


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["demo", "--help"]])
def test_help_imports_no_torch_and_is_quick(arguments):
    _, loaded = run_fresh(f"from biomedclip.cli import app\napp({arguments!r}, standalone_mode=False)")
    assert loaded & {"torch", "pyarrow", "lxml", "open_clip", "lightning", "numpy"} == set()
    # The promise is half a second; processor time is what the code costs, not what else the machine does. A slow
    # machine, or one whose cores share a busy one, takes up to twice that, and may be busy once or twice.
    spent = [2.0]
    while min(spent) >= 1.0 and len(spent) < 4:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run(*arguments).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(spent) < 1.0


def test_the_version_is_printed():
    assert run("--version").stdout.strip() == __version__


def test_a_mistake_in_a_config_is_one_line_and_exit_2(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("zzz: 1\n")
    done = run("train", str(path), "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert all(str(path) in line for line in done.stderr.strip().splitlines())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_missing_config_is_one_line_and_exit_2(tmp_path):
    done = run("build", str(tmp_path / "no.yaml"), "--out", str(tmp_path / "x"))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}/no.yaml: there is no such file")


def test_an_unknown_command_is_exit_2():
    assert run("demmo").returncode == 2


def test_the_resolved_config_can_be_printed_and_read_back(tmp_path):
    from biomedclip.config import config_file, load_config
    from biomedclip.training.config import TrainConfig

    path = config_file("train/demo.yaml")
    done = run("train", str(path), "--out", str(tmp_path / "r"), "--set", "seed=7", "--print-config", check=True)
    copy = tmp_path / "copy.yaml"
    copy.write_text(done.stdout)
    assert load_config(copy, TrainConfig) == load_config(path, TrainConfig, ["seed=7"])
    assert load_config(copy, TrainConfig).seed == 7


def test_a_plan_is_made_estimated_and_a_dataset_verified_from_the_command_line(tmp_path):
    from importlib import resources

    sample = str(resources.files("data_builders") / "sample" / "pmc")
    plan = str(tmp_path / "plan.parquet")
    done = run_command("data", "plan", sample, "--out", plan, "--set", "licence=commercial", "--set", "limit=5")
    assert "5 planned in 1 units" in done.stdout
    assert "articles   5 in 1 units" in run_command("data", "estimate", plan, "--set", "cores=4").stdout
    refused = run_command("data", "plan", sample, "--out", plan)
    assert (refused.returncode, refused.stderr) == (2, "error: --set: licence: is missing; add it\n")
    broken = run_command("data", "verify", tmp_path)
    assert broken.returncode == 2
    assert "holds no finished dataset" in broken.stderr


def test_a_missing_package_of_an_extra_is_one_line(monkeypatch, capsys):
    def fail(**_):
        raise ModuleNotFoundError("No module named 'gradio'", name="gradio")

    from biomedclip import doctor

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(doctor, "list_packages", lambda: [doctor.Package("app", "gradio", ">=5.0", None)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert "pip install 'biomedclip[app]'" in capsys.readouterr().err


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch):
    def fail(**_):
        raise ModuleNotFoundError("No module named 'biomedclip.lost'", name="biomedclip.lost")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(ModuleNotFoundError):
        cli.main()


def test_user_errors_are_exit_2(monkeypatch, capsys):
    def fail(**_):
        raise ConfigError("a.yaml", "is empty")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: a.yaml: is empty\n"


def test_models_lists_names_without_torch():
    text, loaded = run_fresh("from biomedclip.models.catalog import models_table\nprint(models_table())")
    assert "biomedclip-demo" in text
    assert "torch" not in loaded
