"""Sharing pruned models on the Hugging Face Hub.

In: a pruned model and its measurements. Out: a model card; one commit with config, weights, card and picture.
"""
from .cards import CARD, FIGURE, check_metrics, is_ours, make_card, stamp, write_card
from .push import DryRun, Pushed, push_to_hub

__all__ = [
    'CARD', 'DryRun', 'FIGURE', 'Pushed', 'check_metrics', 'is_ours', 'make_card', 'push_to_hub', 'stamp', 'write_card',
]
