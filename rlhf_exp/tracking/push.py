"""Push a run's model to the Hugging Face hub, or refuse to before anything is trained.

It knows the hub's client and nothing of models.
"""

import logging
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from rlhf_exp.machine.network import hub_responds, hub_url
from rlhf_exp.runs.context import TrainingError
from rlhf_exp.settings import settings

log = logging.getLogger(__name__)

RepoName = Annotated[str, Field(pattern=r"^[\w.-]+(/[\w.-]+)?$")]


@settings
class HubSettings:
    """Pushes the final model to the hub's repository `repo` (NAME or OWNER/NAME), if `push`."""

    push: bool = False
    """true: after training; needs a token (`hf auth login` or HF_TOKEN)."""
    repo: RepoName | None = None
    """Repository there, OWNER/NAME."""
    private: bool = True
    """true: a repository that is created for it is private."""

    @model_validator(mode="after")
    def _has_repo(self) -> "HubSettings":
        if self.push and self.repo is None:
            raise ValueError("push=true needs the repository: hub.repo=OWNER/NAME")
        return self

    def problems(self) -> list[str]:
        """Reasons why a push would fail: no token, or no hub within reach."""
        if not self.push:
            return []
        from huggingface_hub import HfApi, get_token

        problems: list[str] = []
        if get_token() is None:
            problems.append(
                "hub.push=true: no Hugging Face token; log in with `hf auth login`, set HF_TOKEN,"
                " or set hub.push=false"
            )
        if not hub_responds():
            problems.append(
                f"hub.push=true: {hub_url()} is out of reach (or HF_HUB_OFFLINE is set); set"
                " hub.push=false and push later with `hf upload`"
            )
        if not problems:
            try:
                HfApi(endpoint=hub_url()).whoami()
            except Exception as error:
                reason = str(error).strip().splitlines()[0][:300]
                problems.append(f"hub.push=true: {hub_url()} does not take the token ({reason})")
        return problems

    def upload(self, folder: Path) -> None:
        """Uploads the folder if `push` is true. Raises TrainingError, with the command that
        uploads it by hand, if the hub refuses."""
        if not self.push:
            return
        from huggingface_hub import HfApi

        api = HfApi(endpoint=hub_url())
        try:
            url = api.create_repo(str(self.repo), private=self.private, exist_ok=True)
            api.upload_folder(
                repo_id=url.repo_id, folder_path=folder, commit_message="Train with rlhf_exp"
            )
        except Exception as error:  # any kind; the model is on disk anyway
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise TrainingError(
                f"hub.repo={self.repo}: the push failed ({reason}); the model is in {folder}, push"
                f" it with: hf upload {self.repo} {folder}"
            ) from error
        log.info("pushed to %s", url)
