"""The trainer behind ``timm-epfs train``.

In: options and images. Out: a pruned model that was trained, cut and fine-tuned, with a report and checkpoints.

- ``options``: checks the options and derives epochs, budget and arguments from them.
- ``data``: datasets and loaders.
- ``dense_weights``: the model that a run starts from, and the file of its weights after the dense phase.
- ``run_cut``: the cut of a run, by a method that learns or in one shot.
- ``phase``: trains one phase, epoch by epoch.
- ``checkpoints``: saves the state of the run after each epoch, without pickle.
- ``run``: runs the phases one after the other.
- ``summary``, ``run_pictures``: write the report.
"""
