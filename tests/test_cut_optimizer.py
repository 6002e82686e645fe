"""An optimizer goes on with a cut model as it would have gone on with the masked one."""
import copy
from functools import cache

import timm
import torch
from helpers import randomise
from pytest import approx, mark, raises
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import timm_epfs
from timm_epfs import PruningError
from timm_epfs.surgery import Masks, cut_copy, is_maskable

IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def small():
    torch.manual_seed(0)
    return randomise(timm.create_model('test_resnet', num_classes=5)).double().eval()


def step(model, optimizer, seed):
    """One step on images of its own. BatchNorm is frozen: in evaluation mode."""
    torch.manual_seed(seed)
    optimizer.zero_grad()
    model(IMAGES + torch.randn(1, 3, 1, 1)).square().mean().backward()
    optimizer.step()


def prune(model, macs, **options):
    return timm_epfs.prune(model, macs=macs, example_input=IMAGES[:1], **options).eval()


@cache
def plan(macs):
    return prune(small(), macs).pruning_plan


def cut(model, macs=0.5):
    """What is left of any small model, without a trace of its own."""
    slim = cut_copy(model, plan(macs))
    slim.pruning_plan = plan(macs)
    return slim


def unmasked(tensors):
    """Tensors of a masked model by the names that they have without masks."""
    return {name.replace('parametrizations.', '').removesuffix('.original'): tensor for name, tensor in tensors}


def mask(model, slim):
    """Put masks on a dense model that are zero for what the plan of a cut model removes."""
    cuts = [c for c in slim.pruning_plan.cuts if is_maskable(c.structure)]
    masks = Masks(model, [c.structure for c in cuts], learn=False)
    stays = torch.cat([torch.isin(torch.arange(c.structure.units), torch.from_numpy(c.keep)) for c in cuts])
    masks.set(stays, stays)
    return masks


TREATING_ENTRIES_ALONE = {
    'SGD': lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-2),
    'AdamW': lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True, weight_decay=0.1),
    'Lion': lambda p: create_optimizer_v2(p, 'lion', lr=0.001),
}


@mark.parametrize('kind', TREATING_ENTRIES_ALONE)
def test_training_goes_on_as_that_of_the_masked_model_does(kind):
    """In two cuts, and under a schedule that is made once."""
    dense = small()
    optimizer = TREATING_ENTRIES_ALONE[kind](list(dense.parameters()))
    for seed in range(2):
        step(dense, optimizer, seed)

    model, going_on = copy.deepcopy((dense, optimizer))
    scheduler = torch.optim.lr_scheduler.StepLR(going_on, 1, 0.5)
    masked_scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for first, macs in ((2, 0.7), (4, 0.7)):
        slim = prune(model, macs)
        timm_epfs.cut_optimizer(going_on, model, slim)
        model = slim
        masks = mask(dense, slim)
        for seed in range(first, first + 2):
            step(dense, optimizer, seed)
            step(model, going_on, seed)
            scheduler.step(), masked_scheduler.step()
            want = timm_epfs.slice_checkpoint(unmasked(dense.state_dict().items()), slim.pruning_plan)
            for name, tensor in model.state_dict().items():
                torch.testing.assert_close(tensor, want[name], rtol=1e-7, atol=1e-9)
        masks.remove()
    dense_macs, left = model.pruning_plan.cost['macs']
    assert left / dense_macs == approx(0.49, abs=0.02)
    assert going_on.param_groups[0]['lr'] == optimizer.param_groups[0]['lr']


def test_steps_after_a_cut_are_those_of_the_formula():
    """Where the gradient is constant, momentum after n steps is g·(1 − μⁿ)/(1 − μ), whatever was cut in between."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    first, gradient = model[0].weight.detach().clone(), torch.randn(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def steps(model, gradient, n):
        for _ in range(n):
            optimizer.zero_grad()
            (model[0].weight * gradient).sum().backward()
            optimizer.step()

    steps(model, gradient, 4)
    slim = timm_epfs.prune(model, params=0.52, example_input=torch.empty(1, 3), round_to=1)
    timm_epfs.cut_optimizer(optimizer, model, slim)
    keep = torch.from_numpy(next(c.keep for c in slim.pruning_plan.cuts if c.structure.name == '0'))
    assert 0 < len(keep) < 8
    steps(slim, gradient[keep], 5)
    moved = 0.1 * sum((1 - 0.9 ** n) / (1 - 0.9) for n in range(1, 10))
    torch.testing.assert_close(slim[0].weight, first[keep] - moved * gradient[keep])


def test_groups_keep_their_options_and_what_is_not_the_models():
    dense = small()
    other = nn.Parameter(torch.ones(3).double())
    decayed = [(name, p) for name, p in dense.named_parameters() if p.ndim > 1]
    plain = [(name, p) for name, p in dense.named_parameters() if p.ndim < 2 and not name.startswith('stem')]
    optimizer = torch.optim.AdamW([
        {'params': decayed, 'weight_decay': 0.3}, {'params': plain, 'weight_decay': 0, 'lr': 0.5},
        {'params': [('temperature', other)]}])
    (dense(IMAGES).mean() * other.sum()).backward()
    optimizer.step()
    groups = list(optimizer.param_groups)
    slim = prune(dense, 0.5, kinds=['channels', 'blocks'])
    assert slim.pruning_plan.removed_blocks()
    timm_epfs.cut_optimizer(optimizer, dense, slim)
    assert all(a is b for a, b in zip(groups, optimizer.param_groups)) and len(groups) == 3
    assert [group['weight_decay'] for group in groups] == [0.3, 0, 0.01] and groups[1]['lr'] == 0.5
    named = dict(slim.named_parameters())
    for group, was in zip(groups, (decayed, plain)):
        stays = [name for name, _ in was if name in named]
        assert group['param_names'] == stays
        assert all(p is named[name] for p, name in zip(group['params'], stays, strict=True))
    assert groups[2]['params'] == [other] and optimizer.state[other]['exp_avg'].shape == other.shape
    assert set(optimizer.state) == {p for group in groups for p in group['params']}
    step(slim, optimizer, 0)


def test_masks_do_not_hide_a_learners_parameters():
    model = small().train()
    learner = timm_epfs.OneShot(model, macs=0.5, steps=1, example_input=IMAGES[:1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    (model(IMAGES).mean() + learner.penalty()).backward()
    optimizer.step()
    learner.step()
    moments = {
        name: optimizer.state[p]['momentum_buffer'] for name, p in unmasked(model.named_parameters()).items()}
    slim = learner.export()
    timm_epfs.cut_optimizer(optimizer, model, slim)
    assert all(p is q for p, q in zip(optimizer.param_groups[0]['params'], slim.parameters(), strict=True))
    want = timm_epfs.slice_checkpoint({**small().state_dict(), **moments}, slim.pruning_plan)
    for name, parameter in slim.named_parameters():
        assert torch.equal(optimizer.state[parameter]['momentum_buffer'], want[name])


def test_tied_and_parametrised_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.inp, self.a = nn.Linear(4, 8), weight_norm(nn.Linear(8, 8))
            self.b, self.out = nn.Linear(8, 8), nn.Linear(8, 4)
            self.out.weight = nn.Parameter(self.out.weight.detach())
            self.b.bias = self.inp.bias

        def forward(self, x):
            return self.out(self.b(self.a(self.inp(x).relu()).relu()).relu())

    torch.manual_seed(0)
    model, x = Tied(), torch.randn(5, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model(x).square().mean().backward()
    optimizer.step()
    slim = timm_epfs.prune(model, params=0.6, example_input=x[:1], round_to=1)
    timm_epfs.cut_optimizer(optimizer, model, slim)
    assert all(p is q for p, q in zip(optimizer.param_groups[0]['params'], slim.parameters(), strict=True))
    assert all(entry['exp_avg'].shape == p.shape for p, entry in optimizer.state.items())
    slim(x).square().mean().backward()
    optimizer.step()


@mark.parametrize('name', [
    'lamb', 'adafactor', 'adafactorbv', 'muon', 'adan', 'mars', 'laprop', 'novograd', 'madgrad', 'adopt', 'rmsproptf',
    'adabelief', 'lars', 'lookahead_adam',
])
def test_optimizers_of_timm_go_on(name):
    dense = small().float()
    optimizer = create_optimizer_v2(dense, name, lr=0.01, weight_decay=0.1)
    slim, images = cut(dense), IMAGES.float()
    for model in (dense, slim):
        if model is slim:
            timm_epfs.cut_optimizer(optimizer, dense, slim)
        for _ in range(2):
            optimizer.zero_grad()
            model(images).square().mean().backward()
            optimizer.step()
    assert {p for group in optimizer.param_groups for p in group['params']} == set(slim.parameters())
    assert all(p.isfinite().all() for p in slim.parameters())


FACTORED = {
    'adafactor': ('exp_avg_sq_row', 'exp_avg_sq_col'), 'adafactorbv': ('exp_avg_sq_r', 'exp_avg_sq_c'),
    'torch': ('row_var', 'col_var'),
}


@mark.parametrize('inner', [20, 40, 12])
@mark.parametrize('kind', FACTORED)
def test_factored_moments_stand_for_the_same_second_moments(kind, inner):
    """Where squares of gradients have rank one, the factors give them exactly: g² before and after a cut.

    Where no more than 16 are left, timm's Adafactor keeps the moments themselves.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48, bias=False), nn.ReLU(), nn.Linear(48, 30, bias=False))
    optimizer = (
        torch.optim.Adafactor(model.parameters()) if kind == 'torch' else
        create_optimizer_v2(model.parameters(), kind, lr=0.01, min_dim_size_to_factor=16))
    squares = []
    for layer in (model[0], model[2]):
        layer.weight.grad = torch.rand(layer.out_features, 1) * torch.rand(layer.in_features)
        squares.append(layer.weight.grad.square())
    optimizer.step()
    slim = timm_epfs.prune(model, macs=inner / 48, example_input=torch.empty(1, 32), round_to=1)
    keep = torch.from_numpy(next(c.keep for c in slim.pruning_plan.cuts if c.structure.name == '0'))
    assert len(keep) == inner
    timm_epfs.cut_optimizer(optimizer, model, slim)
    for weight, square in zip(slim.parameters(), (squares[0][keep], squares[1][:, keep])):
        entry = optimizer.state[weight]
        if FACTORED[kind][0] in entry:
            rows, cols = (entry[name] for name in FACTORED[kind])
            if kind == 'adafactor':
                rows, cols = rows[:, None], cols[None]
            found = rows * cols / rows.mean()
        else:
            found = entry['exp_avg_sq']
        torch.testing.assert_close(found, square.reshape(found.shape), rtol=1e-3, atol=1e-6)
        weight.grad = torch.ones_like(weight)
    optimizer.step()


def trained(make):
    model = small()
    optimizer = make(model)
    optimizer.zero_grad()
    model(IMAGES).square().mean().backward()
    optimizer.step(lambda: model(IMAGES).square().mean())
    return model, optimizer


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def test_what_can_not_go_on_says_why_and_changes_nothing():
    model, optimizer = trained(sgd)
    slim = cut(model)
    other_head = copy.deepcopy(slim)
    other_head.reset_classifier(3)
    learner = timm_epfs.EPFS(small(), macs=0.5, steps=5, example_input=IMAGES[:1], center=0)
    kron_model, kron = trained(sgd)  # what timm's Kron keeps; its steps are compiled, which takes long
    kron.state[kron_model.fc.weight]['Q'] = [torch.eye(5), torch.eye(3)]
    lbfgs_model, lbfgs = trained(lambda model: torch.optim.LBFGS(model.parameters()))
    flat_model, flat = trained(sgd)
    flat.state[flat_model.fc.bias]['momentum_buffer'] = torch.zeros(99)
    for arguments, said in [
        ((learner.solver, model, slim), 'the optimizer is of type Fista; give a torch.optim.Optimizer'),
        ((sgd(small()), model, slim), "holds none of the model's parameters"),
        ((optimizer, slim, model), "holds none of the model's parameters"),
        ((optimizer, model, small()), 'the plan is of type NoneType'),
        ((optimizer, model, other_head), r'fc.weight of the cut model has shape \(3, .*\) where \(5, .*\) was'),
        ((kron, kron_model, cut(kron_model)), r"keeps 'Q' of fc.weight with shape \(5, 5\) where .* can't be cut"),
        ((lbfgs, lbfgs_model, cut(lbfgs_model)), "the optimizer keeps '.*' of .* can't be cut"),
        ((flat, flat_model, cut(flat_model)), r"keeps 'momentum_buffer' of fc.bias with shape \(99,\)"),
    ]:
        groups = getattr(arguments[0], 'param_groups', [])
        before = [list(group['params']) for group in groups]
        with raises(PruningError, match=said) as error:
            timm_epfs.cut_optimizer(*arguments)
        assert '\n' not in str(error.value)
        assert all(p is q for a, b in zip(before, groups) for p, q in zip(a, b['params'], strict=True))
