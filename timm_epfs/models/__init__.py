"""Models that timm does not have. Importing this package registers them with timm."""
from . import cifar as cifar
