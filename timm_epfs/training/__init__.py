"""The trainer behind ``timm-epfs train``.

In: options and images. Out: a pruned model that was trained, cut and fine-tuned, with a report and checkpoints.

- ``options``: what the options amount to, and which of them go together.
- ``data``: the datasets and loaders.
- ``phase``: one phase, epoch by epoch.
- ``checkpoints``: what is saved after each epoch, without pickle.
- ``run``: the phases one after the other.
- ``summary``, ``run_pictures``: what is written for people.
"""
