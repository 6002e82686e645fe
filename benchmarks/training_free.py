"""What a cut model is worth before any training: cut, BatchNorm only, and compensated, at several budgets.

``python benchmarks/training_free.py resnet56_cifar --data-dir cifar10-jpeg`` starts from the dense weights of
cifar10/results; ``tf_efficientnet_lite0 --checkpoint FILE.safetensors --data-dir FOLDER.tar`` splits a folder of
ImageNet's images by class id into images to fit on and images to test on. A folder that has imagenette_train.tar and
imagenette_val.tar is fitted on the one and tested on the other, over the model's classes: all of ImageNet's, or its ten
(``--model-kwargs num_classes=10``). The ranking ``epfs`` takes the units that a run of cifar10 learned with EPFS, from
the same dense weights. Writes results/training_free_<model>.json, .md and .png (of Imagenette
training_free_<model>_imagenette), one cut after the other, and goes on where it was interrupted. Seeds and numbers of
images add to what is there.
"""
import argparse
import copy
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
import timm
import torch
import torch_pruning as tp
from common import RESULTS, measure_missing, one_line, write_results
from timm.data import ImageNetInfo, create_dataset, create_transform, resolve_data_config
from timm.models import load_checkpoint
from timm.utils import ParseKwargs
from torch import Tensor, nn
from torch_pruning_recipe import nearest, one_shot
from training_free_table import STEPS, draw, markdown

import timm_epfs
from timm_epfs.report import count_macs, top1
from timm_epfs.surgery import cut_copy

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / 'comparison'))

from records import plan_of  # noqa: E402

LEARNED = 'epfs'
RIVAL = 'torch-pruning'
RANKINGS: Dict[str, Dict[str, Any]] = {
    'obs, measured widths': {'criterion': 'obs', 'widths': 'sensitivity'},
    'fpgm': {'criterion': 'fpgm'},
    'fpgm, cost-aware widths': {'criterion': 'fpgm', 'widths': 'cost'},
    RIVAL: {},
    'fpgm, blocks': {'criterion': 'fpgm'},
    LEARNED: {},
}
MACS = (0.9, 0.8, 0.7, 0.6, 0.5)
Batches = List[Tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Cell:
    """One cut.

    Attributes:
        ranking: One of ``RANKINGS``.
        macs: Share of the MACs to keep.
        images: Number of images to fit on.
        seed: Seed of the choice of images.
    """
    ranking: str
    macs: float
    images: int
    seed: int

    @property
    def name(self) -> str:
        return f'{self.ranking} at {self.macs:g}, {self.images} images, seed {self.seed}'


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    suffix = '_imagenette' if has_imagenette(args.data_dir) else ''
    path = args.results / f'training_free_{args.model}{suffix}.json'
    cells = {
        cell.name: cell for seed in args.seeds for macs in args.macs for ranking in args.rankings
        for cell in [Cell(ranking, macs, args.fit_images, seed)]}
    dense = {f'dense, seed {seed}': seed for seed in args.seeds}
    jobs = {seed: Job(args, seed) for seed in args.seeds}

    def measure(name: str) -> Dict[str, Any]:
        if name in dense:
            return jobs[dense[name]].measure_dense()
        return {**asdict(cells[name]), **jobs[cells[name].seed].measure(cells[name])}

    images = 'Imagenette' if suffix else args.data_dir.name
    results = measure_missing(path, 'cuts', [*dense, *cells], measure, model=args.model, images=images)
    write_results(path, results, markdown(results))
    draw(results, path.with_suffix('.png'))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_job_arguments(parser)
    parser.add_argument('--macs', type=float, nargs='+', default=list(MACS), help='shares of the MACs to keep')
    parser.add_argument('--rankings', nargs='+', default=list(RANKINGS)[:4], choices=list(RANKINGS))
    parser.add_argument('--seeds', type=int, nargs='+', default=[0], help='seeds of the choice of images')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--results', type=Path, default=RESULTS, help='folder of the results')
    return parse_job(parser)


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a ``Job``."""
    parser.add_argument('model')
    parser.add_argument('--data-dir', type=Path, required=True, help='CIFAR-10, or a folder or .tar of ImageNet images')
    parser.add_argument('--checkpoint', type=Path, help='dense weights (default: those in cifar10/results)')
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs)
    parser.add_argument('--img-size', type=int, help="height and width of a folder's images (default: the model's own)")
    parser.add_argument('--cache', type=Path, default=Path(tempfile.gettempdir()) / 'cifar10.safetensors',
                        help='where decoded CIFAR images are kept')
    parser.add_argument('--fit-images', type=int, default=1024, help='images to compensate with')
    parser.add_argument('--held-back', type=int, default=400,
                        help='of a folder of ImageNet images, those that are not tested on; at least --fit-images')


def parse_job(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the options, and refuse those by which a ``Job`` would test on images that it fits on."""
    args = parser.parse_args()
    if not args.model.endswith('_cifar') and not has_imagenette(args.data_dir) and args.fit_images > args.held_back:
        parser.error(f'--fit-images {args.fit_images} would be tested on: give --held-back as many')
    return args


def has_imagenette(folder: Path) -> bool:
    return (folder / 'imagenette_val.tar').exists()


class Job:
    """A dense model with its images.

    Args:
        args: The options of the command.
        seed: Seed of the choice of images.
    """

    def __init__(self, args: argparse.Namespace, seed: int):
        self._args, self._seed = args, seed

    @cached_property
    def model(self) -> nn.Module:
        """The dense model in evaluation mode, in single precision."""
        model = timm.create_model(self._args.model, **self._args.model_kwargs)
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
        if self._args.model.endswith('_cifar'):
            return self._cifar()
        return self._imagenette() if has_imagenette(self._args.data_dir) else self._imagenet()

    def _cifar(self) -> Tuple[Batches, Batches]:
        from one_shot import load, some
        images = load(self._args.data_dir, self._args.cache)
        config = self.model.pretrained_cfg
        fit = some(images, 'train', config, self._args.fit_images, self._seed)
        return list(fit), list(some(images, 'test', config, None))

    def _imagenet(self) -> Tuple[Batches, Batches]:
        dataset = self._dataset(self._args.data_dir)
        order = np.random.default_rng(self._seed).permutation(len(dataset))
        return self._read(dataset, order[:self._args.fit_images]), self._read(dataset, order[self._args.held_back:])

    def _imagenette(self) -> Tuple[Batches, Batches]:
        train, val = (self._dataset(self._args.data_dir / f'imagenette_{split}.tar') for split in ('train', 'val'))
        order = np.random.default_rng(self._seed).permutation(len(train))
        return self._read(train, order[:self._args.fit_images]), self._read(val, np.arange(len(val)))

    def _dataset(self, root: Path) -> Any:
        """Images as the model gets them when it is tested."""
        size = self._args.img_size or self.model.pretrained_cfg['input_size'][-1]
        config = resolve_data_config({'input_size': (3, size, size)}, model=self.model)
        dataset = create_dataset('', root=str(root))
        dataset.transform = create_transform(
            **{name: config[name] for name in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct')})
        return dataset

    def _read(self, dataset: Any, indices: np.ndarray) -> Batches:
        """Some images, with the indices of their classes in the model."""
        classes = dataset.reader.class_name_to_idx
        if self.model.num_classes == 1000:
            labels = ImageNetInfo().label_names()
            numbers = {index: labels.index(name) for name, index in classes.items()}
        else:
            numbers = {index: index for index in classes.values()}
        batches = []
        for part in np.array_split(indices, max(1, len(indices) // 20)):
            images, targets = zip(*(dataset[int(i)] for i in part))
            batches.append((torch.stack(images), torch.tensor([numbers[target] for target in targets])))
        return batches

    def measure_dense(self) -> Dict[str, Any]:
        """Top-1 of the dense model."""
        test = self.batches[1]
        return {'seed': self._seed, 'top1': top1([self.model], test)[0], 'test_images': sum(len(y) for _, y in test)}

    def measure(self, cell: Cell) -> Dict[str, Any]:
        """Top-1 of one cut after each step."""
        fit, test = self.batches
        if cell.ranking == RIVAL:
            try:
                slim, ratio = self._cut_by_torch_pruning(cell.macs)
            except Exception as error:
                return {'error': one_line(error, 120)}
            models = {'cut': slim, 'bn': timm_epfs.recalibrate_bn(copy.deepcopy(slim), fit)}
            return {'macs_ratio': ratio, **dict(zip(models, top1(list(models.values()), test)))}
        slim = self._cut(cell)
        kept = {f'{what}_ratio': left / dense for what, (dense, left) in slim.pruning_plan.cost.items()}
        norms = any(isinstance(module, nn.BatchNorm2d) for module in slim.modules())
        models = {step: copy.deepcopy(slim) for step in STEPS if norms or 'bn' not in step}
        if norms:
            timm_epfs.recalibrate_bn(models['bn'], fit)
            timm_epfs.recalibrate_bn(models['bn_corrected'], fit, dense=self.model)
        start = time.perf_counter()
        timm_epfs.compensate(models['compensated'], self.model, fit, num_images=cell.images)
        seconds = time.perf_counter() - start
        return {**kept, **dict(zip(models, top1(list(models.values()), test))), 'seconds_to_compensate': seconds}

    def _cut(self, cell: Cell) -> nn.Module:
        """What is left of the model, with the weights that it had."""
        if cell.ranking == LEARNED:
            share = round(100 * (1 - cell.macs))
            run = HERE / 'cifar10' / 'results' / self._args.model / f'epfs_filters_neyman-{share}-{cell.seed}.json'
            plan = plan_of(json.loads(run.read_text())['plan'])
            slim = cut_copy(self.model, plan)
            slim.pruning_plan = plan
            return slim
        pruner = self.block_pruner if 'blocks' in cell.ranking else self.pruner
        return pruner(macs=cell.macs, compensate=False, **RANKINGS[cell.ranking])

    def _cut_by_torch_pruning(self, macs: float) -> Tuple[nn.Module, float]:
        """What torch-pruning's one-shot makes of the model, and the share of the MACs that this leaves."""
        example = self.batches[0][0][0][:1]
        dense = count_macs(self.model, (example,), {})
        importance = tp.importance.GroupMagnitudeImportance(p=2)

        def cut(ratio: float) -> Tuple[nn.Module, float]:
            slim = one_shot(copy.deepcopy(self.model), example, importance, ratio=ratio)
            return slim, count_macs(slim, (example,), {}) / dense

        return nearest(cut, macs)


if __name__ == '__main__':
    main()
