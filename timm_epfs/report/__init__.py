"""Comparing a dense and a pruned model: numbers, tables, pictures and pages.

In: a dense and a pruned model, or a plan. Out: their measurements side by side, as a table, a picture or a page.
"""
from .charts import Axis, Band, Cell, Chart, Line, axis_of
from .comparison import Rows, compare, count_macs, size_on_disk, table, top1
from .html_page import html_report
from .image_data import check_classes, class_count, image_loader, image_splits, random_images
from .page import Section, check_page, write_page
from .pictures import check_picture, draw, draw_layers, new_figure, plot
from .sections import accuracy_section, comparison_section, layers_section, sensitivity_section
from .sensitivity_picture import draw_sensitivity

__all__ = [
    'Axis', 'Band', 'Cell', 'Chart', 'Line', 'Rows', 'Section', 'accuracy_section', 'axis_of', 'check_classes',
    'check_page', 'check_picture', 'class_count', 'compare', 'comparison_section', 'count_macs', 'draw', 'draw_layers',
    'draw_sensitivity', 'html_report', 'image_loader', 'image_splits', 'layers_section', 'new_figure', 'plot',
    'random_images', 'sensitivity_section', 'size_on_disk', 'table', 'top1', 'write_page',
]
