"""Trains a model from scratch on Imagenette, for cuts to start from: ``training_free.py`` takes the weights.

``python benchmarks/imagenette_dense.py convnext_atto --data-dir DIR -o convnext_atto.safetensors`` takes about an hour
on one thread, and goes on where it was interrupted. DIR has imagenette_train.tar and imagenette_val.tar.
"""
import argparse
import time
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ParseKwargs, random_seed
from torch import nn
from tqdm import tqdm

from timm_epfs.core import write_whole
from timm_epfs.report import top1


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    random_seed(0)
    model = timm.create_model(args.model, num_classes=10, drop_path_rate=0.1, **args.model_kwargs)
    config = resolve_data_config({'input_size': (3, args.img_size, args.img_size)}, model=model)
    train, val = (
        create_loader(
            create_dataset('', root=str(args.data_dir / f'imagenette_{split}.tar')), config['input_size'],
            args.batch_size, is_training=split == 'train', use_prefetcher=False, num_workers=args.workers,
            interpolation=config['interpolation'], mean=config['mean'], std=config['std'], scale=(0.35, 1.0),
            color_jitter=0.2, crop_pct=config['crop_pct'], device=torch.device('cpu'))
        for split in ('train', 'val'))
    optimizer = create_optimizer_v2(model, 'adamw', lr=1e-3, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(
        optimizer, 'cosine', num_epochs=args.epochs, warmup_epochs=2, warmup_lr=1e-5, updates_per_epoch=len(train),
        step_on_epochs=False)
    state = args.output.with_suffix('.pt')
    first = 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved['model'])
        optimizer.load_state_dict(saved['optimizer'])
        first = saved['epochs']
    for epoch in range(first, args.epochs):
        random_seed(epoch)
        start = time.perf_counter()
        loss = train_epoch(model, train, optimizer, scheduler, epoch)
        write_whole(state, lambda part, done=epoch + 1: torch.save(
            {'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'epochs': done}, part))
        print(f'epoch {epoch + 1} of {args.epochs}: loss {loss:.3f}, {time.perf_counter() - start:.0f} s', flush=True)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_whole(args.output, lambda part: save_file(weights, part))
    print(f'top-1 {top1([model.eval()], val)[0]:.2f} %')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('model')
    parser.add_argument('--data-dir', type=Path, required=True)
    parser.add_argument('-o', '--output', type=Path, required=True, help='.safetensors file')
    parser.add_argument('--epochs', type=int, default=20)
    parser.add_argument('--img-size', type=int, default=128)
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs)
    parser.add_argument('--workers', type=int, default=1)
    parser.add_argument('--threads', type=int, default=1)
    return parser.parse_args()


def train_epoch(model: nn.Module, loader, optimizer, scheduler, epoch: int) -> float:
    """Mean loss of an epoch."""
    model.train()
    loss_fn, total = LabelSmoothingCrossEntropy(0.1), 0.0
    for i, (images, targets) in enumerate(tqdm(loader, f'epoch {epoch + 1}', leave=False, mininterval=10)):
        loss = loss_fn(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step_update(epoch * len(loader) + i + 1)
        total += float(loss)
    return total / len(loader)


if __name__ == '__main__':
    main()
