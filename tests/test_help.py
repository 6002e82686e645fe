"""The help of every command says what each option does, and what happens without it."""
import argparse
import re

import pytest

from timm_epfs.allocate import ALIGN
from timm_epfs.cli.shell import _parser
from timm_epfs.pruner import Choice
from timm_epfs.training.data import _DIGITS_AUGMENTATION, DIGITS_SIZE


def subparsers():
    commands, = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    return commands.choices


OPTIONS = {
    f'{command} {"/".join(action.option_strings) or action.dest}': (parser, action)
    for command, parser in subparsers().items()
    for action in parser._actions if not isinstance(action, argparse._HelpAction)
}


def help_of(parser, action):
    return parser._get_formatter()._expand_help(action)


def default_in_help(name):
    """What stands after ``default:`` in an option's help, without the exceptions that follow a semicolon."""
    return re.search(r'\(default: (.+)\)$', help_of(*OPTIONS[name]))[1].split(';')[0]


@pytest.mark.parametrize('command', subparsers())
def test_help_is_printed(command, capsys):
    with pytest.raises(SystemExit) as end:
        subparsers()[command].parse_args(['--help'])
    assert end.value.code == 0 and command in capsys.readouterr().out


@pytest.mark.parametrize('name', OPTIONS)
def test_help_ends_with_the_default_or_says_that_the_option_is_required(name):
    parser, action = OPTIONS[name]
    text = help_of(parser, action)
    of_a_group = any(
        group.required and action in group._group_actions for group in parser._mutually_exclusive_groups)
    if action.required:
        assert text.endswith('(required)')
    elif of_a_group:
        assert re.search(r'\(required: one of --.+\)$', text)
    else:
        assert re.search(r'\((default:|required[:,]) [^()]+\)$', text), text


@pytest.mark.parametrize('name', [
    name for name, (_, action) in OPTIONS.items() if not action.required and action.default not in (None, '')])
def test_the_default_in_the_help_is_that_of_the_parser(name):
    default = OPTIONS[name][1].default
    shown = default_in_help(name)
    if default is False:
        assert shown == 'off'
    elif default == {}:
        assert shown == 'none'
    elif isinstance(default, list):
        assert shown == ' '.join(map(str, default))
    elif isinstance(default, str):
        assert shown == default
    else:
        assert float(shown) == default


@pytest.mark.parametrize('name, default', [
    ('prune --criterion', Choice().for_data(False).criterion),
    ('prune --scope', Choice().scope),
    ('train --scope', Choice().scope),
    ('prune --floor', str(Choice().floor)),
    ('train --round-to', f'{ALIGN} in wide layers and less in narrow ones'),
])
def test_a_default_that_the_library_fills_in_is_the_librarys(name, default):
    assert default_in_help(name) == default


@pytest.mark.parametrize('option, default', [
    ('--img-size', f'{DIGITS_SIZE} for --dataset digits'),
    *((f'--{name.replace("_", "-")}', 'digits: ' + ' '.join(
        f'{x:g}' for x in (values if isinstance(values, tuple) else [values])))
      for name, values in _DIGITS_AUGMENTATION.items()),
])
def test_defaults_of_the_digits_are_those_that_they_are_read_with(option, default):
    assert help_of(*OPTIONS[f'train {option}']).endswith(f'; {default})')
