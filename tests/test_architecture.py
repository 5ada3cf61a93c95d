"""The house: rooms, in the order in which one may use another."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path
from statistics import median

import pytest
from draw_house import imported

import gspo_jax

PACKAGE = Path(gspo_jax.__file__).parent

# A room, or a file beside the rooms, imports only what stands above it.
ORDER = (
    *("errors", "numbers", "batch", "text", "files"),
    *("algo", "mesh", "models", "prompt", "answers", "reward", "tasks"),
    *("config", "rollout", "update", "policy", "start"),
    *("view", "evaluation", "run", "plan"),
    *("advantage", "train", "sft", "replay", "trainer_config", "trainer"),
    *("experiment", "cli", "__main__"),
)
RANK = {name: rank for rank, name in enumerate(ORDER)}
# Inside of these functions a room may be imported that the module does not need to be there:
# tests/cli/test_startup.py measures what that saves.
LATE = {"cli", "config", "plan.doctor"} | {"tasks.made.gym", "tasks.math_verify"}
WITHOUT_JAX = ("errors", "numbers", "text", "files", "answers", "config", "view", "cli")


def module_name(path: Path) -> str:
    """`models/qwen.py` -> "models.qwen", `models/__init__.py` -> "models"."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(p): p for p in sorted(PACKAGE.rglob("*.py")) if module_name(p)}


def room(module: str) -> str:
    return module.split(".")[0]


def own_modules(path: Path, **options: bool) -> set[str]:
    """Modules of the package that `path` imports."""
    ours = [d.split(".")[1:] for d in imported(path, **options) if d.startswith("gspo_jax.")]
    longest = [[".".join(d[:n]) for n in range(len(d), 0, -1)] for d in ours]
    return {m for names in longest if (m := next((x for x in names if x in MODULES), None))}


def test_every_room_has_its_place_in_the_order():
    assert {room(name) for name in MODULES} == set(ORDER)


@pytest.mark.parametrize("name", MODULES)
def test_a_room_uses_only_rooms_before_it(name):
    upward = {m for m in own_modules(MODULES[name]) if RANK[room(m)] > RANK[room(name)]}
    assert not upward, f"{name} imports {sorted(upward)}"


def test_modules_import_each_other_one_way():
    """Within a room, too; a package's own file may gather what lies in it."""
    graph = {n: own_modules(p) - {n} for n, p in MODULES.items() if p.name != "__init__.py"}
    list(TopologicalSorter(graph).static_order())  # raises a CycleError that names the circle


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_imported_late_but_for_a_quick_start(name):
    late = own_modules(MODULES[name]) - own_modules(MODULES[name], top_level_only=True)
    allowed = any(name == place or name.startswith(f"{place}.") for place in LATE)
    assert not late or allowed, f"{name} imports {late} in a function"


@pytest.mark.parametrize("place", sorted({p.parent for p in MODULES.values()}), ids=str)
def test_a_room_has_a_map_of_its_files_and_not_too_many(place):
    files = {p.stem for p in place.glob("*.py")} - {"__init__", "__main__"}
    assert len(list(place.glob("*.py"))) <= 12
    text = (place / "__init__.py").read_text()
    told = {line.split()[0] for line in text.splitlines() if line.startswith("    ")}
    if place != PACKAGE:
        assert files <= told, f"{place.name}/__init__.py does not name {files - told}"


@pytest.mark.parametrize("name", [n for n in MODULES if room(n) == "algo"] + ["update.quant"])
def test_the_mathematics_knows_arrays_alone(name):
    roots = {n.split(".")[0] for n in imported(MODULES[name])}
    allowed = {"collections", "dataclasses", "functools", "inspect", "typing"}
    assert roots <= allowed | {"jax", "jaxtyping", "optax", "gspo_jax"}
    assert {room(m) for m in own_modules(MODULES[name])} <= {"algo"}


@pytest.mark.parametrize("name", [n for n in MODULES if room(n) in WITHOUT_JAX])
def test_what_only_reads_and_shows_never_imports_jax(name):
    roots = {n.split(".")[0] for n in imported(MODULES[name], top_level_only=True)}
    assert roots.isdisjoint({"jax", "flax", "optax", "orbax"})
    used = own_modules(MODULES[name], top_level_only=True)
    used = {m for m in used if not m.startswith("tasks")} - {"batch"}
    assert name == "cli.story" or {room(m) for m in used} <= set(WITHOUT_JAX)


def body_length(node: ast.FunctionDef) -> int:
    """Lines from the first after the docstring."""
    first = node.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    body = node.body[1:] if is_docstring else node.body
    return (node.end_lineno or 0) - (body[0].lineno if body else node.lineno) + 1


def test_files_and_functions_stay_small():
    lengths = {n: len(p.read_text().splitlines()) for n, p in MODULES.items()}
    assert not {n: length for n, length in lengths.items() if length > 400}
    assert median(lengths.values()) <= 180
    functions = {
        f"{name}.{node.name}": body_length(node)
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert not {n: length for n, length in functions.items() if length > 70}
