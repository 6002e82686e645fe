"""Limits on untrusted plans and configs, checked before anything is built from them."""
import re
from contextlib import contextmanager
from threading import get_ident
from typing import Any, Iterator, List, Mapping, Optional

from torch import Tensor
from torch.nn.modules import module as hooks

from ..core import PruningError, Rule, invalid

__all__ = [
    'MAX_CHARACTERS', 'MAX_ELEMENTS', 'MAX_PARTS', 'NAME', 'RESERVED_ARGS', 'TooLarge', 'check_arguments', 'check_size',
    'check_text', 'is_usual', 'limited',
]

# The largest plans of timm's zoo have 20,000 values (densenet264d) and 2 million characters (eva02_enormous).
MAX_VALUES = 2 ** 17
MAX_CHARACTERS = 2 ** 22
MAX_DEPTH = 20
MAX_NAME = 300
# A name as a module or a field may have one: printable, so that a message that repeats it is one line.
NAME = Rule(
    f'a name of at most {MAX_NAME} printable letters',
    lambda value: isinstance(value, str) and value.isprintable() and len(value) <= MAX_NAME,
)
# How large a number among the arguments of a base may be, and how many arguments, and values in each, there may be.
MAX_NUMBER = 2 ** 14
_LARGEST = {'num_classes': 2 ** 18, 'depth_multiplier': 2 ** 4}
MAX_ARGUMENTS = 256
# How large arguments that aren't usual may make a base: a gigabyte of parameters and buffers, and as many modules,
# parameters and buffers as all but the deepest models of timm have. A base that has more without them may double.
MAX_ELEMENTS = 2 ** 28
MAX_PARTS = 2 ** 12

# Arguments that decide what is loaded, not what is built: no plan and no config sets them.
RESERVED_ARGS = (
    'pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay', 'pretrained_model_args', 'pretrained_strict',
    'pretrained_backbone', 'checkpoint_path', 'cache_dir', 'weights', 'weights_backbone', 'plan', 'pruned',
    'features_only', 'feature_cls', 'scriptable', 'exportable', 'no_jit',
)
# Arguments that decide where it is built: no plan and no config sets them, a caller may.
_PLACEMENT_ARGS = ('device', 'dtype')
# With arguments up to these, every model of timm keeps its usual size.
_USUAL = {'num_classes': 2 ** 15, 'in_chans': 2 ** 6, 'img_size': 2 ** 10}
_ARGUMENT = r'[A-Za-z]\w{0,63}'
_WORD = r'[\w-]{0,64}'


class TooLarge(PruningError):
    """A model that is being built has more parts or elements than it may have."""


def check_text(text: str, what: str) -> None:
    """Raise ``PruningError`` where a text is too long to be parsed, or parses into too many lists and objects."""
    if len(text) > MAX_CHARACTERS:
        raise PruningError(f'{what}: more than {MAX_CHARACTERS} characters; no model needs so many')
    if text.count('[') + text.count('{') > MAX_VALUES:
        raise PruningError(f'{what}: more than {MAX_VALUES} values; no model needs so many')


def check_size(data: Any, what: str) -> None:
    """Raise ``PruningError`` where JSON values are too many, too long or too deep, without recursing into them."""
    level, values, characters = [data], 0, 0
    for _ in range(MAX_DEPTH):
        inner = [value for value in level if isinstance(value, (dict, list, tuple))]
        values += len(level) + sum(len(value) for value in inner)
        characters += sum(len(value) for value in level if isinstance(value, str))
        if values > MAX_VALUES:
            raise PruningError(f'{what}: more than {MAX_VALUES} values; no model needs so many')
        if characters > MAX_CHARACTERS:
            raise PruningError(f'{what}: more than {MAX_CHARACTERS} characters; no model needs so many')
        if not inner:
            return
        level = [item for value in inner for item in value]
        level += [item for value in inner if isinstance(value, dict) for item in value.values()]
    raise PruningError(f'{what}: nested more than {MAX_DEPTH} deep')


def check_arguments(args: Mapping[str, Any], where: str) -> None:
    """Raise ``PruningError`` where keyword arguments of a base do more than describe it in words and usual numbers."""
    if len(args) > MAX_ARGUMENTS:
        raise PruningError(f'{where}: more than {MAX_ARGUMENTS} arguments; no model takes so many')
    for name in args:
        if not isinstance(name, str) or not re.fullmatch(_ARGUMENT, name, re.ASCII):
            raise invalid(where, name, 'the name of an argument')
        if name in RESERVED_ARGS or name in _PLACEMENT_ARGS:
            raise PruningError(f'{where} hold {name!r}, which is not for a plan or a config to set; remove it')
        _check_values(args[name], _LARGEST.get(name, MAX_NUMBER), f'{where}.{name}')


def _check_values(value: Any, largest: int, where: str) -> None:
    values = [value]
    for value in values:
        if isinstance(value, (dict, list, tuple)):
            values += [*value, *value.values()] if isinstance(value, dict) else value
        elif isinstance(value, str) and not re.fullmatch(_WORD, value, re.ASCII):
            raise invalid(where, value, 'a word')
        elif isinstance(value, (int, float)) and not -largest <= value <= largest:
            raise invalid(where, value, f'numbers up to {largest}')
        if len(values) > MAX_ARGUMENTS:
            raise PruningError(f'{where}: more than {MAX_ARGUMENTS} values; no model takes so many')


def is_usual(args: Mapping[str, Any], cfg: Optional[Mapping[str, Any]] = None) -> bool:
    """Whether arguments of a base, and what a pretrained_cfg adds to them, can't make it large."""
    cfg = cfg if isinstance(cfg, dict) else {}
    sizes = {'num_classes': cfg.get('num_classes', 0), 'img_size': cfg.get('input_size', 0), **args}
    sizes.pop('global_pool', None)
    return all(
        isinstance(number, int) and number <= _USUAL.get(name, -1)
        for name, size in sizes.items() for number in (size if isinstance(size, (list, tuple)) else [size])
    )


@contextmanager
def limited(parts: float, elements: float) -> Iterator[List[int]]:
    """Stop modules from being made in this thread once they have too many parts, or tensors with too many elements.

    On the meta device nothing is allocated until then.

    Args:
        parts: Of modules, parameters and buffers.
        elements: Of all parameters and buffers together.

    Yields:
        Both numbers so far.
    """
    thread, made = get_ident(), [0, 0]

    def count(module: Any, name: str, value: Any) -> None:
        if get_ident() != thread:
            return
        made[0] += 1
        made[1] += value.numel() if isinstance(value, Tensor) else 0
        if made[0] > parts or made[1] > elements:
            limit = f'{parts} modules and tensors' if made[0] > parts else f'{elements:,} elements'
            raise TooLarge(f'more than {limit}; no plan needs so large a base')

    handles = [
        hooks.register_module_module_registration_hook(count),
        hooks.register_module_parameter_registration_hook(count),
        hooks.register_module_buffer_registration_hook(count),
    ]
    try:
        yield made
    finally:
        for handle in handles:
            handle.remove()
