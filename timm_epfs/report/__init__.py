"""Comparing a dense and a pruned model: numbers, tables and pictures.

In: a dense and a pruned model, or a plan. Out: their measurements side by side, as a table or a picture.
"""
from .comparison import Rows, compare, count_macs, size_on_disk, table, top1
from .image_data import check_classes, image_loader, image_splits, random_images
from .pictures import check_picture, draw, draw_layers, new_figure, plot
from .sensitivity_picture import draw_sensitivity

__all__ = [
    'Rows', 'check_classes', 'check_picture', 'compare', 'count_macs', 'draw', 'draw_layers', 'draw_sensitivity',
    'image_loader', 'image_splits', 'new_figure', 'plot', 'random_images', 'size_on_disk', 'table', 'top1',
]
