"""One model for each of timm's modules, traced and cut to half of its MACs on the meta device."""
import pytest
import timm
import torch
from timm.models import model_entrypoint
from torch.utils._pytree import tree_leaves

import timm_epfs
from timm_epfs.report import count_macs
from timm_epfs.surgery import build_base

# The model of the fewest MACs in each module of timm 1.0.31, and arguments that make it shallower where it is slow.
SAMPLE = {
    'beit': ('beit_base_patch16_224', {'depth': 4}),
    'byoanet': ('haloregnetz_b', {}),
    'byobnet': ('test_byobnet', {}),
    'cait': ('cait_xxs24_224', {'depth': 4}),
    'coat': ('coat_lite_tiny', {}),
    'convit': ('convit_tiny', {}),
    'convmixer': ('convmixer_768_32', {}),
    'convnext': ('test_convnext', {}),
    'cpubone': ('cpubone_nano', {}),
    'crossvit': ('crossvit_tiny_240', {'depth': ((1, 2, 0),) * 3}),
    'csatv2': ('csatv2', {'depths': (2, 2, 2, 2)}),
    'cspnet': ('cs3darknet_focus_s', {}),
    'cspnext': ('cspnext_tiny', {}),
    'davit': ('davit_tiny', {}),
    'deepseek_vit': ('deepseek_vit_412m', {'depth': 4}),
    'deit': ('deit_tiny_patch16_224', {}),
    'densenet': ('densenet121', {'block_config': (2, 2, 2, 2)}),
    'dla': ('dla46x_c', {}),
    'dpn': ('dpn48b', {}),
    'edgenext': ('edgenext_xx_small', {}),
    'efficientformer': ('efficientformer_l1', {'depths': (1, 1, 2, 1)}),
    'efficientformer_v2': ('efficientformerv2_s0', {'depths': (1, 1, 2, 1)}),
    'efficientnet': ('test_efficientnet', {}),
    'efficientvim': ('efficientvim_m1', {}),
    'efficientvit_mit': ('efficientvit_b0', {}),
    'efficientvit_msra': ('efficientvit_m0', {}),
    'eva': ('eva02_tiny_patch14_224', {}),
    'fasternet': ('fasternet_t0', {}),
    'fastvit': ('fastvit_t8', {}),
    'focalnet': ('focalnet_tiny_srf', {}),
    'gcvit': ('gcvit_xxtiny', {}),
    'gemma4_vit': ('gemma4_vit_167m', {'depth': 4}),
    'ghostnet': ('ghostnet_050', {}),
    'hardcorenas': ('hardcorenas_b', {}),
    'hgnet': ('hgnetv2_b0', {}),
    'hiera': ('hiera_tiny_224', {}),
    'hieradet_sam2': ('hieradet_small', {'stages': (1, 1, 2, 1)}),
    'hrnet': ('hrnet_w18_small', {}),
    'iformer': ('iformer_t', {}),
    'inception_next': ('inception_next_atto', {}),
    'inception_resnet_v2': ('inception_resnet_v2', {}),
    'inception_v3': ('inception_v3', {}),
    'inception_v4': ('inception_v4', {}),
    'lcnetv2': ('lcnetv2_small', {}),
    'levit': ('levit_128s', {}),
    'lowformer': ('lowformer_b0', {}),
    'mambaout': ('test_mambaout', {}),
    'maxxvit': ('test_coatnet', {}),
    'metaformer': ('poolformer_s12', {}),
    'mlp_mixer': ('gmlp_ti16_224', {}),
    'mobilenetv3': ('mobilenetv3_small_050', {}),
    'mobilenetv5': ('mobilenetv5_base', {}),
    'mobilevit': ('mobilevit_xxs', {}),
    'mvitv2': ('mvitv2_tiny', {}),
    'naflexvit': ('naflexvit_base_patch16_parfac_gap', {}),
    'nasnet': ('nasnetalarge', {}),
    'nest': ('nest_tiny', {}),
    'nextvit': ('nextvit_small', {}),
    'nfnet': ('test_nfnet', {}),
    'pit': ('pit_ti_224', {'depth': (1, 2, 1)}),
    'pnasnet': ('pnasnet5large', {}),
    'pvt_v2': ('pvt_v2_b0', {}),
    'qwen3_vit': ('qwen3_vit_88m', {}),
    'rdnet': ('rdnet_tiny', {}),
    'regnet': ('regnetx_002', {}),
    'repghost': ('repghostnet_050', {}),
    'repvit': ('repvit_m1', {'depth': (1, 1, 2, 1)}),
    'res2net': ('res2next50', {}),
    'resnest': ('resnest14d', {}),
    'resnet': ('test_resnet', {}),
    'resnetv2': ('resnetv2_18', {}),
    'rexnet': ('rexnet_100', {}),
    'selecsls': ('selecsls42', {}),
    'senet': ('legacy_seresnet18', {}),
    'sequencer': ('sequencer2d_s', {'layers': (1, 1, 1, 1), 'img_size': 64}),
    'shvit': ('shvit_s1', {'depth': (1, 1, 2, 1)}),
    'sknet': ('skresnet18', {}),
    'starnet': ('starnet_s050', {}),
    'swiftformer': ('swiftformer_xs', {'layers': (1, 1, 2, 1)}),
    'swin_transformer': ('swin_tiny_patch4_window7_224', {'depths': (1, 1, 2, 1)}),
    'swin_transformer_v2': ('swinv2_tiny_window8_256', {'depths': (1, 1, 2, 1)}),
    'swin_transformer_v2_cr': ('swinv2_cr_tiny_224', {'depths': (1, 1, 2, 1)}),
    'tiny_vit': ('tiny_vit_5m_224', {}),
    'tnt': ('tnt_s_legacy_patch16_224', {'depth': 4}),
    'tresnet': ('tresnet_m', {'layers': (1, 1, 2, 1)}),
    'twins': ('twins_svt_small', {'depths': (1, 1, 2, 1)}),
    'vgg': ('vgg11', {}),
    'visformer': ('visformer_tiny', {}),
    'vision_transformer': ('test_vit', {}),
    'vision_transformer_hybrid': ('vit_tiny_r_s16_p8_224', {}),
    'vision_transformer_relpos': ('test_vit_relpos', {}),
    'vision_transformer_sam': ('samvit_base_patch16_224', {'depth': 4}),
    'vitamin': ('vitamin_small_224', {}),
    'volo': ('volo_d1_224', {}),
    'vovnet': ('ese_vovnet19b_slim_dw', {}),
    'xception': ('legacy_xception', {}),
    'xception_aligned': ('xception41', {}),
    'xcit': ('xcit_nano_12_p8_224', {'depth': 4}),
}


def test_there_is_one_model_for_each_module():
    """Of any version of timm: a module that a new one adds needs its model here."""
    modules = {name: model_entrypoint(name).__module__ for name in timm.list_models()}
    assert {module: modules[name] for module, (name, _) in SAMPLE.items()} == {
        module.removeprefix('timm.models.'): module for module in modules.values() if module.startswith('timm.')}


def shapes_and_macs(model, args, kwargs):
    outs = []
    with model.register_forward_hook(lambda module, given, out: outs.append(out)):
        macs = count_macs(model, args, kwargs)
    return [tuple(x.shape) for x in tree_leaves(outs) if isinstance(x, torch.Tensor)], macs


@pytest.mark.filterwarnings('ignore:to meet the budget, residual streams')
@pytest.mark.parametrize('module', SAMPLE)
def test_half_of_the_macs_are_cut(module):
    name, model_args = SAMPLE[module]
    model = build_base(name, model_args, device='meta').eval()
    pruner = timm_epfs.Pruner(model)
    slim = pruner(macs=0.5, criterion='random')

    args, kwargs = pruner.example
    (dense_shapes, dense), (slim_shapes, left) = (shapes_and_macs(each, args, kwargs) for each in (model, slim))
    assert slim_shapes == dense_shapes
    assert left / dense == pytest.approx(0.5, abs=0.01)
    assert slim.pruning_plan.cost['macs'] == pytest.approx((dense, left), rel=0.005)

    cost, structures = pruner.trace.cost, pruner.trace.structures
    units = {s.name: s.units for s in structures}
    cuttable = [s.name for s in structures if s.kind != 'blocks']
    assert cost.share('macs', cuttable, cost.counts(units)) >= 0.5
