"""Push a pruned model to the Hub: config, weights, card and picture in one commit, and only the files that changed.

``HfApi.upload_folder`` is not used: it makes several commits if the Xet client is installed, and it does not notice if
another push was made in between.
"""
import hashlib
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, List, Mapping, Optional, Tuple, Union

from httpx2 import HTTPError
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo, RepoFile
from huggingface_hub.utils import validate_repo_id
from torch import nn

from ..core import PruningError, aligned_table, one_line, step, warn
from ..version import __version__
from ..zoo import plan_of, save_pretrained
from .cards import CARD, check_metrics, is_ours, stamp, write_card

__all__ = ['DryRun', 'Pushed', 'push_to_hub']

_WAITS = (1.0, 2.0, 4.0)  # seconds before each retry of a push that failed for a temporary reason
_TEMPORARY = (408, 412, 429, 500, 502, 503, 504)  # HTTP status codes of temporary failures
_REASONS = {
    401: 'the Hub does not accept the token, or there is none; log in with "hf auth login" or pass token=',
    403: 'the token may not write there; name a repo of yours, use a token with write access, or pass create_pr=True',
    404: 'there is no such repo or revision, or the token may not read it; check their names',
    412: 'others kept pushing at the same time; push again',
    429: 'the Hub asks for fewer requests; wait a few minutes and push again',
}


@dataclass(frozen=True)
class Pushed:
    """The result of a push.

    Attributes:
        url: Page of the commit. If nothing had changed: page of the repo's last commit.
        oid: Hash of that commit; ``''`` for a dry run.
        files: Names of the committed files. Empty if the repo was up to date.
        pull_request: Page of the pull request, if one was opened.
    """
    url: str
    oid: str
    files: Tuple[str, ...]
    pull_request: Optional[str] = None


@dataclass(frozen=True)
class DryRun(Pushed):
    """What a push would send. ``print`` shows it file by file, and how the card begins.

    Attributes:
        sizes: Bytes of each of the files.
        card: Text of the model card.
    """
    sizes: Tuple[int, ...] = ()
    card: str = ''

    def __str__(self) -> str:
        rows = [('file', 'bytes'), *((name, f'{size:,}') for name, size in zip(self.files, self.sizes))]
        metadata, _, text = self.card.partition('\n---\n')
        title = next((line for line in text.splitlines() if line.startswith('#')), '')
        return f'{aligned_table(rows)}\n\n{CARD} begins:\n{metadata}\n---\n{title}'


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
        widget_image: Optional[Union[str, Path]] = None,
) -> Pushed:
    """Push a pruned model; ``timm.create_model('hf-hub:<repo_id>', pretrained=True)`` loads it back, bit for bit.

    One commit holds config, weights, card and picture, but only the files that changed. Pushing the same model again
    makes no commit. If another push was made at the same time, or if the Hub is busy, the push starts again.

    Args:
        model: A model with a ``pruning_plan``.
        repo_id: ``'<owner>/<name>'``. The repo is created if it does not exist.
        metrics: Measurements to show on the card: see ``timm_epfs.hub.cards``.
        private: Make the repo private if it is new. True is an error for a repo that is public.
        revision: Branch to push to. It is created from ``main`` if it does not exist.
        create_pr: Open a pull request in place of pushing to ``main``.
        token: Access token. None: the user's own, from ``hf auth login``.
        commit_message: First line of the commit message.
        overwrite_card: Replace a card that was written or edited by hand. False: keep it, with a warning.
        card: Text of a card to push in place of the generated one.
        dry_run: Write all files, but send nothing, and return a ``DryRun`` that shows them. That takes neither a token
            nor a network, so it isn't known which of the files the repo already has.
        widget_image: A PNG or JPEG file that the model's page offers as an example. None: it offers none.

    Raises:
        PruningError: The model can't be saved, an argument is invalid, the card's metadata can't be read, the Hub can't
            be reached, or it refuses.

    Warns:
        UserWarning: A card that was written or edited by hand is kept.
    """
    check_metrics(metrics)
    _check_target(repo_id, revision, create_pr)
    if plan_of(model) is not None and plan_of(model).base is None:
        raise PruningError(
            'push: no name builds this model, so timm could not load it from a repo; give base= when pruning, or keep '
            'it by save_pretrained and load_pretrained')
    if card is not None:
        with one_line('push: the metadata of card= can\'t be read'):
            ModelCard(card)
    what = f'{"preparing what goes" if dry_run else "pushing"} to {repo_id}'
    with tempfile.TemporaryDirectory() as scratch, step(what):
        folder = save_pretrained(model, Path(scratch) / 'model')
        write_card(folder, model, repo_id, metrics, widget_image=None if widget_image is None else Path(widget_image))
        if card is not None:
            (folder / CARD).write_text(stamp(card), encoding='utf-8', newline='\n')
        if dry_run:
            return _dry_run(repo_id, folder)
        push = _Push(HfApi(token=token, library_name='timm_epfs', library_version=__version__), repo_id, folder,
                     revision, create_pr, overwrite_card)
        # A pull request is not retried: if only the answer was lost, a second one would be opened.
        for wait in (*(() if create_pr else _WAITS), None):
            try:
                return push(private, commit_message)
            except (HTTPError, OSError, RuntimeError, ValueError) as e:
                if isinstance(e, PruningError):
                    raise
                if wait is None or not _is_temporary(e):
                    raise PruningError(f'push to {repo_id}: {_reason(e)}') from e
                time.sleep(wait)


def _dry_run(repo_id: str, folder: Path) -> DryRun:
    names = _names(folder)
    sizes = tuple((folder / name).stat().st_size for name in names)
    card = (folder / CARD).read_text(encoding='utf-8')
    return DryRun(f'{constants.ENDPOINT}/{repo_id}', '', names, sizes=sizes, card=card)


def _names(folder: Path) -> Tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.iterdir()))


def _check_target(repo_id: str, revision: Optional[str], create_pr: bool) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as e:
        raise PruningError(f'push: {repo_id!r:.100} is not a repo id; give \'<owner>/<name>\'') from e
    if '/' not in repo_id:
        raise PruningError(f'push: repo id {repo_id!r} has no owner; give \'<owner>/{repo_id}\'')
    if create_pr and revision not in (None, 'main'):
        raise PruningError(
            f'push: create_pr=True and revision={revision!r} were given, a pull request goes to main; leave one out')


@dataclass(frozen=True)
class _Push:
    """One attempt: compare a folder with the repo, and commit the files that differ."""
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
            raise PruningError(f'push: private=True was given, {self.repo_id} is public; make it private on the Hub')
        files = self._changed(head)
        if not files:
            return Pushed(f'{self.api.endpoint}/{self.repo_id}/commit/{head.sha}', head.sha, files)
        # With parent_commit, the Hub refuses the commit if another push was made after the comparison.
        commit = self.api.create_commit(
            self.repo_id,
            [CommitOperationAdd(name, self.folder / name) for name in files],
            commit_message=message,
            revision=self.revision,
            create_pr=self.create_pr,
            parent_commit=None if self.create_pr else head.sha,
        )
        return Pushed(commit.commit_url, commit.oid, files, commit.pr_url)

    def _head(self) -> ModelInfo:
        return self.api.model_info(self.repo_id, revision=self.revision)

    def _changed(self, head: ModelInfo) -> Tuple[str, ...]:
        """Names of the files that differ from the repo's or are missing there, without a card that must be kept."""
        entries = self.api.list_repo_tree(self.repo_id, revision=head.sha)
        remote = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
        changed = [
            name for name in _names(self.folder) if name not in remote or _differs(self.folder / name, remote[name])]
        if CARD in changed and CARD in remote and not self.overwrite_card and not self._card_is_ours(head):
            warn(f'{CARD} in {self.repo_id} was written or edited by hand and is kept; overwrite_card=True replaces it')
            changed.remove(CARD)
        return tuple(changed)

    def _card_is_ours(self, head: ModelInfo) -> bool:
        with tempfile.TemporaryDirectory() as scratch:
            path = self.api.hf_hub_download(self.repo_id, CARD, revision=head.sha, local_dir=scratch)
            return is_ours(Path(path).read_bytes().decode(errors='replace'))


def _differs(path: Path, entry: RepoFile) -> bool:
    """Whether a file's content differs from a repo's: by the hash of git, or of large file storage where it is there.

    The file is read in pieces, as weights may be larger than memory.
    """
    digest = hashlib.sha256() if entry.lfs else hashlib.sha1(b'blob %d\0' % path.stat().st_size)
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() != (entry.lfs.sha256 if entry.lfs else entry.blob_id)


def _with_causes(error: Optional[BaseException]) -> List[BaseException]:
    """An error, its cause, the cause's cause, and so on."""
    return [error, *_with_causes(error.__cause__)] if error is not None else []


def _refusal(error: BaseException) -> Optional[HfHubHTTPError]:
    """The Hub's response that led to an error, if there was one. An upload's error has it as its cause."""
    return next((e for e in _with_causes(error) if isinstance(e, HfHubHTTPError)), None)


def _is_temporary(error: BaseException) -> bool:
    """Whether a push that failed with this error may succeed if it is tried again."""
    refusal = _refusal(error)
    if refusal:
        return refusal.response.status_code in _TEMPORARY
    return any(isinstance(e, HTTPError) for e in _with_causes(error))


def _reason(error: BaseException) -> str:
    """One line: what went wrong, and what to do."""
    refusal = _refusal(error)
    status = refusal.response.status_code if refusal else None
    if status in _REASONS:
        return f'{_REASONS[status]} ({status})'
    if isinstance(error, OfflineModeIsEnabled):
        return 'huggingface_hub is offline; unset HF_HUB_OFFLINE'
    if refusal is None and _is_temporary(error):
        first_cause = type(_with_causes(error)[-1]).__name__
        return f'no connection to the Hub ({first_cause}); check the network, then push again'
    # The RuntimeError of an upload names only the file, its cause the reason.
    detail = refusal if refusal and isinstance(error, RuntimeError) else error
    return f'{type(detail).__name__} {" ".join(str(detail).split())[:200]}'
