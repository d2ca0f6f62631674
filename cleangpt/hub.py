"""Publishing on the Hugging Face Hub; a Hub that cannot be reached never ends a run."""

from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger
from huggingface_hub import HfApi

logger = get_logger(__name__)


def push_folder(accelerator: Accelerator, folder: Path, section, run_name: str, message: str) -> None:
    """Uploads a saved model's folder; a Hub that refuses or cannot be reached gets a warning that says why.

    Args:
        accelerator: its main process uploads. section: `recipe.hub`.
        run_name: names the repository where the section does not. message: of the commit.
    """
    if not accelerator.is_main_process:
        return
    try:
        api = HfApi()
        repo_id = api.create_repo(section.repo_id or run_name, private=section.private, exist_ok=True).repo_id
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
    except Exception as error:  # whatever the network does, the run goes on
        logger.warning(f"not pushed to the Hub: {error}; repeat with: hf upload {section.repo_id or run_name} {folder}")
