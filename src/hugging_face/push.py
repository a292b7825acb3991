"""To the hub, through huggingface_hub: what would be sent, or sent."""

from pathlib import Path

from src.errors import CheckpointError


def push(folder: Path, repository: str, *, send: bool) -> str:
    """Upload the folder, or with send=false list what would be sent. Runs on one rank. Returns a report."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    listing = "".join(f"\n  {path.stat().st_size / 1e6:12,.2f} MB  {path.name}" for path in files)
    if not send:
        return f"would send to {repository} (pass task.send=true to do it):{listing}"
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        sent = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Upload {folder.name}")
    except Exception as error:  # the library lets through what its transport raises
        raise CheckpointError(f"task.push={repository}: was not sent ({type(error).__name__}: {error})") from error
    return f"sent to {sent.commit_url}:{listing}"
