"""What users bring to other libraries' trainers, in small: models, images, a Trainer."""
import timm
import torch
from timm.models import get_model_args

SIZE, CLASSES, STEPS, BATCH = 32, 5, 6, 8


def images(n=BATCH, seed=0):
    return torch.randn(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def labelled(n=4 * BATCH, size=SIZE):
    return [{'pixel_values': image[:, :size, :size], 'labels': i % CLASSES} for i, image in enumerate(images(n))]


def dense(name='test_vit', **args):
    torch.manual_seed(0)
    small = {'img_size': SIZE, 'depth': 2} if name == 'test_vit' else {}
    return timm.create_model(name, **{'num_classes': CLASSES, **small, **args})


def wrapped(model):
    """A dense timm model as a user of transformers has it."""
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification
    args = {name: value for name, value in get_model_args(model).items() if name != 'num_classes'}
    found = TimmWrapperForImageClassification(TimmWrapperConfig(
        architecture=model.pretrained_cfg['architecture'], num_labels=model.num_classes, model_args=args))
    found.timm_model.load_state_dict(model.state_dict())
    return found


def make_trainer(folder, model, callbacks=(), mixin=True, image_size=SIZE, **options):
    from transformers import Trainer, TrainingArguments

    from timm_epfs.integrations import PruningTrainerMixin
    own = {name: options.pop(name) for name in (
        'teacher', 'distill_loss_weight', 'task_loss_weight', 'kd_temperature', 'compute_loss_func') if name in options}
    args = dict(
        per_device_train_batch_size=BATCH, max_steps=STEPS, save_steps=STEPS // 2, learning_rate=1e-3, seed=0,
        logging_steps=2, use_cpu=True, report_to=[], disable_tqdm=True)
    args = TrainingArguments(output_dir=str(folder), **{**args, **options})
    bases = (PruningTrainerMixin, Trainer) if mixin else (Trainer,)
    return type('PruningTrainer', bases, {})(
        model, args, train_dataset=labelled(size=image_size), eval_dataset=labelled(BATCH, image_size),
        callbacks=list(callbacks), **own)


def pruning_callback(**options):
    from timm_epfs.integrations import PruningCallback
    return PruningCallback('epfs', **{'macs': 0.6, **options})


def same(state, other):
    assert state.keys() == other.keys()
    return all(torch.equal(v, other[k]) if torch.is_tensor(v) else v == other[k] for k, v in state.items())


def logits(model, x):
    model.eval()
    with torch.inference_mode():
        out = model(x)
    return out if torch.is_tensor(out) else out.logits


def again(folder):
    """What timm loads from a folder."""
    return timm.create_model(f'local-dir:{folder}', pretrained=True)
