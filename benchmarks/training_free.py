"""What a cut model is worth before any training: cut, BatchNorm only, and compensated, at several budgets.

``python benchmarks/training_free.py resnet56_cifar --data-dir cifar10-jpeg`` starts from the dense weights of
cifar10/results; ``tf_efficientnet_lite0 --checkpoint FILE.safetensors --data-dir FOLDER.tar`` splits a folder of
ImageNet's images by class id into images to fit on and images to test on. Writes results/training_free_<model>.json and
.md, one cut after the other, and goes on where it was interrupted.
"""
import argparse
import copy
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
import timm
import torch
from common import RESULTS, header_line, measure_missing, write_text
from timm.data import ImageNetInfo, create_dataset, create_transform, resolve_data_config
from timm.models import load_checkpoint
from torch import Tensor, nn

import timm_epfs
from timm_epfs.report import top1

HERE = Path(__file__).parent
RANKINGS: Dict[str, Dict[str, Any]] = {
    'obs, measured widths': {'criterion': 'obs', 'widths': 'sensitivity'},
    'fpgm': {'criterion': 'fpgm'},
    'fpgm, cost-aware widths': {'criterion': 'fpgm', 'widths': 'cost'},
    'fpgm, blocks': {'criterion': 'fpgm'},
}
MACS = (0.9, 0.8, 0.7, 0.6, 0.5)
STEPS = ('cut', 'bn', 'bn_corrected', 'compensated')
Batches = List[Tuple[Tensor, Tensor]]


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    path = args.results / f'training_free_{args.model}.json'
    job = Job(args)
    names = [f'{ranking} at {macs:g}' for macs in args.macs for ranking in args.rankings]
    results = measure_missing(
        path, 'cuts', ['dense', *names], job.measure, model=args.model, fit_images=args.fit_images, seed=args.seed,
        images=args.data_dir.name)
    table = markdown(results)
    write_text(path.with_suffix('.md'), table)
    print(table)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('model')
    parser.add_argument('--data-dir', type=Path, required=True, help='CIFAR-10, or a folder or .tar of ImageNet images')
    parser.add_argument('--checkpoint', type=Path, help='dense weights (default: those in cifar10/results)')
    parser.add_argument('--cache', type=Path, default=Path(tempfile.gettempdir()) / 'cifar10.safetensors',
                        help='where decoded CIFAR images are kept')
    parser.add_argument('--fit-images', type=int, default=1024, help='images to compensate with')
    parser.add_argument('--macs', type=float, nargs='+', default=list(MACS), help='shares of the MACs to keep')
    parser.add_argument('--rankings', nargs='+', default=list(RANKINGS)[:3], choices=list(RANKINGS))
    parser.add_argument('--seed', type=int, default=0, help='seed of the split')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--results', type=Path, default=RESULTS, help='folder of the results')
    return parser.parse_args()


class Job:
    """A dense model with its images.

    Args:
        args: The options of the command.
    """

    def __init__(self, args: argparse.Namespace):
        self._args = args

    @cached_property
    def model(self) -> nn.Module:
        """The dense model in evaluation mode, in single precision."""
        model = timm.create_model(self._args.model)
        default = HERE / 'cifar10' / 'results' / self._args.model / 'dense-0.safetensors'
        load_checkpoint(model, str(self._args.checkpoint or default))
        return model.float().eval()

    @cached_property
    def pruner(self) -> timm_epfs.Pruner:
        """Cuts channels, and knows the images to fit on. Each cut is compensated by the benchmark itself."""
        return timm_epfs.Pruner(self.model, data=self.batches[0])

    @cached_property
    def block_pruner(self) -> timm_epfs.Pruner:
        """Cuts blocks."""
        return timm_epfs.Pruner(self.model, data=self.batches[0], kinds=['blocks'])

    @cached_property
    def batches(self) -> Tuple[Batches, Batches]:
        """Images to fit on and images to test on."""
        load = self._cifar if self._args.model.endswith('_cifar') else self._imagenet
        return load()

    def _cifar(self) -> Tuple[Batches, Batches]:
        from one_shot import load, some
        images = load(self._args.data_dir, self._args.cache)
        config = self.model.pretrained_cfg
        fit = some(images, 'train', config, self._args.fit_images)
        return list(fit), list(some(images, 'test', config, None))

    def _imagenet(self) -> Tuple[Batches, Batches]:
        config = resolve_data_config({}, model=self.model)
        dataset = create_dataset('', root=str(self._args.data_dir))
        dataset.transform = create_transform(
            **{name: config[name] for name in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct')})
        ids = {index: name for name, index in dataset.reader.class_name_to_idx.items()}
        labels = ImageNetInfo().label_names()
        order = np.random.default_rng(self._args.seed).permutation(len(dataset))
        parts = order[:self._args.fit_images], order[self._args.fit_images:]

        def batches(indices: np.ndarray) -> Batches:
            found = []
            for part in np.array_split(indices, max(1, len(indices) // 20)):
                images, targets = zip(*(dataset[int(i)] for i in part))
                found.append((torch.stack(images), torch.tensor([labels.index(ids[t]) for t in targets])))
            return found

        return batches(parts[0]), batches(parts[1])

    def measure(self, name: str) -> Dict[str, Any]:
        """Top-1 of the dense model, or of one cut after each step."""
        fit, test = self.batches
        if name == 'dense':
            return {'top1': top1([self.model], test)[0], 'test_images': sum(len(y) for _, y in test)}
        ranking, _, macs = name.rpartition(' at ')
        pruner = self.block_pruner if 'blocks' in ranking else self.pruner
        slim = pruner(macs=float(macs), compensate=False, **RANKINGS[ranking])
        models = {step: copy.deepcopy(slim) for step in STEPS}
        timm_epfs.recalibrate_bn(models['bn'], fit)
        timm_epfs.recalibrate_bn(models['bn_corrected'], fit, dense=self.model)
        timm_epfs.compensate(models['compensated'], self.model, fit, num_images=self._args.fit_images)
        kept = {f'{what}_ratio': left / dense for what, (dense, left) in slim.pruning_plan.cost.items()}
        return {**kept, **dict(zip(models, top1(list(models.values()), test)))}


def markdown(results: Dict[str, Any]) -> str:
    cuts = dict(results['cuts'])
    dense = cuts.pop('dense')
    lines = [
        f'# {results["model"]} without any training',
        '',
        f'Top-1 on {dense["test_images"]:,} images, dense {dense["top1"]:.2f} %. Fitted on {results["fit_images"]:,} '
        f'other images ({results["images"]}, seed {results["seed"]}).',
        header_line(results['machine']),
        '',
        '| MACs | ranking | cut | BatchNorm recalibrated | BatchNorm corrected | compensated | lost |',
        '|---|---|---|---|---|---|---|',
    ]
    for name, row in sorted(cuts.items(), key=lambda item: -float(item[0].rpartition(' at ')[2])):
        ranking = name.rpartition(' at ')[0]
        values = ' | '.join(f'{row[step]:.2f}' for step in STEPS)
        lost = dense['top1'] - row['compensated']
        lines.append(f'| {row["macs_ratio"]:.3f} | {ranking} | {values} | {lost:.2f} |')
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    main()
