"""Push a pruned model to the Hub: config, weights, card and picture in one commit, and only what changed.

Not by ``upload_folder``, which makes several commits where the Xet client is installed, and doesn't see that another
push came in between.
"""
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, List, Mapping, Optional, Tuple

from httpx2 import HTTPError
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo, RepoFile
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from torch import nn

from ..core import PruningError, warn
from ..version import __version__
from ..zoo import save_pretrained
from .cards import CARD, check_metrics, is_ours, stamp, write_card

__all__ = ['Pushed', 'push_to_hub']

# Seconds before each new try of a push that failed for a reason that passes.
_WAITS = (1.0, 2.0, 4.0)
_PASSING = (408, 412, 429, 500, 502, 503, 504)
_REASONS = {
    401: 'the Hub does not accept the token, or there is none; log in by "hf auth login" or pass token=',
    403: 'the token may not write there; name a repo of yours, use a token that may write, or pass create_pr=True',
    404: 'there is no such repo or revision, or the token may not see it',
    412: 'others kept pushing at the same time; push again',
    429: 'the Hub asks for fewer requests; wait some minutes and push again',
}


@dataclass(frozen=True)
class Pushed:
    """What a push came to.

    Attributes:
        url: Page of the commit; of the repo's last one where nothing had changed.
        oid: Hash of that commit; '' where the repo doesn't exist yet (``dry_run``).
        files: What was committed, none where the repo had all of it.
        pull_request: Page of the pull request, where one was opened.
    """
    url: str
    oid: str
    files: Tuple[str, ...]
    pull_request: Optional[str] = None


def push_to_hub(
        model: nn.Module,
        repo_id: str,
        metrics: Optional[Mapping[str, Any]] = None,
        private: Optional[bool] = None,
        revision: Optional[str] = None,
        create_pr: bool = False,
        token: Optional[str] = None,
        commit_message: str = 'Add a model pruned by timm_epfs',
        overwrite_card: bool = False,
        *,
        card: Optional[str] = None,
        dry_run: bool = False,
) -> Pushed:
    """Push a pruned model; ``timm.create_model('hf-hub:<repo_id>', pretrained=True)`` gives it back, bit for bit.

    Config, weights, card and picture go in one commit, and only those that changed: pushing the same again makes none.
    A push that finds another one in its way, or the Hub busy, tries again from the start.

    Args:
        model: A model with a ``pruning_plan``.
        repo_id: ``'<owner>/<name>'``; made where there is none.
        metrics: What was measured, for the card: see ``timm_epfs.hub.cards``.
        private: Make a new repo private. True is an error for one that is public.
        revision: Branch to push to, made from ``main`` where there is none.
        create_pr: Open a pull request in place of writing to ``main``.
        token: The user's own, from ``hf auth login``, by default.
        commit_message: First line of the commit.
        overwrite_card: Replace a card that was written or edited by hand, which is kept by default with a warning.
        card: Text of a card to push in place of the generated one.
        dry_run: Write nothing; return what would be pushed.

    Raises:
        PruningError: The model can't be saved, the arguments are wrong, or the Hub can't be reached or refuses.
    """
    check_metrics(metrics)
    _check_target(repo_id, revision, create_pr)
    with tempfile.TemporaryDirectory() as scratch:
        folder = save_pretrained(model, Path(scratch) / 'model')
        write_card(folder, model, repo_id, metrics)
        if card is not None:
            (folder / CARD).write_text(stamp(card), encoding='utf-8', newline='\n')
        push = _Push(HfApi(token=token, library_name='timm_epfs', library_version=__version__), repo_id, folder,
                     revision, create_pr, overwrite_card)
        for wait in (*(() if create_pr else _WAITS), None):  # a pull request that was opened unseen would be two
            try:
                return push.dry_run() if dry_run else push(private, commit_message)
            except (HTTPError, OSError, RuntimeError, ValueError) as e:
                if isinstance(e, PruningError):
                    raise
                if wait is None or not _passes(e):
                    raise PruningError(f'push to {repo_id}: {_reason(e)}') from e
                time.sleep(wait)


def _check_target(repo_id: str, revision: Optional[str], create_pr: bool) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as e:
        raise PruningError(f'push: {repo_id!r:.100} is no repo id; give \'<owner>/<name>\'') from e
    if '/' not in repo_id:
        raise PruningError(f'push: repo id {repo_id!r} has no owner; give \'<owner>/{repo_id}\'')
    if create_pr and revision not in (None, 'main'):
        raise PruningError(f'push: a pull request goes to main, revision={revision!r} was asked too; leave one out')


@dataclass(frozen=True)
class _Push:
    """One try: compare a folder with what the repo has, and commit what differs."""
    api: HfApi
    repo_id: str
    folder: Path
    revision: Optional[str]
    create_pr: bool
    overwrite_card: bool

    def __call__(self, private: Optional[bool], message: str) -> Pushed:
        self.api.create_repo(self.repo_id, private=private, exist_ok=True)
        try:
            head = self._head()
        except RevisionNotFoundError:
            self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
            head = self._head()
        if private and not head.private:
            raise PruningError(f'push: {self.repo_id} is public, private=True was asked; make it private on the Hub')
        files = self._changed(head)
        if not files:
            return self._pushed(head, files)
        # Told its parent, the Hub refuses what was compared with a state that another push has changed since.
        commit = self.api.create_commit(
            self.repo_id,
            [CommitOperationAdd(name, self.folder / name) for name in files],
            commit_message=message,
            revision=self.revision,
            create_pr=self.create_pr,
            parent_commit=None if self.create_pr else head.sha,
        )
        return Pushed(commit.commit_url, commit.oid, files, commit.pr_url)

    def dry_run(self) -> Pushed:
        try:
            head = self._head()
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return Pushed(f'{self.api.endpoint}/{self.repo_id}', '', self._names())
        return self._pushed(head, self._changed(head))

    def _pushed(self, head: ModelInfo, files: Tuple[str, ...]) -> Pushed:
        return Pushed(f'{self.api.endpoint}/{self.repo_id}/commit/{head.sha}', head.sha, files)

    def _head(self) -> ModelInfo:
        return self.api.model_info(self.repo_id, revision=self.revision)

    def _names(self) -> Tuple[str, ...]:
        return tuple(sorted(path.name for path in self.folder.iterdir()))

    def _changed(self, head: ModelInfo) -> Tuple[str, ...]:
        """Names of the files that the repo doesn't have as they are here, less a card that is not to be replaced."""
        theirs = {
            entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id
            for entry in self.api.list_repo_tree(self.repo_id, revision=head.sha) if isinstance(entry, RepoFile)
        }
        changed = [name for name in self._names() if theirs.get(name) not in _hashes(self.folder / name)]
        if CARD in changed and CARD in theirs and not self.overwrite_card and not self._card_is_ours(head):
            warn(
                f'{CARD} in {self.repo_id} was written or edited by hand and is kept; overwrite_card=True replaces it',
            )
            changed.remove(CARD)
        return tuple(changed)

    def _card_is_ours(self, head: ModelInfo) -> bool:
        with tempfile.TemporaryDirectory() as scratch:
            path = self.api.hf_hub_download(self.repo_id, CARD, revision=head.sha, local_dir=scratch)
            return is_ours(Path(path).read_bytes().decode(errors='replace'))


def _hashes(path: Path) -> Tuple[str, str]:
    """As the Hub names a file's content: in git, and in its large file storage."""
    with open(path, 'rb') as file:
        large = sha_fileobj(file).hex()
    return git_hash(path.read_bytes()), large


def _causes(error: Optional[BaseException]) -> List[BaseException]:
    return [error, *_causes(error.__cause__)] if error is not None else []


def _answer(error: BaseException) -> Optional[HfHubHTTPError]:
    """The Hub's refusal, which an upload's error has for its cause."""
    return next((e for e in _causes(error) if isinstance(e, HfHubHTTPError)), None)


def _passes(error: BaseException) -> bool:
    answer = _answer(error)
    return answer.response.status_code in _PASSING if answer else any(isinstance(e, HTTPError) for e in _causes(error))


def _reason(error: BaseException) -> str:
    """One line: what went wrong, and what to do."""
    answer = _answer(error)
    status = answer.response.status_code if answer else None
    if status in _REASONS:
        return f'{_REASONS[status]} ({status})'
    if isinstance(error, OfflineModeIsEnabled):
        return 'huggingface_hub is offline; unset HF_HUB_OFFLINE'
    if answer is None and _passes(error):
        return f'no connection to the Hub ({type(_causes(error)[-1]).__name__}); check the network, then push again'
    told = answer if answer and isinstance(error, RuntimeError) else error  # that one only names the file
    return f'{type(told).__name__} {" ".join(str(told).split())[:200]}'
