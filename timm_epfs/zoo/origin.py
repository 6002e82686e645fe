"""The Hub repo that weights came from, noted in the model's pretrained_cfg, which is saved with them."""
from typing import List, Optional

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn

__all__ = ['note_origin', 'origin_of']

_NOTE = 'made from the weights of '


def note_origin(model: nn.Module) -> nn.Module:
    """Note where timm has just loaded a model's weights from, if that was a repo of the Hub.

    The model's description alone doesn't say: it names the repo whether or not its weights were loaded.
    """
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    if cfg.get('hf_hub_id') and not (cfg.get('state_dict') or cfg.get('file')):
        notes = (note for note in _notes(model) if not note.startswith(_NOTE))
        model.pretrained_cfg = model.default_cfg = {**cfg, 'notes': (*notes, f'{_NOTE}{cfg["hf_hub_id"]}')}
    return model


def origin_of(model: nn.Module) -> Optional[str]:
    """The repo that was noted, ``'<owner>/<name>'``; None where there is none, or what is noted can't be one."""
    repos = [note[len(_NOTE):] for note in _notes(model) if note.startswith(_NOTE)]
    try:
        validate_repo_id(repos[-1] if repos else '')
    except HFValidationError:
        return None
    return repos[-1] if '/' in repos[-1] else None


def _notes(model: nn.Module) -> List[str]:
    notes = (getattr(model, 'pretrained_cfg', None) or {}).get('notes')
    return [note for note in notes if isinstance(note, str)] if isinstance(notes, (list, tuple)) else []
