"""Lightning's Trainer learns, cuts and goes on, and resumes from any checkpoint."""
import sys
import warnings

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from pytest import approx, fixture, mark, raises
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import timm_epfs
from timm_epfs import PruningError, integrations
from timm_epfs.integrations import LightningPruningCallback

EXAMPLE = torch.empty(1, 3, 8, 8)
BATCHES = [(torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(i)), torch.arange(6) % 3) for i in range(4)]


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))


class Module(L.LightningModule):
    def __init__(self, opt=torch.optim.SGD, manual=False):
        super().__init__()
        self.model, self.opt, self.automatic_optimization = net(), opt, not manual

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        self.log('loss', loss)
        if not self.automatic_optimization:
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
        return loss

    def validation_step(self, batch, batch_idx):
        self.log('val_loss', F.cross_entropy(self.model(batch[0]), batch[1]))

    def configure_optimizers(self):
        options = {'momentum': 0.9} if self.opt is torch.optim.SGD else {}
        optimizer = self.opt(self.model.parameters(), lr=0.05, **options)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]


@fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


def loader(n=4):
    images, targets = (torch.cat(part) for part in zip(*BATCHES[:n]))
    return DataLoader(TensorDataset(images, targets), batch_size=6)


def pruning(method='epfs', **options):
    return LightningPruningCallback(
        method, **{'sparse_epochs': 2, 'macs': 0.5, 'example_input': EXAMPLE, 'round_to': 1, **options})


def fit(module, callbacks, epochs=3, ckpt_path=None, **options):
    trainer = L.Trainer(
        max_epochs=epochs, accelerator='cpu', logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=callbacks, **{'enable_checkpointing': False, 'num_sanity_val_steps': 0, **options})
    trainer.fit(module, loader(), loader(1), ckpt_path=ckpt_path, **({'weights_only': True} if ckpt_path else {}))
    return trainer


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def by_hand(epochs, accumulate=1, scaler=None):
    """A plain loop with the same calls, as docs/training_loop.md has them."""
    model = net().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)
    scaler = scaler or torch.amp.GradScaler('cpu', enabled=False)
    learner = timm_epfs.EPFS(
        model, macs=0.5, steps=2 * 4 // accumulate, example_input=EXAMPLE, round_to=1)
    for epoch in range(epochs):
        if epoch == 2:
            slim = learner.export()
            timm_epfs.cut_optimizer(optimizer, model, slim)
            model, learner = slim, None
        for i, (x, y) in enumerate(BATCHES):
            with torch.autocast('cpu', dtype=torch.float16, enabled=scaler.is_enabled()):
                loss = F.cross_entropy(model(x), y)
            if learner:
                loss = loss + learner.penalty(y)
            scaler.scale(loss / accumulate).backward()
            if (i + 1) % accumulate == 0:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                if learner:
                    learner.step()
        scheduler.step()
    return model


@mark.parametrize('how', ['plain', 'accumulated', 'scaled', 'manual'])
def test_it_trains_as_a_plain_loop_with_the_same_calls(how):
    module, options, scaler = Module(manual=how == 'manual'), {}, None
    if how == 'accumulated':
        options = {'accumulate_grad_batches': 2}
    if how == 'scaled':
        scaler, theirs = (torch.amp.GradScaler('cpu', init_scale=2. ** 7) for _ in range(2))
        options = {'plugins': [MixedPrecision('16-mixed', 'cpu', theirs)]}
    callback = pruning()
    fit(module, [callback], **options)
    want = by_hand(3, options.get('accumulate_grad_batches', 1), scaler)
    if how == 'manual':  # there, schedulers are the user's
        assert module.model.state_dict().keys() == want.state_dict().keys()
    else:
        for name, tensor in want.state_dict().items():
            torch.testing.assert_close(module.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    dense, left = module.model.pruning_plan.cost['macs']
    assert left / dense == approx(0.5, abs=0.05) and callback.learner is None


@mark.parametrize('opt', [torch.optim.SGD, torch.optim.AdamW])
def test_a_fit_resumed_from_any_checkpoint_ends_the_same(tmp_path, opt):
    every = ModelCheckpoint(tmp_path, '{step}', every_n_train_steps=5, save_top_k=-1)
    ends = ModelCheckpoint(tmp_path, '{epoch}-end', save_top_k=-1, save_on_train_epoch_end=True)
    whole = Module(opt)
    fit(whole, [pruning(), every, ends], epochs=4, enable_checkpointing=True)
    paths = sorted(tmp_path.glob('*.ckpt'))
    assert len(paths) == 3 + 4
    for path in paths:
        resumed = Module(opt)
        fit(resumed, [pruning()], epochs=4, ckpt_path=path)
        # In the middle of an epoch, Lightning goes on with the first batches of a loader that has no state.
        assert equal(resumed, whole) or path.name.startswith('step')
        assert resumed.model.pruning_plan.cost == whole.model.pruning_plan.cost

    fresh, evaluate = Module(opt), L.Trainer(
        accelerator='cpu', logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[pruning()])
    last = evaluate.validate(fresh, loader(1), ckpt_path=tmp_path / 'epoch=3-end.ckpt', verbose=False)
    assert last[0]['val_loss'] == float(whole.trainer.callback_metrics['val_loss']) and equal(fresh, whole)


def test_cut_at_the_end_and_trained_on(tmp_path):
    """One epoch less, and the cut is made when training ends; another fit goes on with the small model."""
    module, callback = Module(), pruning()
    trainer = fit(module, [callback], epochs=2)
    slim = module.model
    assert 'pruning/alive' in trainer.callback_metrics and slim.pruning_plan and callback.learner is None
    assert all(p is q for p, q in zip(trainer.optimizers[0].param_groups[0]['params'], slim.parameters(), strict=True))
    timm_epfs.save_pretrained(slim, tmp_path / 'slim', as_module=True)
    before = slim[0].weight.clone()
    fit(module, [callback], epochs=1)
    assert module.model is slim and not torch.equal(slim[0].weight, before)


def test_any_method_and_any_batch():
    class OnDicts(Module):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch['image'], batch['label']), batch_idx)

    data = [{'image': x[0], 'label': y[0]} for x, y in BATCHES] * 3
    seen = []
    for method in ('sfp', timm_epfs.OneShot):
        module = OnDicts()
        callback = pruning(method, sparse_epochs=1, steps=2)
        trainer = L.Trainer(max_epochs=2, accelerator='cpu', logger=False, enable_progress_bar=False,
                            enable_model_summary=False, enable_checkpointing=False, callbacks=[callback])
        trainer.fit(module, DataLoader(data, batch_size=6))
        seen.append(module.model.pruning_plan.recipe['method'])
    assert seen == ['sfp', 'one-shot']


def test_errors_are_one_line(tmp_path):
    class Elsewhere(Module):
        def __init__(self):
            super().__init__()
            self.network = self.model
            del self.model

    keep = ModelCheckpoint(tmp_path, '{epoch}', save_top_k=-1)
    spawning = L.Trainer(accelerator='cpu', devices=2, strategy='ddp_spawn', logger=False, enable_progress_bar=False)
    module, callback = Module(), pruning()
    fit(module, [callback, keep], epochs=3, enable_checkpointing=True)
    for make, said in [
        (lambda: pruning('epf'), "method='epf' is unknown; give one of epfs"),
        (lambda: pruning(sparse_epochs=0), 'sparse_epochs=0 was given; give a positive integer'),
        (lambda: pruning().setup(spawning, Module(), 'fit'), "DDPStrategy in spawned .* train with strategy='ddp'"),
        (lambda: fit(Module(), [pruning(sparse_epochs=4)]), 'sparse_epochs=4 was given, and training ends after 3'),
        (lambda: fit(Module(), [pruning(), EMAWeightAveraging()]), 'EMAWeightAveraging averages weights that change'),
        (lambda: fit(Elsewhere(), [pruning()]), 'Elsewhere.model is of type NoneType; give attribute='),
        (lambda: fit(module, [callback], ckpt_path=tmp_path / 'epoch=0.ckpt'), 'saved before the model was cut'),
    ]:
        with raises(PruningError, match=said) as error:
            make()
        assert '\n' not in str(error.value)


def test_without_lightning_an_error_says_what_to_install(monkeypatch):
    monkeypatch.delattr(integrations, 'LightningPruningCallback')
    monkeypatch.delitem(sys.modules, 'timm_epfs.integrations.lightning_callback')
    monkeypatch.setitem(sys.modules, 'lightning.pytorch', None)
    with raises(PruningError, match=r"needs lightning.pytorch, .* pip install 'timm-epfs\[lightning\]'"):
        integrations.LightningPruningCallback  # noqa: B018, looked up on first use
