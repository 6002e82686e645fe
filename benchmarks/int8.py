"""What int8 costs a pruned model: top-1 by ONNX Runtime after static quantisation, against float32.

``python benchmarks/int8.py FOLDER --data-dir DIR`` takes the folder of a saved model, and CIFAR-10 as
benchmarks/cifar10 does, and writes results/int8_<base>.json and .md. ``--dense FILE`` also measures the dense base with
those weights.
"""
import argparse
import sys
import tempfile
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import timm
import torch
from common import RESULTS, header, header_line, write_results
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn
from tqdm import tqdm

from timm_epfs.deploy import Run, onnx_forward, trace_program, write_onnx
from timm_epfs.zoo import load_model, load_weights

sys.path.insert(0, str(Path(__file__).parent / 'comparison'))

from cifar10_images import Images, load, name_of  # noqa: E402

BATCH = 250
PACKAGES = ('onnx', 'onnxruntime')


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)  # the order of the images for calibration
    pruned = load_model(str(args.folder))
    models = {'pruned': pruned}
    if args.dense:
        dense = timm.create_model(pruned.pruning_plan.base, **pruned.pruning_plan.base_args).eval()
        load_weights(dense, args.dense)
        models = {'dense': dense, **models}
    images = load(args.data_dir, args.cache)
    train, test = (
        Images(images[f'{split}.pixels'], images[f'{split}.targets'], pruned.pretrained_cfg, BATCH,
               torch.device('cpu'), training=split == 'train')
        for split in ('train', 'test')
    )
    calibration = [batch for batch, _ in islice(train, -(-args.calibration // BATCH))]
    name = pruned.pruning_plan.base
    results = {
        'machine': header(), 'packages': {package: version(package) for package in PACKAGES}, 'model': name,
        'recipe': pruned.pruning_plan.recipe, 'macs': pruned.pruning_plan.cost['macs'], 'images': name_of(images),
        'test_images': len(test.targets), 'calibration_images': sum(map(len, calibration)),
        'rows': {what: measure(model, calibration, test) for what, model in models.items()},
    }
    write_results(args.results / f'int8_{name}.json', results, markdown(results))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', type=Path, help='of a model saved by timm_epfs')
    parser.add_argument('--data-dir', type=Path, required=True, help='CIFAR-10: folders or tar files of images')
    parser.add_argument('--dense', type=Path, help='safetensors of the dense base')
    parser.add_argument('--cache', type=Path, default=Path(tempfile.gettempdir()) / 'cifar10.safetensors',
                        help='where decoded images are kept')
    parser.add_argument('--calibration', type=int, default=1000, help='training images to find ranges with')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--results', type=Path, default=RESULTS)
    return parser.parse_args()


class Calibration(CalibrationDataReader):
    def __init__(self, batches: Sequence[Tensor]):
        self.batches = iter(batches)

    def get_next(self) -> Optional[Dict[str, Any]]:
        batch = next(self.batches, None)
        return None if batch is None else {'images': batch.numpy()}


@torch.inference_mode()
def measure(model: nn.Module, calibration: List[Tensor], test: Images) -> Dict[str, Dict[str, float]]:
    """Top-1 in percent, and bytes of the ONNX file, by number format."""
    with tempfile.TemporaryDirectory() as folder:
        exported, prepared, quantised = (Path(folder) / f'{name}.onnx' for name in ('float32', 'prepared', 'int8'))
        with torch.inference_mode(False), torch.no_grad():
            write_onnx(trace_program(model, calibration[0], dynamic_batch=True), exported)
        quant_pre_process(exported, prepared, skip_symbolic_shape=True)  # norms go into convolutions
        quantize_static(prepared, quantised, Calibration(calibration), per_channel=True)
        return {
            'torch float32': {'top1': top1(lambda images: [model(images)], test)},
            **{
                f'ONNX Runtime {kind}': {'top1': top1(onnx_forward(path), test), 'bytes': path.stat().st_size}
                for kind, path in (('float32', exported), ('int8', quantised))
            },
        }


def top1(run: Run, test: Images) -> float:
    right = sum((run(images)[0].argmax(1) == targets).sum().item() for images, targets in tqdm(test, leave=False))
    return 100 * right / len(test.targets)


def markdown(results: Dict[str, Any]) -> str:
    packages = ', '.join(f'{name} {number}' for name, number in results['packages'].items())
    before, after = results['macs']
    lines = [
        f'# {results["model"]} in int8',
        '',
        'Weights (one scale per channel) and activations in int8, by ONNX Runtime\'s static quantisation, calibrated '
        f'on {results["calibration_images"]:,} training images. Top-1 on {results["test_images"]:,} test images of '
        f'{results["images"]}. Pruned to {after / before:.2f} of the MACs.',
        f'{header_line(results["machine"])[:-1]}; {packages}.',
        '',
        '| model | float32, % | float32 by ONNX Runtime, % | int8, % | drop | float32, kB | int8, kB |',
        '|---|---|---|---|---|---|---|',
    ]
    for what, row in results['rows'].items():
        plain, single, int8 = row['torch float32'], row['ONNX Runtime float32'], row['ONNX Runtime int8']
        lines.append(
            f'| {what} | {plain["top1"]:.2f} | {single["top1"]:.2f} | {int8["top1"]:.2f} '
            f'| {plain["top1"] - int8["top1"]:.2f} | {single["bytes"] / 1e3:.0f} | {int8["bytes"] / 1e3:.0f} |')
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    main()
