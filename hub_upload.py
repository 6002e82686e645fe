#!/usr/bin/env python
"""Push every variant that ships with weights to the Hub, each with its card.

Files that the Hub already has are not pushed again, so the same command finishes a run that was interrupted or failed
in part. With ``--dry-run``, it shows each file and how each card begins, and needs neither token nor network. The exit
code is 0 if every push succeeded, 1 if some failed, 2 if no variant matches or an option is wrong.

    python hub_upload.py --org ORG --only "resnet*" --dry-run
"""
import argparse
import json
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import List, Optional, Sequence

import timm
from torch import nn

from timm_epfs.core import PruningError, one_line
from timm_epfs.hub import Pushed, push_to_hub

CARDS = Path(__file__).parent / 'model_cards'


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--org', required=True, metavar='ORG', help='user or organisation to push to (required)')
    parser.add_argument(
        '--only', default='*', metavar='PATTERN',
        help='push only variants whose names match, such as "resnet*" (default: %(default)s)')
    parser.add_argument(
        '--dry-run', action='store_true',
        help='show each file and how each card begins, push nothing; takes no token and no network (default: off)')
    parser.add_argument('--private', action='store_true', help='make new repos private (default: off)')
    parser.add_argument(
        '--overwrite-cards', action='store_true', help='replace cards that were edited on the Hub (default: off)')
    args = parser.parse_args(argv)

    names = [name for name in variants() if fnmatchcase(name, args.only)]
    if not names:
        print(f'hub_upload: no variant that has weights matches {args.only!r}; give another --only', file=sys.stderr)
        return 2
    rows = []
    for name in names:
        repo_id = f'{args.org}/{name}'
        try:
            pushed = upload(name, repo_id, args)
            if args.dry_run:
                print(f'{repo_id}:\n{pushed}\n')
            rows.append((name, repo_id, status(pushed, args.dry_run)))
        except PruningError as e:
            rows.append((name, repo_id, f'failed: {e}'))
    print_table([('name', 'repo', 'status'), *rows])
    return int(any(status.startswith('failed') for *_, status in rows))


def variants() -> List[str]:
    """Full names (name and tag) of the variants whose weights are in the package."""
    from timm_epfs.zoo import variants
    return [f'{name}.{tag}' for name in variants.names() for tag in variants.tags(name)]


def build(name: str) -> nn.Module:
    return timm.create_model(name, pretrained=True)


def upload(name: str, repo_id: str, args: argparse.Namespace) -> Pushed:
    """Push one variant with its card.

    The card is ``model_cards/<name>.md``, if there is one. Otherwise it is generated from the measurements in
    ``model_cards/<name>.json``. The example on the model's page is ``model_cards/<name>.png`` or ``.jpg``.

    Raises:
        PruningError: The push failed; the message says why.
    """
    card, metrics = CARDS / f'{name}.md', CARDS / f'{name}.json'
    images = [path for path in (CARDS / f'{name}.png', CARDS / f'{name}.jpg') if path.is_file()]
    with one_line(name):
        return push_to_hub(
            build(name),
            repo_id,
            json.loads(metrics.read_text(encoding='utf-8')) if metrics.is_file() else None,
            private=args.private or None,
            overwrite_card=args.overwrite_cards,
            card=card.read_text(encoding='utf-8') if card.is_file() else None,
            dry_run=args.dry_run,
            widget_image=next(iter(images), None),
        )


def status(pushed: Pushed, dry_run: bool) -> str:
    """What the table says of a push that succeeded."""
    verb = 'would push' if dry_run else 'pushed'
    return f'{verb} {", ".join(pushed.files)}' if pushed.files else 'unchanged'


def print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


if __name__ == '__main__':
    sys.exit(main())
