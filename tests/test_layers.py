"""A module imports only from layers below its own, and every module has a layer."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "cleangpt"

LAYERS = [
    {"errors", "schedules", "models.nanogpt", "models.nanollama", "data.permutation", "data.splits"}
    | {"metrics.perplexity.perplexity", "metrics.arithmetic_exact_match.arithmetic_exact_match"},
    {"recipe", "data.cache", "data.packing", "interruption", "loss", "monitoring", "files", "tokenization"},
    {"recipe_reading", "data.text", "data.arithmetic", "data.loader", "models.build"}
    | {"optim", "launch", "checkpoint", "tracking", "card", "hub"},
    {"evaluation", "outputs", "step", "data.prepare", "models.convert"},
    {"run", "grading"},
    {"training", "plan"},
]


def module_of(path: Path) -> str:
    """The dotted name below the package; a model's folder counts as one module."""
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(name.split(".")[:2]) if name.startswith(("models.nanogpt", "models.nanollama")) else name


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
            if parts[0] == "cleangpt":
                for end in range(len(parts), 1, -1):
                    target = PACKAGE.joinpath(*parts[1:end])
                    if target.with_suffix(".py").exists():
                        found.add(module_of(target.with_suffix(".py")))
                        break
    return found


def files() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]


def test_every_module_has_a_layer():
    assert {module_of(path) for path in files()} == set().union(*LAYERS)


def test_imports_go_down():
    layer_of = {module: number for number, layer in enumerate(LAYERS) for module in layer}
    for path in files():
        for imported in imports_of(path) - {module_of(path)}:
            assert layer_of[imported] < layer_of[module_of(path)], f"{module_of(path)} imports {imported}"


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


def test_the_loop_and_the_models_are_short():
    assert len((PACKAGE / "training.py").read_text().splitlines()) < 200
    for path in PACKAGE.glob("models/nano*/modeling_*.py"):
        assert len(path.read_text().splitlines()) < 350, path.name


def test_no_script_or_test_hides_a_dependency():
    root = PACKAGE.parent
    assert not list(root.glob("tokenizers/**/*.py"))
    names = {path.stem for path in root.glob("scripts/*.py")}
    assert not names & {"evaluate", "datasets", "tokenizers", "transformers", "accelerate", "torch", "wandb"}
