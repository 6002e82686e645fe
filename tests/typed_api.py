"""What users write, for the type checker alone: ``mypy`` reads it (pyproject.toml), nothing runs it.

Every public name is used as the docs use it, and what it gives back is of the type that an editor should show.
"""
from pathlib import Path
from typing import Any, Dict, List, Tuple

import timm
import torch
from torch import nn
from typing_extensions import assert_type

import timm_epfs
from timm_epfs.importance import Criterion
from timm_epfs.pruner import Report

images = torch.empty(1, 3, 224, 224)
model: nn.Module = timm.create_model('resnet18')
batches: List[Tuple[torch.Tensor, torch.Tensor]] = []

slim = timm_epfs.prune('resnet18', macs=0.5, exclude=['layer1'], num_classes=10)
assert_type(slim, timm_epfs.PrunedModel)
assert_type(slim.pruning_plan, timm_epfs.Plan)
assert_type(slim.pruning_plan.cost, Dict[str, Tuple[float, float]])
assert_type(slim.pruning_plan.to_json(), str)
slim(images)

pruner = timm_epfs.Pruner(model, data=batches, kinds=['filters'], example_input=images)
assert_type(pruner(macs=0.5), timm_epfs.PrunedModel)
assert_type(pruner(timm_epfs.Budget(latency='12ms')), timm_epfs.PrunedModel)
assert_type(pruner.plan(params=0.4, criterion='taylor').attributes, Dict[str, int])
assert_type(pruner.inspect(), Report)
assert_type(timm_epfs.inspect('vit_tiny_patch16_224').macs_share, float)

learner = timm_epfs.EPFS(pruner, macs=0.5, steps=100, widths='cost')
loss = model(images).sum() + learner.penalty(torch.zeros(1, dtype=torch.long))
loss.backward()
learner.step()
assert_type(learner.alive, float)
assert_type(learner.log(), Dict[str, float])
assert_type(learner.state_dict(), Dict[str, Any])
assert_type(learner.export(), timm_epfs.PrunedModel)
for method in (timm_epfs.SSS, timm_epfs.SFP, timm_epfs.BNSFP, timm_epfs.OneShot, timm_epfs.Scratch):
    assert_type(method(model, 0.5, 100).export().pruning_plan, timm_epfs.Plan)

assert_type(timm_epfs.rebuild(slim.pruning_plan).pruning_plan, timm_epfs.Plan)
assert_type(timm_epfs.slice_checkpoint(model.state_dict(), slim.pruning_plan), Dict[str, Any])
optimizer = torch.optim.AdamW(model.parameters())
moments = timm_epfs.slice_checkpoint(optimizer.state_dict(), slim.pruning_plan, dict(model.named_parameters()))
torch.optim.AdamW(slim.parameters()).load_state_dict(moments)
timm_epfs.cut_optimizer(optimizer, model, slim)
assert_type(timm_epfs.save_pretrained(slim, 'folder'), Path)
assert_type(timm_epfs.save_pretrained(slim, 'module', overwrite=True, as_module=True), Path)
assert_type(timm_epfs.load_pretrained(model, 'module').pruning_plan, timm_epfs.Plan)
assert_type(timm_epfs.push_to_hub(slim, 'me/half', dry_run=True).files, Tuple[str, ...])
assert_type(timm_epfs.CRITERIA['l2'], Criterion)
timm_epfs.recalibrate_bn(slim, batches)
timm_epfs.recalibrate_bn(slim, batches, dense=model)
timm_epfs.compensate(slim, model, batches)
timm_epfs.register('half', slim.pruning_plan, weights='folder')
timm_epfs.plot(slim).savefig('layers.png')
assert_type(timm_epfs.html_report('page.html', pruner, [slim], data=batches, sensitivity=pruner.sensitivity()), Path)
try:
    timm_epfs.Plan.load('plan.json')
except timm_epfs.PruningError as error:
    print(error, timm_epfs.__version__)

# What is wrong is seen: each line has an error, and mypy says so where one has none any more.
timm_epfs.prune('resnet18', macs='half')  # type: ignore[arg-type]
print(slim.pruning_plan.keep)  # type: ignore[attr-defined]
timm_epfs.Budget(flops=0.5)  # type: ignore[call-arg]
