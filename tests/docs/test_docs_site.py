"""The pages of docs/ as a whole: generated ones are current, names exist, links and commands hold.

What single pages show is held by tests of their own; that the site builds, by tests/parity.
"""

import importlib
import inspect
import re
import shlex
import tomllib
from pathlib import Path

import config_reference as reference
import pytest
import yaml

import gspo_jax
from gspo_jax.cli.arguments import parsed
from gspo_jax.cli.commands import COMMANDS, main
from gspo_jax.config.load import load_config
from gspo_jax.config.names import AT_LEAST, SETTINGS
from gspo_jax.errors import ConfigError
from gspo_jax.plan import doctor
from gspo_jax.run.model_card import CITATION

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(p for p in DOCS.rglob("*.md") if "_build" not in p.parts)
TEXT = {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in PAGES}
TEXT |= {name: (ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md")}
FENCE = re.compile(r"^( *)```([\w{}-]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


# -------------------------------------------------------------------------- the configuration


def test_the_configuration_reference_is_what_its_script_writes():
    told = "python scripts/config_reference.py writes it again"
    assert TEXT["docs/configuration.md"] == reference.page(), told


def test_every_setting_has_one_row_of_the_reference():
    named = re.findall(r"^\| `([\w.]+)` \|.*\|.*\|.*\|$", TEXT["docs/configuration.md"], re.M)
    assert sorted(named) == sorted(SETTINGS)


REFUSED = {name: f"{low - 1}" for name, low in AT_LEAST.items()}
REFUSED |= {name: value for name, (_, value) in reference.FURTHER.items()}


@pytest.mark.parametrize("name", REFUSED)
def test_what_lies_outside_the_bounds_on_the_page_is_refused(name):
    with pytest.raises(ConfigError, match=name):
        load_config(None, [f"{name}={REFUSED[name]}"])


def test_values_are_shown_as_a_config_reads_them():
    for value in (3e-4, 2.5e-3, 1e-8, 0.2, 16, True, None, "", "demo", "a b", [1, "x"], {"b": 0.1}):
        read = load_config(None, [f"model.template_args={{a: {reference.shown(value)}}}"])
        assert read.model.template_args == {"a": value}
    assert [reference.shown(x) for x in (3e-4, 2.5e-3, 1e-6)] == ["3e-4", "2.5e-3", "1e-6"]


# ---------------------------------------------------------------------- the reference of names

ENTRIES = re.findall(r"^\.\. auto(\w+):: gspo_jax\.([\w.]+)$", TEXT["docs/api.md"], re.M)


def test_every_public_name_is_in_the_reference():
    named = {name for kind, name in ENTRIES if kind != "module"}
    homes = {name: f"{gspo_jax._HOME[name]}.{name}" for name in gspo_jax.__all__}
    homes |= {"Mean": "algo.masked.Mean", "kl": "algo.penalties.kl"}  # where they are defined
    assert {home for home in homes.values() if home not in named} == set()
    told = TEXT["docs/api.md"].split("come from `gspo_jax` itself")[1].split("What is not on")[0]
    assert sorted(re.findall(r"`(\w+)`", told)) == sorted(gspo_jax.__all__)


@pytest.mark.parametrize("kind, name", ENTRIES, ids=[name for _, name in ENTRIES])
def test_names_of_the_reference_exist_and_say_what_they_are(kind, name):
    module, _, last = f"gspo_jax.{name}".rpartition(".")
    if kind == "module":
        assert importlib.import_module(f"gspo_jax.{name}").__doc__
        return
    thing = getattr(importlib.import_module(module), last)
    assert kind == "data" or inspect.getdoc(thing)


# ------------------------------------------------------------------------------------- links


def anchors(text):
    """Of the headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", TEXT)
def test_links_lead_to_files_and_headings_that_exist(page):
    lost = []
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", FENCE.sub("", TEXT[page])):
        path, _, anchor = target.partition("#")
        place = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        known = anchors(place.read_text()) if anchor and place.suffix == ".md" else {anchor}
        if not place.exists() or anchor not in known:
            lost.append(target)
    assert lost == []


def test_every_page_is_in_the_contents_once():
    listed = [
        re.sub(r".*<(.*)>", r"\1", line)
        for _, kind, body in FENCE.findall(TEXT["docs/index.md"])
        if kind == "{toctree}"
        for line in body.splitlines()
        if line and not line.startswith(":")
    ]
    pages = [p.relative_to(DOCS).with_suffix("").as_posix() for p in PAGES]
    assert sorted(listed) == sorted({*pages} - {"index"})


# -------------------------------------------------------------------------- commands and code


def commands(program):
    """Every line of a block of any page that starts with it, comments and \\ taken away."""
    found = []
    for page, text in TEXT.items():
        blocks = [body for _, _, body in FENCE.findall(text)]
        blocks += re.findall(r"(?:^    .*\n)+", FENCE.sub("", text), re.M)
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
        starts = [line.strip() for line in lines if line.strip().startswith(f"{program} ")]
        found += [pytest.param(line, id=f"{page}: {line[:60]}") for line in starts]
    return found


@pytest.mark.parametrize("line", commands("gspo-jax"))
def test_commands_have_options_settings_and_configs_that_exist(line):
    words = [word for word in shlex.split(line, comments=True)[1:] if word != "..."]
    for old, new in {"N": "2", "I": "0", "K": "1"}.items():
        words = [new if word == old else word for word in words]
    arguments = parsed([word for word in words if word != "section.key=value"], COMMANDS)
    file = ROOT / str(getattr(arguments, "config", None))
    is_config = file.is_file() and words[0] not in ("compare", "sweep")
    load_config(file if is_config else None, getattr(arguments, "overrides", []))
    for word in words:
        assert not word.startswith("configs/") or (ROOT / word).exists()


@pytest.mark.parametrize("line", commands("python"))
def test_scripts_exist_and_have_the_options(line):
    words = shlex.split(line, comments=True)[1:]
    if not words[0].startswith(("scripts/", "benchmarks/")):
        return
    text = (ROOT / words[0]).read_text(encoding="utf-8")
    options = [word for word in words if word.startswith("--")]
    assert [o for o in options if f'"{o}"' not in text and f'"{o[2:]}"' not in text] == []


@pytest.mark.long
def test_experiments_on_the_page_about_comparing_can_be_run(tmp_path, capsys):
    compared, swept = re.findall(r"^```yaml\n(.*?)^```", TEXT["docs/comparing.md"], re.M | re.S)
    for name, text, runs in (("compare", compared, 10), ("sweep", swept, 6)):
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        out = str(tmp_path / name)
        assert main([name, str(path), "--dry-run", "--out", out]) == 0
        printed = capsys.readouterr().out
        assert f"{runs} runs" in printed and "gspo" in printed


def test_the_config_on_the_page_about_configuration_is_one(tmp_path):
    page = TEXT["docs/configuration.md"]
    (text,) = re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S)
    (bash,) = re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S)
    (tmp_path / "mine.yaml").write_text(text)
    words = shlex.split(bash.splitlines()[0])
    assert words[:3] == ["gspo-jax", "train", "mine.yaml"]
    config = load_config(tmp_path / "mine.yaml")
    assert (config.rollout.group_size, config.algo.loss["clip_low"]) == (16, 3e-4)
    config = load_config(tmp_path / "mine.yaml", words[3:])
    assert (config.rollout.group_size, config.run.name) == (8, "mine")


def test_pages_with_python_have_a_test_that_runs_it():
    tests = [p.read_text(encoding="utf-8") for p in (ROOT / "tests").rglob("test_*.py")]
    runners = [text for text in tests if "exec(compile(" in text]
    for page, text in TEXT.items():
        if any(kind == "python" for _, kind, _ in FENCE.findall(text)):
            named = re.compile(rf"\b{Path(page).stem}\b")
            assert any(map(named.search, runners)), f"{page} has Python that no test runs"


# ------------------------------------------------------------------------------ installation


def test_every_extra_is_explained():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"]) - {"cpu", "all"}
    page = TEXT["docs/install.md"]
    asked = {e for found in re.findall(r'"\.\[([\w,-]+)\]"', page) for e in found.split(",")}
    assert asked <= set(project["optional-dependencies"])
    assert extras <= asked | set(re.findall(r"`([\w-]+)`", page))
    assert project["requires-python"] == ">=3.11" and "Python 3.11" in page


def test_the_doctors_screen_on_the_page_has_the_topics_of_todays():
    (shown,) = re.findall(r"^```text\n(.*?)^```", TEXT["docs/install.md"], re.M | re.S)
    topics = re.findall(r"^(\S+(?: \S+)?)  +\S", shown, re.M)
    today = dict.fromkeys(f.topic for f in doctor.examine({"JAX_PLATFORMS": "cpu"}))
    assert topics == [t for t in today if t != "variables"]


# ---------------------------------------------------------------------------------- citation


def test_what_to_cite_is_the_same_everywhere():
    about = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert about["cff-version"] == "1.2.0" and about["version"] == gspo_jax.__version__
    assert about["references"][0]["title"] in CITATION
    paper, software = re.findall(r"^```bibtex\n(.*?)^```", TEXT["docs/citing.md"], re.M | re.S)
    assert paper in CITATION
    assert f"{{{gspo_jax.__version__}}}" in software
    assert about["title"].replace("_", "\\_") in software
