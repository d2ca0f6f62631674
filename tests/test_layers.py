"""Imports go down only: from room to room, and from module to module inside a room."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "cleangpt"

# The rooms from the ground up; those on one floor do not know each other. In a room, the modules from the ground up.
FLOORS = [
    {"ground": ["errors", "files", "hardware"]},
    {"recipe": ["values", "sources", "keys", "schedules", "wording", "checks", "reading"]},
    {
        "data": [
            *("splits", "permutation", "cache", "tokenization", "conversations", "stream", "packing", "mixture"),
            *("text", "encoding", "arithmetic", "loader", "prepare"),
        ],
        "reporting": ["progress", "tracking", "card", "hub"],
    },
    {"models": ["nanogpt", "nanollama", "statistics", "loss", "width", "build", "checkpoints", "convert"]},
    {"evaluation": ["evaluate", "metrics", "writing", "tasks", "grading"]},
    {
        "training": [
            *("signals", "launch", "checkpoint", "run_folder", "muon", "optim", "memory"),
            *("noise", "average", "run", "seeds", "step", "boundary", "setup", "loop"),
        ]
    },
    {"top": ["plan", "sweep", "law", "scaling"]},
]
HEIGHT = {
    (f"{room}.{module}" if room not in ("ground", "top") else module): (floor, room, place)
    for floor, rooms in enumerate(FLOORS)
    for room, modules in rooms.items()
    for place, module in enumerate(modules)
}


def module_of(path: Path) -> str:
    """The dotted name below the package; a folder in a room, such as `models.nanogpt`, counts as one module."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts[:2])


def imports_of(path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever the import stands."""
    here = ["cleangpt", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            for end in range(len(parts) if parts[0] == "cleangpt" else 0, 1, -1):
                target = PACKAGE.joinpath(*parts[1:end]).with_suffix(".py")
                if target.exists():
                    found.add(module_of(target))
                    break
    return found


def files() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]


def test_every_module_has_its_place():
    assert {module_of(path) for path in files()} == HEIGHT.keys()


def test_imports_go_down():
    for path in files():
        floor, room, place = HEIGHT[module_of(path)]
        for imported in imports_of(path) - {module_of(path)}:
            below, other, lower = HEIGHT[imported]
            assert below < floor or (room == other and lower < place), f"{module_of(path)} imports {imported}"


def test_model_files_import_only_torch_transformers_and_siblings():
    for path in [*PACKAGE.glob("models/nano*/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in {
                    "torch",
                    "transformers",
                    "huggingface_hub",
                    "typing",
                    "collections",
                }
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1
            elif isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= {"math", "torch"}


def test_the_loop_and_all_files_are_short():
    assert len((PACKAGE / "training" / "loop.py").read_text().splitlines()) < 200
    for path in files():
        assert len(path.read_text().splitlines()) < 350, path.name


def test_functions_have_at_most_six_parameters():
    for path in files():
        if path.name.startswith("modeling_"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                names = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                assert len([name for name in names if name not in ("self", "cls")]) <= 6, f"{path.name}: {node.name}"


def test_no_script_or_test_hides_a_dependency():
    root = PACKAGE.parent
    assert not list(root.glob("tokenizers/**/*.py"))
    names = {path.stem for path in root.glob("scripts/*.py")}
    assert not names & {"evaluate", "datasets", "tokenizers", "transformers", "accelerate", "torch", "wandb"}
