"""What timm's train.py does with its arguments, in short: nothing here knows of timm_epfs.

    python tests/timm_script.py DIR MODEL [MODEL]

train.py isn't part of timm's package, so these are its steps: the model by name, with the pretrained weights and the
classes of the data; data as the model asks for; a task, an optimizer, a checkpoint, and resuming from it.
"""
import copy
import json
import sys

import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import create_model, resolve_model_input_args
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, resume_task_checkpoint
from timm.utils import CheckpointSaver


def train(folder, name):
    args = {'num_classes': 2, 'drop_rate': 0.0, 'drop_path_rate': None, 'global_pool': None, 'scriptable': False}
    model = create_model(**resolve_model_input_args(name, {}, **args), pretrained=True)
    config = resolve_data_config({}, model=model)
    dataset = create_dataset('', root=f'{folder}/data', split='train', is_training=True)
    loader = create_loader(
        dataset, input_size=config['input_size'], batch_size=4, is_training=True, num_workers=0, use_prefetcher=False,
        mean=config['mean'], std=config['std'], device=torch.device('cpu'))
    task = ClassificationTask(model.train(), criterion_kwargs={'smoothing': 0.1}, verbose=False)
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt='sgd', lr=0.01)
    before = copy.deepcopy(model.state_dict())
    for images, target in loader:
        task(images, target)['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=folder, recovery_dir=folder, task=task)
    saver.save_checkpoint(epoch=0)
    return {
        'classes': model.num_classes,
        'parameters': sum(p.numel() for p in model.parameters()),
        'moved': any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()),
        'resumed': resume_task_checkpoint(task, f'{folder}/last.pth.tar', optimizer, log_info=False),
    }


if __name__ == '__main__':
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        print(json.dumps(train(sys.argv[1], name)))
