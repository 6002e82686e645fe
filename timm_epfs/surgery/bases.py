"""Dense models by name: timm's and torchvision's."""
import inspect
import re
import reprlib
from contextlib import contextmanager
from math import inf
from typing import Any, Dict, Iterable, Iterator, Mapping, Optional, Union

import timm
import torch
import torchvision
from torch import nn

from ..core import PruningError, nearest, one_line
from ..plan import MAX_ELEMENTS, MAX_PARTS, RESERVED_ARGS, TooLarge, is_usual, limited
from .construction import SkipInit

__all__ = ['TORCHVISION', 'build_base']

TORCHVISION = 'torchvision/'

_USUAL_ARGS = ('num_classes', 'in_chans', 'img_size', 'global_pool', 'drop_rate', 'drop_path_rate')


def build_base(
        base: Optional[str],
        base_args: Optional[Mapping[str, Any]] = None,
        device: Optional[Union[str, torch.device]] = None,
        **create_args: Any,
) -> nn.Module:
    """Build a dense model by name, without weights unless ``create_args`` asks for them.

    Args:
        base: timm name or ``'torchvision/<name>'``.
        base_args: Keyword arguments that shape the architecture (``num_classes``, ``in_chans``, …).
        device: Where to build.
        **create_args: Further arguments of ``timm.create_model``: from the caller, never from a plan.

    Raises:
        PruningError: There is no such model, or it can't be built with these arguments.
    """
    if base is None:
        raise PruningError("the plan names no base: it was made for a module of your own; pass base= when pruning")
    base_args = dict(base_args or {})
    reserved = [name for name in base_args if name in RESERVED_ARGS]
    if reserved:
        raise PruningError(f'base_args of {base} hold {reserved[0]!r}, which is not for a plan to set; remove it')
    cfg = create_args.get('pretrained_cfg')
    if not is_usual(base_args, cfg):
        _check_growth(base, base_args, {'pretrained_cfg': cfg})
    try:
        return _build_on(device, base, base_args, create_args)
    except PruningError as e:
        # A constructor that reads what it computes with tensors can't do so without data.
        if not isinstance(e.__cause__, NotImplementedError) or torch.device(device or 'cpu').type != 'meta':
            raise
        return _build_on('cpu', base, base_args, create_args).to(device)


def _check_growth(base: str, base_args: Dict[str, Any], create_args: Dict[str, Any]) -> None:
    """Raise ``PruningError`` where arguments make a base far larger than it is without, before it is allocated."""
    try:
        with limited(MAX_PARTS, MAX_ELEMENTS):
            _build_on('meta', base, base_args, create_args)
    except TooLarge:
        with limited(inf, inf) as dense:
            _build_on('meta', base, {}, {})
        parts, elements = dense
        if 2 * parts <= MAX_PARTS and 2 * elements <= MAX_ELEMENTS:
            raise
        with limited(max(MAX_PARTS, 2 * parts), max(MAX_ELEMENTS, 2 * elements)):
            _build_on('meta', base, base_args, create_args)
    except PruningError as e:
        if not isinstance(e.__cause__, NotImplementedError):
            raise


def _build_on(
        device: Optional[Union[str, torch.device]],
        base: str,
        base_args: Dict[str, Any],
        create_args: Dict[str, Any],
) -> nn.Module:
    with _default_device(device):
        if base.startswith(TORCHVISION):
            return _build_torchvision(base, base_args)
        if '/' in base or ':' in base or not timm.is_model(base.partition('.')[0]):
            raise _unknown_base(base, timm.list_models())
        with _building(base, base_args, create_args.get('pretrained', False)):
            return timm.create_model(base, **{**create_args, **base_args})


@contextmanager
def _building(base: str, args: Mapping[str, Any], pretrained: bool = False) -> Iterator[None]:
    """Say in one line why a model can't be built, and which keyword was meant where one is misspelt."""
    with one_line(f'{base} can\'t be built' + (f' with {reprlib.repr(args)}' if args else '')):
        try:
            yield
        except TypeError as e:
            unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(e))
            near = nearest(unexpected[1], _USUAL_ARGS, cutoff=0.75) if unexpected else []
            if near and unexpected[1] not in _USUAL_ARGS:
                raise PruningError(f'unknown keyword {unexpected[1]}= of {base}; did you mean {near[0]}=?') from e
            raise
        except OSError:
            if not pretrained:
                raise
            with one_line(f'the weights of {base}, which pretrained=True asks for, can\'t be fetched'):
                raise


@contextmanager
def _default_device(device: Optional[Union[str, torch.device]]) -> Iterator[None]:
    """Make tensors on a device, or wherever they are made at the moment."""
    if device is None:
        yield
        return
    with torch.device(device), SkipInit():
        yield


def _build_torchvision(base: str, args: Mapping[str, Any]) -> nn.Module:
    name = base[len(TORCHVISION):]
    if name not in torchvision.models.list_models():
        raise _unknown_base(base, [TORCHVISION + known for known in torchvision.models.list_models()])
    accepted = inspect.signature(torchvision.models.get_model_builder(name)).parameters
    # Detection and segmentation models fetch a backbone unless told not to.
    no_weights = {arg: None for arg in ('weights', 'weights_backbone') if arg in accepted}
    with _building(base, args):
        return torchvision.models.get_model(name, **no_weights, **args)


def _unknown_base(base: str, known: Iterable[str]) -> PruningError:
    near = nearest(base, known, 3)
    hint = f'nearest: {", ".join(near)}' if near else "give a timm name or 'torchvision/<name>'"
    return PruningError(f'no model is named {base[:80]!r}; {hint}')
