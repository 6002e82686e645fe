"""Put the tables of results/ between their markers in benchmarks/README.md, and the headlines into the README."""
import json
import re
from pathlib import Path
from textwrap import wrap
from typing import Any, Dict, List

from common import RESULTS, write_text
from methods import methods

HERE = Path(__file__).parent
README = HERE.parent / 'README.md'
TABLES = {
    'zoo': 'zoo.md',
    'beyond': 'beyond.md',
    **{f'training_free_{name}': f'training_free_{name}.md'
       for name in ('resnet20_cifar', 'resnet56_cifar', 'tf_efficientnet_lite0', 'convnext_atto_imagenette',
                    'vit_tiny_patch16_224_imagenette', 'cost')},
    'one_shot': 'one_shot_resnet56_cifar.md',
    'exactness': 'exactness.md',
    'latency': 'latency.md',
    'prune_speed': 'prune_speed.md',
    'create_speed': 'create_speed.md',
    'overhead': 'overhead.md',
    'gpu': 'gpu.md',
    **{f'int8_{name}': f'int8_{name}.md' for name in ('resnet20_cifar', 'resnet56_cifar', 'tf_efficientnet_lite0')},
}
LONG = 30  # rows; a longer table is folded


def main() -> None:
    tables = {name: table((RESULTS / file).read_text()) for name, file in TABLES.items() if (RESULTS / file).exists()}
    comparisons = {images: comparison(images) for images in ('cifar10', 'imagenette')}
    fill(HERE / 'README.md', {'methods': methods(), **tables, **comparisons})
    fill(README, {'headlines': '\n'.join(headlines())})


def fill(page: Path, sections: Dict[str, str]) -> None:
    """Put each text between its markers."""
    text = page.read_text()
    for name, body in sections.items():
        text = re.sub(
            rf'<!-- {name} -->.*<!-- /{name} -->',
            lambda _, name=name, body=body: f'<!-- {name} -->\n{body}\n<!-- /{name} -->',
            text, flags=re.DOTALL,
        )
    write_text(page, text)


def table(markdown: str, fold: bool = True) -> str:
    """The results without their heading, long tables folded."""
    lines = markdown.strip().splitlines()
    lines = lines[1:] if lines[0].startswith('# ') else lines
    at = next((i for i, line in enumerate(lines) if line.startswith('|')), len(lines))
    if fold and len(lines) - at > LONG:
        lines = [*lines[:at], '<details><summary>All of it</summary>', '', *lines[at:], '', '</details>']
    return '\n'.join(lines).strip()


def comparison(images: str) -> str:
    """Tables and pictures that comparison/table.py and comparison/pictures.py made of one set of images."""
    parts: List[str] = []
    for path in sorted((HERE / images / 'results').glob('*.md')):
        parts += [f'### {path.stem}', '', table(path.read_text(), fold=False), '']
        pictures = [path.with_suffix('.png'), *path.parent.glob(f'{path.stem}-*.png')]
        for picture in sorted(filter(Path.exists, pictures), key=lambda picture: picture.stem):
            parts += [f'![{picture.stem}]({images}/results/{picture.name})', '']
    return '\n'.join(parts).strip()


def headlines() -> List[str]:
    """What a new user asks first, as lines of a Markdown list."""
    zoo, beyond, exact, speed, added, clock = (
        load(name) for name in ('zoo', 'beyond', 'exactness', 'prune_speed', 'overhead', 'latency'))
    ours, rivals = (
        sorted(row['dense']['least_ms'] / row[by]['least_ms'] for row in clock['rows'].values() if by in row)
        for by in ('macs', 'torch-pruning'))
    models, theirs = (
        {name.partition('@')[0] for name, row in clock['rows'].items() if by in row}
        for by in ('macs', 'torch-pruning'))
    seconds = {name: row['ours_whole'] for name, row in speed['models'].items()}
    fastest, slowest = (pick(seconds, key=seconds.get) for pick in (min, max))
    steps = [100 * (row['time'] - 1) for row in added['models'].values()]
    items = (
        f'{zoo["timm"]["ok"]:,} of timm\'s {zoo["timm"]["names"]:,} models and {zoo["torchvision"]["ok"]} of '
        f'torchvision\'s {zoo["torchvision"]["names"]} can be cut to half their MACs, run, and rebuilt from their '
        'plans: residual streams, depthwise and grouped convolutions, SE and attention heads included.',
        f'{beyond["ok"]} of {beyond["models"]} models of other libraries (detectors, segmentation, video, audio, '
        f'GANs; transformers, open_clip, Ultralytics) are cut to half their MACs and compute what the masked model '
        f'does. torch-pruning cuts {beyond["rival_ok"]} of them.',
        f'Masking units and cutting them give the same outputs in {exact["ok"]} of {exact["names"]} models: median '
        f'error {exact["median_error"]:.1e}, worst {max(exact["worst"].values()):.1e}, '
        f'{len(exact["float64_needed"])} of them compared in float64.',
        f'On {clock["threads"]} thread, {len(models)} models cut to half their MACs run {ours[0]:.1f} to '
        f'{ours[-1]:.1f} times as fast as before; cut by torch-pruning, {len(theirs)} of them run {rivals[0]:.1f} to '
        f'{rivals[-1]:.1f} times as fast.',
        f'Pruning takes {seconds[fastest]:.1f} s (`{fastest}`) to {seconds[slowest]:.1f} s (`{slowest}`) on '
        f'{speed["threads"]} threads. EPFS makes a training step {min(steps):.0f} to {max(steps):.0f} % longer.',
    )
    return [line for item in items for line in wrap(f'- {item}', 120, subsequent_indent='  ', break_on_hyphens=False)]


def load(name: str) -> Dict[str, Any]:
    return json.loads((RESULTS / f'{name}.json').read_text())


if __name__ == '__main__':
    main()
