"""The trainer behind ``timm-epfs train``.

In: options and images. Out: a pruned model that was trained, cut and fine-tuned, with a report and checkpoints.

- ``options``: checks the options and derives epochs, budget and arguments from them.
- ``data``: datasets and loaders.
- ``dense_model``: builds the dense model, and keeps its weights.
- ``cutter``: the cut of a run, by a method that learns or in one shot.
- ``phase``: trains one phase, epoch by epoch.
- ``checkpoints``: saves the state of the run after each epoch, without pickle.
- ``run``: runs the phases one after the other.
- ``summary``, ``run_pictures``: write the report.
"""
