"""The sets of images that methods are compared on: what a run of one reads, and what it is called in results."""
import hashlib
from pathlib import Path
from typing import Sequence

import timm
import torch
from cifar10_images import Images, load, name_of
from safetensors.torch import load_file
from timm.data import ImageNetInfo, create_dataset

from timm_epfs.training.checkpoints import write_tensors
from timm_epfs.training.data import Batches
from timm_epfs.training.run import Run

__all__ = ['SETS', 'Cifar10', 'Imagenette']

# By the fingerprint of the validation images: only runs on the same images are compared.
IMAGENETTE = {'3f9d9dbd': 'Imagenette, training images of 176 x 176'}


class Cifar10:
    """CIFAR-10, decoded once and kept in memory.

    Args:
        data_dir: Folder with ``train`` and ``test`` (folders or tar files), or torchvision's copy.
        runs: Folder that keeps what was decoded.
    """
    flags: Sequence[str] = ()

    def __init__(self, data_dir: Path, runs: Path):
        self.tensors = load(data_dir, runs / 'images.safetensors')
        self.name = name_of(self.tensors)

    def batches(self, run: Run) -> Batches:
        """What a run trains and tests on."""
        device = torch.device(run.args.device)

        def of(split: str, size: int) -> Images:
            pixels, targets = (self.tensors[f'{split}.{part}'] for part in ('pixels', 'targets'))
            return Images(pixels, targets, run.config, size, device, training=split == 'train')

        test = of('test', 500)
        return Batches(of('train', run.args.batch_size), test, test)

    def start(self, model: str, weights: Path, folder: Path) -> Path:
        """The file of the weights that a dense baseline starts from."""
        return weights


class Imagenette:
    """Some of ImageNet's classes, such as Imagenette's ten. timm decodes the JPEGs, each time anew.

    Args:
        data_dir: Folder with imagenette_train.tar and imagenette_val.tar.
        runs: Not used.

    Raises:
        SystemExit: With one line, if a file is missing.
    """

    def __init__(self, data_dir: Path, runs: Path):
        val = data_dir / 'imagenette_val.tar'
        for path in (data_dir / 'imagenette_train.tar', val):
            if not path.is_file():
                raise SystemExit(f'{path} is not there: name the folder of Imagenette\'s two .tar files by --data-dir')
        mark = hashlib.sha256(val.read_bytes()).hexdigest()[:8]
        self.name = IMAGENETTE.get(mark, f'images {mark}')
        ids = create_dataset('', root=str(val)).reader.class_name_to_idx
        self._classes = sorted(ids, key=ids.get)
        self.flags = (
            '--train-split', 'imagenette_train', '--val-split', 'imagenette_val', '--num-classes', str(len(ids)))

    def batches(self, run: Run) -> Batches:
        """What a run trains and tests on."""
        return Run._open_batches(run)

    def start(self, model: str, weights: Path, folder: Path) -> Path:
        """The file of the weights that a dense baseline starts from: the classifier's rows of these classes alone.

        Args:
            model: Name of the model.
            weights: Its weights for all of ImageNet's classes.
            folder: Where the new file goes.
        """
        labels = ImageNetInfo().label_names()
        rows = [labels.index(name) for name in self._classes]
        classifier, tensors = timm.get_pretrained_cfg(model).classifier, load_file(weights)
        for name in (f'{classifier}.weight', f'{classifier}.bias'):
            tensors[name] = tensors[name][rows]
        path = folder / 'start.safetensors'
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors)
        return path


SETS = {'cifar10': Cifar10, 'imagenette': Imagenette}
