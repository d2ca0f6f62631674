"""Publishes a trained model on the Hugging Face Hub, with its recipe, metrics and card.

    python scripts/push_to_hub.py outputs/adder/final USER/NAME [--native] [--checkpoint] [--replace]

Log in with `hf auth login` before, or set HF_TOKEN. A new repository is private unless the run's recipe says
`hub.private: false`. A repository that holds another run's model, or one of no run, is left
alone without --replace.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id

from cleangpt import UserError
from cleangpt.errors import exit_code
from cleangpt.files import hint_at_model
from cleangpt.models.convert import export_folder
from cleangpt.reporting.hub import RUN_FILES, push_folder, require_own
from cleangpt.training.checkpoint import newest_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="a saved folder, outputs/adder/final say")
    parser.add_argument("repo_id", help="USER/NAME, or NAME in your own namespace")
    parser.add_argument("--native", action="store_true", help="push a plain gpt2, llama or qwen3 of the same weights")
    parser.add_argument("--checkpoint", action="store_true", help="push the run's newest checkpoint too")
    parser.add_argument("--replace", action="store_true", help="replace another run's model in that repository")
    arguments = parser.parse_args()
    try:
        validate_repo_id(arguments.repo_id)
    except HFValidationError as error:
        raise UserError(("repo_id", str(error))) from error
    print(f"pushed to {push(arguments)}")


def push(arguments: argparse.Namespace) -> str:
    """Gathers what belongs to the model and uploads it as one commit; returns the repository's id."""
    model, run = arguments.model, arguments.model.resolve().parent
    if not (model / "config.json").is_file():
        raise UserError(("model", f"expected a saved model's folder, got {str(model)!r}{hint_at_model(model)}"))
    beside = {name: run / name for name in RUN_FILES if (run / name).is_file()}
    recipe = yaml.safe_load(beside["recipe.yaml"].read_text()) if "recipe.yaml" in beside else None
    private = ((recipe or {}).get("hub") or {}).get("private", True)
    if arguments.checkpoint:
        checkpoint = newest_checkpoint(run)
        if checkpoint is None:
            raise UserError(("--checkpoint", f"expected a run's model beside its checkpoints, none in {run}"))
        beside[f"checkpoints/{checkpoint.name}"] = checkpoint
    with tempfile.TemporaryDirectory() as folder:
        if arguments.native:
            print(export_folder(str(model), Path(folder) / "native"))
            model = Path(folder) / "native"
        try:
            if not arguments.replace:
                require_own(arguments.repo_id, beside.get("recipe.yaml"))
            return push_folder(model, arguments.repo_id, private, f"Model of {run.name}", beside)
        except ConnectionError as error:
            raise UserError(("repo_id", f"not pushed: {error}")) from error


if __name__ == "__main__":
    sys.exit(exit_code(main))
