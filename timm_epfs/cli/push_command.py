"""``timm-epfs push``: push a saved model to the Hub, with a model card."""
import argparse
import json
from pathlib import Path

import timm

from ..core import one_line, step
from ..hub import push_to_hub

__all__ = ['add_push_arguments']


def add_push_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all options of the command."""
    parser.add_argument('folder', type=Path, metavar='DIR', help='folder of a saved model (required)')
    parser.add_argument(
        'repo_id', metavar='OWNER/NAME', help='repo to push to; created if it does not exist (required)')
    parser.add_argument(
        '--metrics', type=Path, metavar='FILE', help='JSON file of measurements to show on the card (default: none)')
    parser.add_argument(
        '--private', action='store_true', default=None, help='make the repo private if it is new (default: off)')
    parser.add_argument(
        '--revision', metavar='BRANCH', help='branch to push to; created if it does not exist (default: main)')
    parser.add_argument(
        '--create-pr', action='store_true', help='open a pull request in place of pushing to main (default: off)')
    parser.add_argument(
        '--overwrite-card', action='store_true',
        help='replace a card that was written or edited by hand (default: off)')
    parser.add_argument(
        '--widget-image', type=Path, metavar='FILE',
        help="a PNG or JPEG that the model's page offers as an example (default: none)")
    parser.add_argument(
        '--dry-run', action='store_true',
        help='show the files and how the card begins, send nothing; takes no token and no network (default: off)')
    parser.set_defaults(run=_push)


def _push(args: argparse.Namespace) -> None:
    with step(f'loading {args.folder}'), one_line(f'{args.folder} can\'t be loaded'):
        model = timm.create_model(f'local-dir:{args.folder}', pretrained=True)
    with one_line(f'metrics in {args.metrics} can\'t be read'):
        metrics = json.loads(args.metrics.read_text(encoding='utf-8')) if args.metrics else None
    names = ('private', 'revision', 'create_pr', 'overwrite_card', 'widget_image', 'dry_run')
    pushed = push_to_hub(model, args.repo_id, metrics, **{name: getattr(args, name) for name in names})
    if args.dry_run:
        print(f'would push to {args.repo_id}:\n{pushed}')
        return
    status = f'pushed {", ".join(pushed.files)}' if pushed.files else 'nothing to push, the repo is up to date'
    print(f'{status}: {pushed.pull_request or pushed.url}')
