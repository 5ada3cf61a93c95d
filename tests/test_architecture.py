"""The layers of the package: a module imports only from rows below its own."""

import ast
from pathlib import Path

import pytest

import gspo_jax

PACKAGE = Path(gspo_jax.__file__).parent

LAYERS = [
    {"tally"},
    {
        "errors",
        "batch",
        "masked",
        "sandbox",
        "streams",
        "hub",
        "stopping",
        "tasks.units",
        "tasks.notation",
        "statistics",
    }
    | {"settings", "spelling"}
    | {"tasks.zebra_words", "tasks.zebra_solve"},
    {"console", "distributed", "jsonl", "tasks.verify", "summary", "names"},
    {"arguments", "trackers"}
    | {"models.fields", "models.init", "penalties", "mismatch", "advantages", "logps", "quant"}
    | {"spikes"}
    | {"sharding", "chat_template", "tasks.task", "tasks.zebra_score", "integrity", "run_files"},
    {"losses", "models.attention", "models.linear", "models.cache", "models.files", "optim"}
    | {"models.rope", "signatures", "tasks.draw", "tasks.mixture", "tasks.sources"}
    | {"checkpoint", "metrics", "figures", "page", "follow", "advice"},
    {"models.config", "tasks.math", "tasks.zebra", "tasks.reasoning", "tokenizer"}
    | {"tasks.countdown", "tasks.knights", "rewards"},
    {"models.moe", "models.remat", "tasks.rows", "workers", "report", "comparison", "snapshot"},
    {"models.qwen", "reward_worker", "monitor", "terminal", "tasks.gym", "tasks.math_verify"},
    {"models.hf", "tasks.data", "tasks.latex", "tasks.gym_judge"},
    {"tasks.published"},
    {"models", "tasks", "generate"},
    {"rollout", "objective", "microbatch"},
    {"update", "continuations"},
    {"checks", "critic"},
    {"config"},
    {"policy", "model_card", "experiment", "trainer_config"},
    {"evaluate", "memory", "costs", "resume", "export", "state", "saved", "compare", "harness"},
    {"run", "sweep", "benchmark"},
    {"train"},
    {"sft", "programs", "replay", "trainer"},
    {"plan", "shardings", "doctor"},
    {"story"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
PURE = {"losses", "penalties", "mismatch", "advantages", "logps", "quant", "masked"}
FILES_ONLY = {"report", "comparison", "page", "figures", "run_files", "metrics", "console"}
FILES_ONLY |= {"jsonl", "errors", "cli", "integrity", "statistics", "summary", "arguments"}
FILES_ONLY |= {"monitor", "terminal", "snapshot", "advice", "follow"}
FILES_ONLY |= {"settings", "spelling", "names", "trackers", "streams"}


def module_name(path: Path) -> str:
    """`models/qwen.py` -> "models.qwen", `models/__init__.py` -> "models"."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


def imported(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Dotted names of everything that `path` imports."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    froms = [n for n in nodes if isinstance(n, ast.ImportFrom)]
    return names | {f"{n.module}.{a.name}" for n in froms for a in n.names}


def own_modules(path: Path) -> set[str]:
    ours = {d.removeprefix("gspo_jax.") for d in imported(path) if d.startswith("gspo_jax.")}
    found = [[m for m in RANK if d == m or d.startswith(f"{m}.")] for d in ours]
    return {max(candidates, key=len) for candidates in found if candidates}


MODULES = {module_name(p): p for p in sorted(PACKAGE.rglob("*.py")) if module_name(p)}


def test_every_module_has_its_place_in_the_layers():
    assert set(RANK) == set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_module_imports_only_lower_layers(name):
    upward = {m for m in own_modules(MODULES[name]) if RANK[m] >= RANK[name] and m != name}
    # A package's __init__ may gather its own files.
    upward = {m for m in upward if not m.startswith(f"{name}.")}
    assert not upward, f"{name} (layer {RANK[name]}) imports {sorted(upward)}"


@pytest.mark.parametrize("name", sorted(PURE))
def test_the_mathematics_knows_arrays_alone(name):
    roots = {n.split(".")[0] for n in imported(MODULES[name])}
    allowed = {"collections", "dataclasses", "functools", "inspect", "typing"}
    assert roots <= allowed | {"jax", "jaxtyping", "optax", "gspo_jax"}
    assert own_modules(MODULES[name]) <= PURE


@pytest.mark.parametrize("name", sorted(FILES_ONLY))
def test_what_only_reads_and_shows_files_never_imports_jax_on_the_way(name):
    roots = {n.split(".")[0] for n in imported(MODULES[name], top_level_only=True)}
    assert roots.isdisjoint({"jax", "flax", "optax", "orbax"})
    assert own_modules(MODULES[name]) <= FILES_ONLY or name == "cli"


@pytest.mark.parametrize("name", MODULES)
def test_files_and_functions_stay_small(name):
    source = MODULES[name].read_text()
    assert len(source.splitlines()) <= 450
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            first = node.body[0]
            is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            body = node.body[1:] if is_docstring else node.body
            length = node.end_lineno - (body[0].lineno if body else node.lineno) + 1
            assert length <= 80, f"{name}.{node.name} has {length} lines"
