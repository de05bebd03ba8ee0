from typing import Annotated, Literal

import pytest
from pydantic import Field

from biomedclip.config import Config, check_config, load_config, parse_yaml, read_yaml
from biomedclip.errors import ConfigError


class Optim(Config):
    lr: float = 1e-3
    warmup_steps: int = Field(0, ge=0)


class Pmc(Config):
    kind: Literal["pmc"]
    root: str


class Labels(Config):
    kind: Literal["labels"]
    recipe: str


class Run(Config):
    name: str
    loss: Literal["clip", "siglip"] = "clip"
    optim: Optim = Optim()
    sources: tuple[Annotated[Pmc | Labels, Field(discriminator="kind")], ...] = ()


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("no", "no"), ("yes", "yes"), ("on", "on"), ("12:30", "12:30"), ("1_000", "1_000"),
        ("true", True), ("null", None), ("~", None), ("-3", -3), ("0", 0), ("0.5", 0.5), (".inf", float("inf")),
        ("2024-01-31", "2024-01-31"), ("0x10", "0x10"), ("[1, 2.5, a]", [1, 2.5, "a"]), ("1.5e3", 1500.0), ("", None),
    ],
)  # fmt: skip
def test_scalars_are_yaml_1_2(text, value):
    assert parse_yaml(text) == value


def test_a_leading_zero_and_a_double_key_are_refused():
    with pytest.raises(ConfigError, match="line 1: 010 has a leading zero"):
        parse_yaml("a: 010")
    with pytest.raises(ConfigError, match="line 2: key 'a' appears twice"):
        parse_yaml("a: 1\na: 2")
    with pytest.raises(ConfigError, match="line 2"):
        parse_yaml("a: [1\nb: 2")


def test_a_config_is_typed_and_frozen(tmp_path):
    run = load_config(write(tmp_path, "name: a\noptim: {lr: 1e-4}\n"), Run)
    assert run.optim.lr == 1e-4
    with pytest.raises(ValueError, match="frozen"):
        run.name = "b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\noptim: {warmup_step: 3}", "optim.warmup_step: unknown key; did you mean 'warmup_steps'?"),
        ("name: a\nzzz: 3", "zzz: unknown key; known keys: loss, name, optim, sources"),
        ("loss: clip", "name: is missing; add it"),
        ("name: a\nloss: clib", "loss: should be 'clip' or 'siglip' (found 'clib'); did you mean 'clip'?"),
        ("name: a\noptim: {lr: fast}", "optim.lr: should be a valid number"),
        ("name: a\noptim: {warmup_steps: 1.5}", "optim.warmup_steps: should be a valid integer"),
        ("name: a\noptim: {warmup_steps: -1}", "optim.warmup_steps: should be greater than or equal to 0 (found -1)"),
        ("name: a\nsources: [{kind: pmc, rot: x}]", "sources.0.root: is missing"),
        ("name: a\noptim: {lr: '1e-4'}", "optim.lr: should be a valid number (found '1e-4')"),
        ("name: a\noptim: {warmup_steps: true}", "optim.warmup_steps: should be a valid integer (found True)"),
        ("name: a\nsources: [{kind: pmc, rooot: x}]", "sources.0.rooot: unknown key; did you mean 'root'?"),
        ("name: a\nsources: [{kind: pcm}]", "found"),
        ("- a", "must hold `key: value` lines (found list)"),
    ],
)
def test_a_mistake_is_one_line_with_its_remedy(tmp_path, text, message):
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), Run)
    lines = str(caught.value).splitlines()
    assert message in str(caught.value)
    assert all(line.startswith(str(tmp_path / "run.yaml")) for line in lines)


def test_every_mistake_has_a_line_of_its_own(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, "name: a\nx: 1\ny: 2"), Run)
    assert len(str(caught.value).splitlines()) == 2


def test_overrides_reach_into_sections_and_lists(tmp_path):
    path = write(tmp_path, "name: a\nsources: [{kind: pmc, root: x}]")
    run = load_config(path, Run, ["optim.lr=1e-5", "sources.0.root=/data/pmc", "name=b"])
    assert (run.optim.lr, run.sources[0].root, run.name) == (1e-5, "/data/pmc", "b")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr", "is not key=value"), ("=3", "is not key=value"), ("name.x=1", "name is a value, not a section"),
        ("optim.lrr=1", "did you mean 'lr'?"), ("sources.7.root=x", "the list has items 0 to"),
    ],
)  # fmt: skip
def test_a_bad_override_is_refused_by_name(tmp_path, override, message):
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, "name: a\nsources: [{kind: pmc, root: x}]"), Run, [override])
    assert message in str(caught.value)


def test_a_missing_file_suggests_the_nearest(tmp_path):
    write(tmp_path, "name: a")
    with pytest.raises(ConfigError, match=r"did you mean .*run\.yaml"):
        read_yaml(tmp_path / "runn.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        read_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 9"):
        read_yaml(tmp_path / "latin.yaml")


def test_check_config_takes_plain_values():
    assert check_config({"name": "a"}, Run, "demo").name == "a"
