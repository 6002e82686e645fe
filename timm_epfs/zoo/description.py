"""What timm says of a model and of its saved weights: a pretrained_cfg, an overlay, a config.json's model_args."""
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Union

from timm.models import PretrainedCfg
from torch import Tensor

from ..plan import Plan
from .config import check_config, is_from_config, saved_tensors
from .weights import find_weights, has_weights, read_weights

__all__ = ['ARCHITECTURE', 'Description']

ARCHITECTURE = 'epfs_pruned'


@dataclass(frozen=True, eq=False)
class Description:
    """What timm says of a model, as it passes it to an entry point.

    Attributes:
        cfg: A pretrained_cfg, or the tag of one of the base's.
        overlay: What replaces fields of it.
        model_args: Arguments that the saved model was built with.
        cache_dir: Where downloads go.
    """
    cfg: Optional[Union[str, Dict[str, Any]]]
    overlay: Dict[str, Any]
    model_args: Dict[str, Any]
    cache_dir: Optional[Union[str, Path]]

    @classmethod
    def checked(
            cls,
            cfg: Optional[Union[str, Dict[str, Any], PretrainedCfg]],
            overlay: Optional[Dict[str, Any]],
            model_args: Optional[Dict[str, Any]],
            cache_dir: Optional[Union[str, Path]],
    ) -> 'Description':
        """The description, checked: a config.json may set only what ``check_config`` allows.

        Raises:
            PruningError: It is from a config.json and decides what isn't a config's to decide.
        """
        cfg = cfg.to_dict() if isinstance(cfg, PretrainedCfg) else cfg
        if is_from_config(cfg):
            check_config(cfg, model_args or {})
        if cfg == PretrainedCfg(architecture=ARCHITECTURE).to_dict():
            # What timm's scripts pass for an architecture without a config of its own: it says nothing about the base.
            cfg = None
        return cls(cfg, overlay or {}, model_args or {}, cache_dir)

    @property
    def fields(self) -> Dict[str, Any]:
        """The fields of the pretrained_cfg, as far as they are given."""
        given = self.cfg if isinstance(self.cfg, dict) else {}
        return {'architecture': ARCHITECTURE, **given, **self.overlay}

    @property
    def has_weights(self) -> bool:
        """Whether weights of the pruned model are saved; otherwise there are those of the base."""
        return has_weights(self.fields)

    @property
    def num_classes(self) -> Optional[int]:
        """How many classes a model's own config.json says that it has, where only its top says so.

        What loads it into a head of another size, as transformers does, changes the number there and not in the plan.
        """
        is_its_own = is_from_config(self.cfg) and 'plan' in self.model_args
        return self.cfg.get('num_classes') if is_its_own and 'num_classes' not in self.model_args else None

    def create_args(self) -> Dict[str, Any]:
        """The arguments of ``timm.create_model`` by which a model gets this description."""
        return {
            'pretrained_cfg': self.cfg,
            'pretrained_cfg_overlay': {**self.overlay, 'architecture': self.fields['architecture']},
            'pretrained_model_args': {name: value for name, value in self.model_args.items() if name != 'plan'},
            'cache_dir': self.cache_dir,
        }

    def read_weights(self, plan: Plan, own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The saved weights. Where they come with a config.json, they have to be those of a model that it describes.

        Args:
            plan: The plan.
            own: The tensors of the model that is being made. Weights like these are fine, whatever config.json says.

        Raises:
            PruningError: They can't be read, or are of another model.
        """
        fields = self.fields
        if fields.get('state_dict') and not is_from_config(fields):
            return fields['state_dict']
        path = find_weights(fields, self.cache_dir)
        if not is_from_config(self.cfg):
            return read_weights(path)
        return read_weights(path, own, partial(saved_tensors, plan, self.cfg, self.model_args))
