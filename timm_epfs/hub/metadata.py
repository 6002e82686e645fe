"""The metadata of a model card: what the Hub reads of it, as its specification asks for.

The specification: https://github.com/huggingface/hub-docs/blob/main/modelcard.md
"""
import re
from typing import Any, Dict, Mapping, Optional

from huggingface_hub import EvalResult, ModelCardData, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

__all__ = ['card_metadata', 'is_repo_id']

TAGS = ['timm', 'timm_epfs', 'pruning', 'image-classification']

# Licenses of timm's weights that the Hub knows. It takes any other license as "other", with its name.
_HUB_LICENSES = (
    'apache-2.0', 'apple-amlr', 'apple-ascl', 'bsd-3-clause', 'cc-by-4.0', 'cc-by-nc-4.0', 'gemma', 'mit', 'unknown',
)


def card_metadata(
        repo_id: str,
        license_name: Optional[str],
        origin: Optional[str],
        metrics: Mapping[str, Any],
        widget_image: Optional[str] = None,
) -> ModelCardData:
    """The metadata of a card.

    Args:
        repo_id: The repo of the model.
        license_name: License of its base's weights. None: it isn't known.
        origin: The repo on the Hub that the base's weights came from, if they came from one.
        metrics: Checked measurements.
        widget_image: File name of an image in the repo, for the widget of the model's page.
    """
    license_is_known = license_name in (None, *_HUB_LICENSES)
    return ModelCardData(
        **_results(repo_id.rpartition('/')[2], metrics),
        library_name='timm',
        pipeline_tag='image-classification',
        license=license_name if license_is_known else 'other',
        license_name=None if license_is_known else license_name,
        # The page of the base shows its license.
        license_link=None if license_is_known or origin is None else f'{constants.ENDPOINT}/{origin}',
        base_model=origin,  # without base_model_relation: none of its values (adapter, finetune, …) means pruned
        tags=TAGS,
        widget=None if widget_image is None else [
            {'src': f'{constants.ENDPOINT}/{repo_id}/resolve/main/{widget_image}', 'example_title': 'Example'}],
    )


def _results(name: str, metrics: Mapping[str, Any]) -> Dict[str, Any]:
    """The datasets, and the top-1 that was measured on them."""
    dataset, top1 = metrics.get('dataset', ''), metrics.get('pruned', {}).get('top1')
    dataset_id = metrics.get('dataset_id', dataset if is_repo_id(dataset) else None)
    datasets = None if dataset_id is None else [dataset_id]
    if top1 is None:
        return {'datasets': datasets}
    result = EvalResult(
        task_type='image-classification',
        dataset_type=re.sub(r'[^a-z0-9/]+', '-', dataset.lower()).strip('-'),
        dataset_name=dataset,
        metric_type='accuracy',
        metric_name='top-1, %',
        metric_value=top1,
    )
    return {'datasets': datasets, 'model_name': name, 'eval_results': [result]}


def is_repo_id(text: str) -> bool:
    """Whether a text can be the name of a repo on the Hub."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True
