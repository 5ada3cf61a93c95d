"""The pages that a new user reads do what they say: snippets run, commands are accepted."""

import inspect
import json
import re
import shlex
from contextlib import redirect_stdout
from io import StringIO
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import plot_ratios
import pytest

from gspo_jax.algo import losses
from gspo_jax.cli.arguments import parsed
from gspo_jax.cli.commands import COMMANDS, main
from gspo_jax.config.load import load_config
from gspo_jax.tasks.data import user_data

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = ("quickstart", "how_gspo_works", "functional", "cookbook")
HUB = re.compile(r"\b(Qwen/Qwen3-[\w.-]+|openai/gsm8k)")
BLOCK = re.compile(r"^(?:<!-- (.*?) -->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+\.\d+")


def text(page):
    return (DOCS / f"{page}.md").read_text(encoding="utf-8")


def blocks(page, *languages):
    """(remark, language, code) of the fenced blocks, in order."""
    found = BLOCK.findall(text(page))
    assert len(found) == text(page).count("\n```") / 2
    return [block for block in found if not languages or block[1] in languages]


def files():
    """What pages tell to write into a file: blocks whose first line names it."""
    named = [re.match(r"# (\w+\.(?:py|yaml))\n", code) for p in PAGES for _, _, code in blocks(p)]
    return {m[1]: m.string for m in named if m}


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A directory with the files of the pages, and the runs that their commands speak of."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name, code in files().items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    for name in ("rows.jsonl", "rows.parquet"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    before = dict(losses.LOSSES)
    yield tmp_path
    losses.LOSSES.clear()  # a page adds one of its own
    losses.LOSSES.update(before)


def execute(page, namespace, *, heavy=False):
    """The page's Python in order, and what it prints beside what the page says it prints.

    Args:
        heavy: the snippets with a remark, which take minutes or other programs; else the others.
    """
    steps = [*blocks(page), ("", "", "")]
    for (remark, language, code), (about, after, shown) in pairwise(steps):
        if language != "python" or bool(remark) != heavy or remark.startswith("source:"):
            continue
        printed = StringIO()
        with redirect_stdout(printed), jax.numpy_dtype_promotion("standard"):
            exec(compile(code, f"{page}.md", "exec"), namespace)
        if after == "text" and about == "about":  # other machines round differently
            both = printed.getvalue(), shown
            assert len({NUMBER.sub("", x) for x in both}) == 1, both
            np.testing.assert_allclose(*([*map(float, NUMBER.findall(x))] for x in both), atol=0.25)
        elif after == "text":
            assert printed.getvalue() == shown


# ------------------------------------------------------------------------------ the snippets


@pytest.mark.parametrize("page", ["quickstart", "how_gspo_works", "cookbook"])
def test_python_runs_in_order_and_prints_what_the_page_shows(page, desk):
    execute(page, {})


@pytest.mark.long
def test_a_network_of_ones_own_learns_from_nothing_to_nearly_everything(desk):
    namespace = {}
    execute("functional", namespace)
    shown = [float(x) for x in re.findall(r"reward (\d\.\d\d)", text("functional"))]
    assert shown[0] < 0.2 and shown[-1] > 0.95
    assert float(namespace["reward"].mean()) > 0.95


def test_functions_on_the_pages_do_what_they_say(desk):
    found = {}
    for page in ("quickstart", "cookbook"):
        execute(page, found)
    two_lines = ["1+2=3\n3-1=2\n\\boxed{2}", "1+2=4\n4-1=2\n\\boxed{2}", "1+2=3\n\\boxed{3}"]
    assert found["both_lines"](two_lines, ["2"] * 3, ["3"] * 3, other=[0] * 3) == [1, 0, 0]
    assert found["mentioned"](["It is red.", "Blue"], ["red", "red"]) == [1, 0]
    assert (found["brief"]("?", ""), found["brief"]("?", "x" * 50)) == (1, 0.75)
    logp, mask = jnp.zeros((2, 1)), jnp.ones((2, 1), bool)
    (total, weight), _ = found["lenient"](logp, logp, jnp.array([1.0, -1.0]), mask, bad=0.3)
    assert (float(total), float(weight)) == (pytest.approx(-0.7), 2)
    config = load_config("mine.yaml", ["algo.loss={name: lenient, bad: 0.3}"])
    assert config.algo.loss == {"name": "lenient", "bad": 0.3, "clip_low": 3e-3, "clip_high": 4e-3}


def test_the_code_on_the_page_is_that_of_the_library():
    ((remark, _, code),) = [b for b in blocks("how_gspo_works") if b[0].startswith("source:")]
    sources = [inspect.getsource(getattr(losses, name)) for name in remark.split()[1:]]
    plain = [re.sub(r'\n    """.*?"""\n', "\n", s, count=1, flags=re.DOTALL) for s in sources]
    assert code == "\n\n".join(plain)


@pytest.mark.parametrize("page", PAGES)
def test_configurations_and_rows_are_accepted(page, desk):
    for _, _, code in blocks(page, "yaml"):
        (desk / "shown.yaml").write_text(code)
        load_config(desk / "shown.yaml")
    for _, _, code in blocks(page, "json"):
        (desk / "rows.jsonl").write_text(code)
        fields = {"prompt": "text", "answer": "meta.gold"} if '"text"' in code else {}
        assert user_data(desk / "rows.jsonl", fields=fields).size["train"] == code.count("\n")


def anchors(path):
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_lead_somewhere(page):
    targets = re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", BLOCK.sub("", text(page)))
    assert targets
    for place, anchor in targets:
        path = DOCS / (place or f"{page}.md")
        assert path.exists(), place
        assert not anchor or anchor in anchors(path), (place, anchor)


def test_numbers_of_how_gspo_works_are_those_of_the_measurements():
    page = " ".join(text("how_gspo_works").split())
    responses = json.loads(plot_ratios.KEPT.read_text(encoding="utf-8"))["responses"]
    log_ratio, _, mask = plot_ratios.arrays(responses)
    moved = np.abs(np.expm1(log_ratio[mask]))
    rows = np.abs(np.expm1([np.mean(r["log_ratio"]) for r in responses]))
    lengths, of_sum, of_mean = plot_ratios.spread_by_length(responses)
    assert f"{len(responses)} responses, {mask.sum():,} tokens" in page
    assert f"{np.mean(moved > 1e-4):.0%} of".replace("%", " %") in page
    assert f"{np.mean(moved > 0.1):.1%} by".replace("%", " %") in page
    assert f"by more than {np.median(rows):.4f}, and none" in page
    assert 0.014 < rows.max() < 0.015 and 1600 < lengths[6] < 1650
    assert f"standard deviation is {of_sum[6]:.2f}" in page
    assert 3e-4 < np.interp(3000, lengths, of_mean) < 4e-4
    clipped = json.loads((ROOT / "benchmarks/results/clip_fraction.json").read_text())["cases"]
    for case, form in zip(
        clipped, ("{:.1f} ± {:.1f} % for GSPO", "{:.1f} % and none"), strict=False
    ):
        shares = (100 * case[name] for name in ("clip_frac", "clip_frac_sd_over_rollouts"))
        assert form.format(*shares) in page
    paired = json.loads((DOCS / "results/losses/compare.json").read_text())["paired"]["gspo"]
    shown = [f"{100 * paired[k]:+.1f}" for k in ("difference", "low", "high")]
    assert "{} points [{}, {}] of avg@8 on 512".format(*shown) in page


def test_figures_of_ratios_are_drawn_with_the_same_bytes_every_time(tmp_path):
    responses = json.loads(plot_ratios.KEPT.read_text(encoding="utf-8"))["responses"]
    with plot_ratios.plt.rc_context({**plot_ratios.STYLE, **plot_ratios.SVG}):
        for name in ("a", "b"):
            plot_ratios.draw_ratios(responses, tmp_path / f"{name}.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


LINES = [
    (page, line)
    for page in PAGES
    for _, _, code in blocks(page, "bash")
    for line in code.split("\n")
]


@pytest.mark.parametrize(("page", "line"), [(page, line) for page, line in LINES if line])
def test_commands_are_accepted_as_written(page, line, desk, capsys):
    program, *arguments = shlex.split(line)
    if program == "make":
        assert f"\n{arguments[0]}:" in (ROOT / "Makefile").read_text()
    elif program == "source":
        assert arguments == [".venv/bin/activate"]
    elif program == "python":
        assert (desk / arguments[0]).exists()
    else:
        assert program == "gspo-jax"
        (desk / "runs" / "mine-seed0" / "export").mkdir(parents=True)
        known(arguments)


def known(arguments):
    """Names, values and files are those of the command; nothing is loaded."""
    given = parsed(arguments, COMMANDS)
    if not hasattr(given, "overrides"):
        return
    if arguments[0] in ("compare", "sweep"):
        assert main([*arguments, "--dry-run"]) == 0
    else:
        assert main([*(x for x in arguments if x != "--dry-run"), "--print-config"]) == 0


# ----------------------------------------------------------------- what takes longer: parity


def without(arguments, others):
    """The arguments without settings that `others` give, too."""
    given = {x.partition("=")[0] for x in others}
    return [x for x in arguments if "=" not in x or x.partition("=")[0] not in given]


SMALL = ["run.steps=2", "eval.problems=24", "eval.samples=2", "rollout.prompts=4", "mesh.data=1"]


@pytest.mark.parity
def test_the_quickstart_runs_from_its_first_command_to_its_last(
    desk, capsys, tiny_dir, monkeypatch
):
    """Every command, with fewer steps and problems; `make` and the hub's model have stand-ins."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    hub = [f"model.path={tiny_dir}"]
    shown = {}
    for (_, _, line), (_, after, code) in pairwise([*blocks("quickstart"), ("", "", "")]):
        program, *arguments = shlex.split(line) if "gspo-jax" in line[:8] else ("", "")
        if line == "make demo\n":
            assert main(["demo", *SMALL]) == 0
        elif line == "python write.py\n":
            exec(compile(files()["write.py"], "write.py", "exec"), {})
        elif program and arguments[0] != "monitor":
            small = [] if arguments[0] == "export" or "--dry-run" in arguments else SMALL
            small = [*hub, "--dry-run"] if "train configs/qwen3" in line else small
            small = [*hub, "--no-compile"] if arguments[0] == "plan" else small
            small += ["--seeds", "1"] if arguments[0] == "compare" else []
            assert main([*without(arguments, small), *small]) == 0, line
        shown[line] = capsys.readouterr().out if after == "text" else "", code
    printed, code = shown["gspo-jax train mine.yaml --dry-run\n"]
    assert set(code.splitlines()) <= set(printed.splitlines())
    namespace = {}
    with redirect_stdout(StringIO()) as printed:
        exec(next(code for remark, _, code in blocks("quickstart") if remark), namespace)
    assert re.fullmatch(r"\d+\+\d+=\d+\n.*\n\\boxed{\d+}\n", printed.getvalue())


@pytest.mark.parity
def test_what_does_not_fit_is_refused_in_the_words_of_the_page(desk, capsys):
    page = [*blocks("cookbook"), ("", "", "")]
    (shown,) = [b[2] for a, b in pairwise(page) if a[2].endswith("--memory 0.03\n")]
    assert main(["plan", "configs/demo.yaml", "--memory", "0.03", "mesh.data=1"]) == 2
    assert capsys.readouterr().err == shown


@pytest.mark.parity
def test_a_loss_of_ones_own_trains(desk):
    exec(compile(files()["write.py"], "write.py", "exec"), {})
    own = (desk / "mine.yaml").read_text().replace("  steps: 60", "  steps: 2")
    (desk / "mine.yaml").write_text(f"{own}eval: {{problems: 24, samples: 0}}\nmesh: {{data: 1}}\n")
    namespace = {}
    execute("cookbook", namespace)
    execute("cookbook", namespace, heavy=True)
    rows = (desk / "runs" / "lenient" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 3 and "clip_frac_seq" in rows[-1]


@pytest.mark.parity
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path, monkeypatch):
    """With two steps in place of sixty; its kernel has one device, as a reader's."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    for name, value in (("STEPS", "2"), ("HELD_OUT", "16")):
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(DOCS / "notebooks" / "gspo_in_minutes.ipynb", 4)
    kept = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    made = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    for now, then in zip(made, kept, strict=True):
        shown = [o for o in now if o.get("name") != "stderr"]  # what takes long says so there
        assert {o.output_type for o in shown} == {o.output_type for o in then}
    # What is kept in the file is a whole run: accuracy before and after, each with its n.
    shown = "".join(o.text for outputs in kept for o in outputs if o.output_type == "stream")
    before, after = re.findall(r"greedy: (\d+\.\d) % \[\d+\.\d, \d+\.\d\], n = 256", shown)
    assert float(after) > float(before) + 30
