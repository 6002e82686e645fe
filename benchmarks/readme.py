"""Put the tables of results/ between their markers in the README."""
import re
from pathlib import Path

from common import RESULTS

README = Path(__file__).parents[1] / 'README.md'
TABLES = {
    'zoo': 'zoo.md',
    'one_shot': 'one_shot_resnet56_cifar.md',
    'exactness': 'exactness.md',
    'prune_speed': 'prune_speed.md',
    'create_speed': 'create_speed.md',
    'overhead': 'overhead.md',
}
LONG = 30  # rows; a longer table is folded


def main() -> None:
    text = README.read_text()
    for name, file in TABLES.items():
        if not (RESULTS / file).exists():
            continue
        body = table((RESULTS / file).read_text())
        text = re.sub(
            rf'<!-- {name} -->.*<!-- /{name} -->',
            lambda _, name=name, body=body: f'<!-- {name} -->\n{body}\n<!-- /{name} -->',
            text, flags=re.DOTALL,
        )
    README.write_text(text)


def table(markdown: str) -> str:
    """The results without their heading, long tables folded."""
    lines = markdown.strip().splitlines()
    lines = lines[1:] if lines[0].startswith('# ') else lines
    at = next((i for i, line in enumerate(lines) if line.startswith('|')), len(lines))
    if len(lines) - at > LONG:
        lines = [*lines[:at], '<details><summary>All of it</summary>', '', *lines[at:], '', '</details>']
    return '\n'.join(lines).strip()


if __name__ == '__main__':
    main()
