"""prototype"""
import zlib
from itertools import islice
import numpy as np
import torch
from torch import nn
from ..core import PruningError, complement, eval_mode
from ..activations.linear_calls import LinearCall
from ..activations.watching import NormCall, Watch
from ..activations.lockstep import Lockstep
from ..activations.least_squares import Sums, solve_ridge

ROWS = 16384


def compensate(slim, dense, images, everything=False, norms=True, weights=True, rows=ROWS, verbose=False):
    plan = slim.pruning_plan
    batches = [part for b in images for part in b.split(max(1, 400_000 // b[0, 0].numel()))]
    with eval_mode(slim), eval_mode(dense):
        Compensation(slim, dense, plan, batches, everything, norms, weights, rows, verbose).run()
    return slim


class Compensation:
    def __init__(self, slim, dense, plan, batches, everything, norms, weights, rows, verbose):
        self.slim, self.dense, self.batches, self.rows, self.verbose = slim, dense, batches, rows, verbose
        self.norms, self.weights = norms, weights
        self.removed = plan.removed()
        self.count = sum(len(b) for b in batches)
        self.places = {}
        self._list(everything)
        self.lock = Lockstep(self._at)
        self.params = dict(slim.named_parameters()) | dict(slim.named_buffers())
        self._reset()
        self.report = {}

    def _list(self, everything):
        order = []
        last = {}
        readers = set()
        for cut in self.slim.pruning_plan.cuts:
            if len(cut.keep) < cut.structure.units:
                readers |= {m.tensor for m in cut.structure.members if m.role == 'in'}
        def handler(name, call, run):
            out = run()
            if isinstance(call, LinearCall):
                order.append((name, 'linear'))
                self.groups_of[name], self.features_of[name] = call.groups, call.matrix(call.weight).shape[1]
                last[id(out)] = (name, out)
            else:
                order.append((name, 'norm'))
                before = last.get(id(call.args['input']))
                if before is not None and before[1] is call.args['input']:
                    self.normed.add(before[0])
            return out
        self.normed = set()
        self.groups_of, self.features_of = {}, {}
        with torch.no_grad(), Watch(self.slim, len(self.batches[0]), handler):
            self.slim(self.batches[0][:1])
        names = [n for n, _ in order]
        for name, kind in order:
            if names.count(name) > 1:
                continue
            if kind == 'linear' and self.weights and (everything or name in readers):
                self.places[name] = kind
            if kind == 'norm' and self.norms:
                self.places[name] = kind

    def _reset(self):
        self.kept_rows = {}
        self.sums = {'fit': Sums(), 'held': Sums()}
        self.moments = {'dense': [], 'slim': []}
        self.call = None

    def run(self):
        n = len(self.batches)
        self.lock.run([self._dense_task] * n + [self._slim_task] * n)

    def _keep(self, name, dim, length):
        gone = self.removed.get(name, {}).get(dim)
        return torch.arange(length) if gone is None else torch.from_numpy(complement(gone, length))

    def _positions(self, name, total, features):
        wanted = max(self.rows, 3 * features)
        per_image = min(total, max(1, -(-wanted // self.count)))
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        edges = np.arange(per_image) * total / per_image
        at = np.floor(edges + rng.random(per_image) * total / per_image).astype(int)
        return torch.from_numpy(np.unique(np.minimum(at, total - 1)))

    def _dense_task(self, i):
        batch = self.batches[i]
        def handler(name, call, run):
            if name not in self.places:
                return run()
            out = run()
            if isinstance(call, LinearCall):
                at = self._positions(name, call.positions(out.shape), self.features_of[name])
                y = call.outputs(out, at)  # groups, images, P, outs
                dim = 1 if call.transposed else 0
                if call.groups == 1 or not call.transposed:
                    keep = self._keep(name, dim, call.weight.shape[dim])
                    if call.groups == 1:
                        y = y[..., keep]
                    else:
                        o = call.weight.shape[0] // call.groups
                        full = y.permute(1, 2, 0, 3).flatten(2)[..., keep]  # images,P,channels
                        g = self.groups_of[name]
                        y = full.unflatten(2, (g, -1)).permute(2, 0, 1, 3)
                self.kept_rows[i] = (at, y)
            else:
                keep = self._keep(name, 0, call.args['running_mean'].shape[0])
                self.moments['dense'].append(_moments(call.args['input'], keep))
            self.lock.meet(i, name)
            return out
        with torch.no_grad(), Watch(self.dense, len(batch), handler):
            self.dense(batch)

    def _slim_task(self, i):
        j = i - len(self.batches)
        batch = self.batches[j]
        start = sum(len(b) for b in self.batches[:j])
        def handler(name, call, run):
            if name not in self.places:
                return run()
            if isinstance(call, LinearCall):
                at, y = self.kept_rows.pop(j)
                x = call.rows(at, call.output_size()).float()
                w = call.matrix(call.weight).float()
                r = y.float() - x @ w[:, None]
                if call.bias is not None:
                    b = call.bias.reshape(call.groups, -1).float()
                    r = r - b[:, None, None]
                held = (torch.arange(len(batch)) + start) % 8 == 7
                for key, which in (('fit', ~held), ('held', held)):
                    if which.any() or x.shape[1] != len(batch):
                        self.sums[key].add(x[:, which].flatten(1, 2), r[:, which].flatten(1, 2))
                self.call = call
                self.lock.meet(i, name)
            else:
                self.moments['slim'].append(_moments(call.args['input'], slice(None)))
                self.call = call
                self.lock.meet(i, name)
            return run()
        with torch.no_grad(), Watch(self.slim, len(batch), handler):
            self.slim(batch)

    def _at(self, name):
        call = self.call
        if isinstance(call, LinearCall):
            has_bias = call.bias is not None
            before = self.sums['held'].rr.sum().item()
            found = solve_ridge(self.sums['fit'], self.sums['held'], centred=has_bias or name in self.normed)
            if found is not None:
                matrix, intercept = found
                call.weight.data += call.weight_of(matrix).to(call.weight)
                if has_bias:
                    call.bias.data += intercept.flatten().to(call.bias)
            if self.verbose:
                print(name, tuple(call.weight.shape), 'rows', self.sums['fit'].count, found is not None)
        else:
            d, s = (_combine(self.moments[k]) for k in ('dense', 'slim'))
            mean, var = call.args['running_mean'], call.args['running_var']
            mean += (s[0] - d[0]).to(mean)
            var *= (s[1] / d[1].clamp_min(1e-12)).to(var)
        self._reset()


def _moments(x, keep):
    dims, count = [0, *range(2, x.ndim)], x.numel() / x.shape[1]
    mean = x.mean(dims)[keep].double()  # var_mean takes six times as long
    square = torch.linalg.vector_norm(x, dim=dims)[keep].double().square() / count
    return count, mean, square - mean.square()


def _combine(parts):
    """Mean and variance of all images, from those of each batch."""
    count = torch.tensor([n for n, _, _ in parts], dtype=torch.float64)
    weight = (count / count.sum())[:, None].to(parts[0][1].device)
    means, variances = (torch.stack([part[i] for part in parts]) for i in (1, 2))
    mean = (weight * means).sum(0)
    return mean, (weight * (variances + (means - mean).square())).sum(0).clamp_min(1e-12)
